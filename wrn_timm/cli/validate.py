"""Measure pretrained weights on a test set.

    wrn-timm validate --model wrn16_1.cifar10 --data cifar10:DIR
    wrn-timm validate --model RUN/weights --data cifar10:DIR --write    # finish a weights folder
    wrn-timm validate --model RUN/best --data caltech101:DIR --split RUN/split.csv

The figures are printed as JSON.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ..card import check_run_records, finish_weights_folder
from ..recipes import Precision
from ..train.machine import Machine
from ..train.measure import validate
from ..weights import weights_folder
from .common import OnDevice, machine_of, reports_errors
from .options import parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions(OnDevice):
    model: str
    """timm name or weights folder."""
    data: str
    """cifar10:DIR, cifar100:DIR, svhn:DIR, synthetic, folder:DIR, caltech101:DIR or FILE.csv."""
    split: str = ''
    """split.csv of a fine-tuned run: measure the part it tests on."""
    download: bool = False
    """Download the data set into DIR if it is missing."""
    batch_size: int = 250
    """Images per batch; fewer where they do not fit into memory."""
    workers: int = 0
    """Processes that read photographs."""
    corruptions: bool = False
    """Measure under noise, blur and JPEG too."""
    write: bool = False
    """Write metrics, golden logits and the card into the weights folder that --model names."""
    precision: Precision | None = None
    """'auto' is bfloat16 on GPUs and CPUs that are faster in it, 'no' is float32. The default is auto, and no with
    --write, since published figures are float32."""

    def __post_init__(self):
        super().__post_init__()
        if self.write and self.precision not in (None, 'no'):
            raise ValueError(f'--write publishes figures in float32; leave out --precision {self.precision}')
        if self.write and not Path(self.model).is_dir():
            raise ValueError(f'--write needs a weights folder; {self.model} is none')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('validate', __doc__), ValidateOptions)
    if options.write:
        check_run_records(weights_folder(options.model))  # before minutes are spent
    metrics = validate(
        options.model, options.data, machine_of(options, Machine), options.batch_size, options.corruptions,
        options.split, options.precision or ('no' if options.write else 'auto'))
    print(json.dumps(metrics, indent=2))
    if options.write:
        finish_weights_folder(weights_folder(options.model), metrics)
    return 0
