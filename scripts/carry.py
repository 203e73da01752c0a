#!/usr/bin/env python3
"""Carry a run or a weights folder in small shards, and put it together again, bit for bit.

    python scripts/carry.py pack RUN SHARDS             # 15 MB each; of the checkpoints the newest and the best
    python scripts/carry.py unpack SHARDS RUN           # elsewhere; then train.py --resume --out RUN
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.names import printable
from wrn_timm.train.carry import pack, unpack


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    packing = commands.add_parser('pack', help='cut a folder into shards')
    packing.add_argument('folder', help='run directory or weights folder')
    packing.add_argument('out', help='new folder for the shards')
    packing.add_argument('--shard-mb', type=float, default=15., help='largest size of a shard (default: %(default)s)')
    unpacking = commands.add_parser('unpack', help='put shards together')
    unpacking.add_argument('shards', help='folder of the shards')
    unpacking.add_argument('out', help='new folder for what they hold')
    for command in (packing, unpacking):
        command.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    if args.command == 'pack':
        files = pack(args.folder, args.out, int(args.shard_mb * 1e6))
        print(f'{len(files) - 1} shards in {printable(args.out)}')
    else:
        print(printable(unpack(args.shards, args.out)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
