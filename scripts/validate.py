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
from pathlib import Path

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.hub import check_record, finish_weights_folder
from wrn_timm.names import printable
from wrn_timm.train.validate import validate, weights_folder

SAMPLE = Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'caltech101_sample'


def main(argv: list[str] | None = None) -> int:
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
    args = parser.parse_args(argv)
    if args.write and not Path(args.model).is_dir():
        parser.error(f'--write needs a weights folder; {args.model} is none')
    try:
        if args.write:
            check_record(weights_folder(args.model))  # before it is measured
        metrics = validate(
            args.model, args.data, args.batch_size, args.device, args.workers, args.download, args.corruptions,
            args.split)
    except (ValueError, OSError, RuntimeError) as e:
        print(f'error: {printable(e, lines=True)}', file=sys.stderr)
        return 1
    print(json.dumps(metrics, indent=2))
    if args.write:
        finish_weights_folder(weights_folder(args.model), metrics, SAMPLE)
    return 0


if __name__ == '__main__':
    sys.exit(main())
