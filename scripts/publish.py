#!/usr/bin/env python3
"""Publish weights folders as repositories of the Hugging Face Hub: each is checked, uploaded, tagged and read back.

    python scripts/publish.py weights/wrn16_1.cifar10 --namespace NAME --dry-run
    python scripts/publish.py RUN/weights --namespace NAME --private
    python scripts/publish.py --all --namespace NAME    # every folder of weights/

The token is the one of `hf auth login` or $HF_TOKEN. What is there already is not uploaded again.
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.hub import preview, publish
from wrn_timm.names import printable

WEIGHTS = Path(__file__).resolve().parents[1] / 'weights'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folders', nargs='*', metavar='FOLDER', help='weights folder of train.py or finetune.py')
    parser.add_argument('--namespace', required=True, metavar='NAME', help='user or organisation on the Hub')
    parser.add_argument('--private', action='store_true', help='make the repositories private')
    parser.add_argument('--dry-run', action='store_true', help='check, and show each file, its size and the card')
    parser.add_argument('--endpoint', metavar='URL', help='another Hub (default: $HF_ENDPOINT, else the Hub itself)')
    parser.add_argument('--all', action='store_true', help='every folder of weights/')
    args = parser.parse_args(argv)
    if args.all == bool(args.folders):
        parser.error('name folders, or --all')
    failed = 0
    for folder in sorted(p for p in WEIGHTS.iterdir() if p.is_dir()) if args.all else args.folders:
        try:
            print(preview(folder, args.namespace) if args.dry_run
                  else publish(folder, args.namespace, args.private, args.endpoint))
        except (OSError, ValueError, RuntimeError) as e:
            print(f'error: {printable(e, lines=True)}', file=sys.stderr)
            failed += 1
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
