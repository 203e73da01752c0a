#!/usr/bin/env python3
"""Measure pretrained weights on a test set, and print the figures as JSON.

    python scripts/validate.py --model wrn16_1.cifar10 --data cifar10:DIR
    python scripts/validate.py --model RUN/weights --data cifar10:DIR --write    # finish a weights folder
    python scripts/validate.py --model RUN/best --data caltech101:DIR --split RUN/split.csv
"""
from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.card import check_run_records, finish_weights_folder
from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.recipes import Precision
from wrn_timm.train.machine import Machine
from wrn_timm.train.measure import validate
from wrn_timm.weights import weights_folder


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='timm name or weights folder')
    parser.add_argument('--data', required=True, help='cifar10:DIR, cifar100:DIR, svhn:DIR, synthetic, folder:DIR, '
                                                      'caltech101:DIR or FILE.csv')
    parser.add_argument('--split', default='', help='split.csv of a fine-tuned run: measure the part it tests on')
    parser.add_argument('--download', action='store_true', help='fetch the data set into DIR if it is missing')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=250)
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--corruptions', action='store_true', help='measure under noise, blur and JPEG too')
    parser.add_argument('--write', action='store_true',
                        help='write metrics, golden logits and the card into the weights folder that --model names')
    parser.add_argument('--precision', choices=get_args(Precision),
                        help='auto is bfloat16 on GPUs and CPUs that are faster in it, no is float32 (default: auto, '
                             'and no with --write, since published figures are float32)')
    parser.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    if args.write and args.precision not in (None, 'no'):
        parser.error(f'--write publishes figures in float32; leave out --precision {args.precision}')
    if args.write and not Path(args.model).is_dir():
        parser.error(f'--write needs a weights folder; {args.model} is none')
    if args.write:
        check_run_records(weights_folder(args.model))  # before minutes are spent
    metrics = validate(
        args.model, args.data, Machine(args.device, args.workers, download=args.download), args.batch_size,
        args.corruptions, args.split, args.precision or ('no' if args.write else 'auto'))
    print(json.dumps(metrics, indent=2))
    if args.write:
        finish_weights_folder(weights_folder(args.model), metrics)
    return 0


if __name__ == '__main__':
    sys.exit(main())
