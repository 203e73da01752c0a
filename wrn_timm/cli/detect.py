"""Train a detector on photographs with boxes, measure it, and draw what it finds.

    wrn-timm detect --data DIR --out RUN                         # Pascal VOC, COCO or YOLO
    wrn-timm detect --data DIR --model torchvision/resnet50_fpn --out RUN    # torchvision's detector, to compare with
    wrn-timm detect --out RUN --draw photo.jpg [...]             # by the detector of a finished run
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pycocotools  # noqa: F401  (which measures the detector, after hours of training)

from ..names import printable
from ..train.detector import DetectConfig, detect, draw, load_detector
from ..train.machine import Machine
from .common import STOPPED, Training, log_to_terminal, machine_of, reports_errors, resumable
from .options import option, parse

PURPOSES = {
    'Options that matter first': (
        'data', 'out', 'model', 'detector', 'pretrained', 'image_size', 'epochs', 'batch_size', 'lr', 'resume', 'draw',
        'threshold'),
    'Data': ('train_split', 'test_split', 'on_bad'),
    'Network': ('frozen_stages', 'out_channels', 'anchor_scale', 'rois'),
    'Optimisation': ('opt', 'weight_decay', 'warmup_steps', 'seed'),
    'Machine': ('device', 'workers', 'time_budget', 'traceback'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectOptions(Training):
    """Options beside the settings of the detector."""
    data: str = option('', 'DIR')
    """Photographs with boxes: a folder in Pascal VOC, COCO or YOLO format (found automatically), or coco:FILE.json.
    """
    draw: tuple[str, ...] = option((), 'PHOTO')
    """Train nothing; draw what the detector of the run finds in these photographs into RUN/drawn."""
    threshold: float = 0.5
    """Lowest score that is drawn."""
    workers: int = 0
    """Processes that read photographs."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with bad boxes and unreadable files: leave them out and name them, or stop."""

    def __post_init__(self):
        super().__post_init__()
        if not (self.data or self.draw):
            raise ValueError('--data is missing: name the folder of a data set with boxes')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, config = parse(argv, ('detect', __doc__), DetectOptions, DetectConfig, purposes=PURPOSES)
    log_to_terminal()
    if options.draw:
        detector, classes = load_detector(options.out, options.device)
        found = draw(
            detector, classes, options.draw, Path(options.out) / 'drawn', options.device, options.threshold)
        print(json.dumps(found, indent=2))
        return 0
    with resumable(options.out):
        metrics = detect(
            config, options.data, options.out, machine_of(options, Machine))
    if metrics is None:
        return STOPPED
    print(f"mAP@0.5 {metrics['map_50']:.1f} %, mAP@0.5:0.95 {metrics['map']:.1f} % on {metrics['images']} "
          f"photographs; all in {printable(options.out)}")
    return 0
