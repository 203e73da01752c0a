#!/usr/bin/env python3
"""Train a detector on photographs with boxes, measure it, and draw what it finds.

    python scripts/detect.py --data bccd:DIR --model wrn50_2 --out RUN     # DIR/{Annotations,ImageSets,JPEGImages}
    python scripts/detect.py --data bccd:DIR --model torchvision/resnet50_fpn --out RUN     # the same by torchvision's
    python scripts/detect.py --out RUN --draw photo.jpg [...]              # by the detector of a run that has ended
"""
from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.names import printable, terminal_handler
from wrn_timm.train.detector import DetectConfig, detect, draw, load_detector
from wrn_timm.train.machine import Machine
from wrn_timm.train.run import holds_checkpoint


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog='Any field of DetectConfig (wrn_timm/train/detect.py) is an option too: --epochs 20 --image-size 320')
    parser.add_argument('--data', metavar='bccd:DIR', help='or voc:DIR, any data set in the folders of Pascal VOC')
    parser.add_argument('--out', required=True, help='run directory')
    parser.add_argument('--draw', nargs='+', metavar='PHOTO', help='draw what the run finds into RUN/drawn')
    parser.add_argument('--threshold', type=float, default=0.5, help='lowest score that is drawn')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--workers', type=int, default=0, help='processes that read photographs')
    parser.add_argument('--on-bad', choices=('skip', 'fail'), default='skip',
                        help='what to do with bad boxes and unreadable files')
    parser.add_argument('--time-budget', type=float, default=math.inf, metavar='SECONDS')
    parser.add_argument('--resume', action='store_true', help='go on with the run in --out')
    parser.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args, overrides = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, handlers=[terminal_handler()])
    logging.getLogger('timm').setLevel(logging.WARNING)
    try:
        if args.draw:
            detector, classes = load_detector(args.out, args.device)
            found = draw(detector, classes, args.draw, Path(args.out) / 'drawn', args.device, args.threshold)
            print(json.dumps(found, indent=2))
            return 0
        if not args.data:
            parser.error('--data is missing: the folder of a data set with boxes')
        config = tyro.cli(DetectConfig, args=overrides, prog='detect.py ...')
        metrics = detect(config, args.data, args.out, Machine(
            args.device, args.workers, on_bad=args.on_bad, time_budget=args.time_budget, resume=args.resume))
    except KeyboardInterrupt:
        print('stopped; go on with --resume' if holds_checkpoint(args.out) else 'stopped before anything was saved; to '
              'begin again, run the same command', file=sys.stderr)
        return 130
    if not metrics:
        return 130
    if metrics:
        print(f"mAP@0.5 {metrics['map_50']:.1f} %, mAP@0.5:0.95 {metrics['map']:.1f} % on {metrics['images']} "
              f"photographs; all in {printable(args.out)}")
    return 0


if __name__ == '__main__':
    sys.exit(main())
