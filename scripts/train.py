#!/usr/bin/env python3
"""Train a WRN from scratch by a recipe.

    python scripts/train.py --recipe quick --data DIR --out RUN
    python scripts/train.py --recipe quick --data DIR --out RUN --model resnet18 --lr 0.05    # any field of the recipe
    torchrun --nproc-per-node 8 scripts/train.py --recipe cifar10 --data DIR --out RUN
"""
from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Sequence

import torch
import tyro

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.names import printable
from wrn_timm.recipes import RECIPES, Recipe, get_recipe
from wrn_timm.train.scratch import ScratchMachine, train


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument('--recipe', required=True, help=f'one of {", ".join(RECIPES)}')
    parser.add_argument('--data', default='', help='folder of the official files of the data set')
    parser.add_argument('--download', action='store_true', help='fetch the data set into --data if it is missing')
    parser.add_argument('--out', required=True, help='run directory')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--time-budget', type=float, default=math.inf, metavar='SECONDS')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument('--checkpoint-every', type=float, default=60., metavar='SECONDS')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction,
                        help='compile the network; the default is to do so on CUDA alone. On a CPU it needs a C++ '
                             'compiler and makes narrow networks up to twice as fast')
    parser.add_argument('--precision', choices=('auto', 'bf16', 'no'), default='auto',
                        help='auto is bfloat16 on GPUs and CPUs that are faster in it, no is float32')
    parser.add_argument('--grad-checkpointing', action='store_true', help='save memory by computing blocks twice')
    parser.add_argument('--half', action='store_true', help='export half-precision weights (BatchNorm stays float32)')
    parser.add_argument('--tracker', default='', help='tensorboard, wandb, trackio or another that accelerate knows')
    parser.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args, overrides = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    logging.getLogger('timm').setLevel(logging.WARNING)
    recipe = tyro.cli(Recipe, default=get_recipe(args.recipe), args=overrides, prog='train.py --recipe ...')
    folder = train(
        recipe, args.data, args.out, args.seed, args.half, ScratchMachine(
            device=args.device, time_budget=args.time_budget, checkpoint_every=args.checkpoint_every,
            resume=args.resume, download=args.download, compile=args.compile,
            grad_checkpointing=args.grad_checkpointing, tracker=args.tracker, precision=args.precision))
    if not folder:
        return 0 if os.environ.get('RANK', '0') != '0' else 130
    print(f'weights: {printable(folder)}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
