#!/usr/bin/env python3
"""Train a WRN from scratch by a recipe.

    python scripts/train.py --recipe quick --data DIR --out RUN
"""
from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.train.loop import train
from wrn_timm.train.recipes import RECIPES, get_recipe


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', required=True, help=f'one of {", ".join(RECIPES)}')
    parser.add_argument('--data', default='', help='folder of the official files of the data set')
    parser.add_argument('--download', action='store_true', help='fetch the data set into --data if it is missing')
    parser.add_argument('--out', required=True, help='run directory')
    parser.add_argument('--model', help="timm name, in place of the recipe's")
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--time-budget', type=float, default=math.inf, metavar='SECONDS')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    logging.getLogger('timm').setLevel(logging.WARNING)
    try:
        recipe = get_recipe(args.recipe)
        if args.model:
            recipe = dataclasses.replace(recipe, model=args.model)
        folder = train(
            recipe, args.data, args.out, device=args.device, seed=args.seed, time_budget=args.time_budget,
            resume=args.resume, download=args.download)
    except (ValueError, OSError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    if folder:
        print(f'weights: {folder}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
