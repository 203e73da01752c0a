#!/usr/bin/env python3
"""Name what photographs show.

    python scripts/predict.py --model wrn16_1.cifar10 photo.jpg FOLDER [...]
    find . -name '*.jpg' | python scripts/predict.py --model RUN/best --csv -
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import timm
import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.names import as_cell, printable
from wrn_timm.recipes import Precision
from wrn_timm.train.predict import find_images, predict_files

DEFAULT = 'wrn16_1.cifar10'


def named(arguments: list[str]) -> Iterator[str]:
    """The arguments, with '-' replaced by the lines of standard input."""
    for argument in arguments:
        if argument == '-':
            yield from (line.rstrip('\n') for line in sys.stdin if line.strip())
        else:
            yield argument


def print_text(result: dict[str, Any]) -> None:
    print(printable(result['image']))
    for row in result.get('top', ()):
        print(f"  {100 * row['probability']:5.1f} %  {printable(row['label'])}")
    if 'error' in result:
        print(f"  error: {printable(result['error'])}")


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='file, folder, or - for a list on standard input')
    parser.add_argument('--model', help=f'timm name or weights folder (default: {DEFAULT})')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--json', action='store_true', help='print one JSON list')
    form.add_argument('--csv', action='store_true',
                      help="print a line per file: image, label, probability (label_2... with --top-k), error; a name "
                           "that a spreadsheet would take for a formula is put after a '")
    parser.add_argument('--top-k', type=int, metavar='K', help='classes a file (default: 5, or 1 with --csv)')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--precision', choices=get_args(Precision), default='auto',
                        help='auto is bfloat16 on GPUs and CPUs that are faster in it, no is float32')
    parser.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    if args.top_k is None:
        args.top_k = 1 if args.csv else 5
    if args.model is None:
        args.model = DEFAULT
        labels = timm.get_pretrained_cfg(DEFAULT).label_names
        print(f'no --model is given: {DEFAULT} answers, which knows {", ".join(labels)} and nothing else',
              file=sys.stderr)
    for option in ('batch_size', 'top_k'):
        if getattr(args, option) < 1:
            parser.error(f'--{option.replace("_", "-")} is {getattr(args, option)}; it must be at least 1')
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='surrogateescape')  # names of files can be any bytes
    failed = 0
    results = predict_files(args.model, find_images(named(args.images)), args.device, args.batch_size,
                            args.top_k, args.precision)
    table = csv.writer(sys.stdout, lineterminator='\n')
    if args.json:
        results = list(results)
        print(json.dumps(results, indent=2))
    if args.csv:
        numbers = ['', *(f'_{i}' for i in range(2, args.top_k + 1))]
        table.writerow(['image', *(f'{name}{n}' for n in numbers for name in ('label', 'probability')), 'error'])
    for result in results:
        failed += 'error' in result
        if args.csv:
            answers = [value for row in result.get('top', ()) for value in (as_cell(row['label']), row['probability'])]
            answers += [''] * (2 * args.top_k - len(answers))
            table.writerow([as_cell(result['image']), *answers, as_cell(result.get('error', ''))])
        elif not args.json:
            print_text(result)
    if failed:
        print(f'{failed} files could not be read', file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
