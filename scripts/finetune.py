#!/usr/bin/env python3
"""Fine-tune pretrained weights on a folder of photographs, one folder a class.

    python scripts/finetune.py                          # the bundled sample of Caltech 101, two minutes on a laptop
    python scripts/finetune.py --data DIR --out RUN
"""
from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.hub import finish_weights_folder
from wrn_timm.train.finetune import FinetuneConfig, finetune

SAMPLE = Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'caltech101_sample'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', default=str(SAMPLE), help='folder of class folders (default: the bundled sample)')
    parser.add_argument('--out', default='runs/finetune', help='run directory (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--workers', type=int, default=0, help='processes that read photographs')
    parser.add_argument('--on-bad', choices=('skip', 'fail'), default='skip', help='what to do with unreadable files')
    for field in dataclasses.fields(FinetuneConfig):
        kind = str if field.name == 'model' else int if isinstance(field.default, int) else float
        parser.add_argument(f'--{field.name.replace("_", "-")}', type=kind, default=field.default,
                            help='default: %(default)s')
    args = vars(parser.parse_args(argv))
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    logging.getLogger('timm').setLevel(logging.WARNING)
    try:
        config = FinetuneConfig(**{f.name: args.pop(f.name) for f in dataclasses.fields(FinetuneConfig)})
        metrics = finetune(config, **args)
        finish_weights_folder(Path(args['out']) / 'weights', metrics, SAMPLE)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    print(f"held-out accuracy {metrics['top1']:.1f} % on {metrics['images']} photographs; all in {args['out']}")
    return 0


if __name__ == '__main__':
    sys.exit(main())
