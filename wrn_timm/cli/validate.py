"""Evaluate pretrained weights on a test set.

    wrn-timm validate --model wrn16_1.cifar10 --data cifar10:DIR
    wrn-timm validate --model RUN/weights --data cifar10:DIR --write    # finish a weights folder
    wrn-timm validate --model RUN/best --data caltech101:DIR --split RUN/split.csv

The metrics are printed as JSON.
"""
from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..card import check_run_records, finish_weights_folder
from ..recipes import Precision, Recipe, with_defaults
from ..train.machine import Machine
from ..train.measure import validate
from ..train.metrics import summarise
from ..train.run import check_place
from ..weights import weights_folder
from .common import OnDevice, machine_of, reports_errors
from .options import option, parse


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidateOptions(OnDevice):
    model: str
    """timm name, weights folder or run directory."""
    data: str
    """cifar10:DIR, cifar100:DIR, svhn:DIR, synthetic, folder:DIR, caltech101:DIR or FILE.csv."""
    split: str = ''
    """split.csv of a fine-tuning run, whose test files are measured."""
    download: bool = False
    """Download the data set into DIR if it is missing."""
    batch_size: int = 250
    """Images per batch; fewer if they do not fit into memory."""
    workers: int = 0
    """Processes that read photographs."""
    corruptions: bool = False
    """Also measure the accuracy under noise, blur and JPEG artefacts (named data sets only)."""
    write: bool = False
    """Write metrics, golden logits and the card into the weights folder that --model names."""
    other_seeds: tuple[str, ...] = option((), 'FOLDER', nargs='+')
    """With --write: weights trained by the same recipe from other seeds. They are measured too, and the card gives the
    mean and standard deviation over all of them."""
    precision: Precision | None = None
    """'auto' is bfloat16 on GPUs and CPUs that are faster in it, 'no' is float32. The default is auto, or no with
    --write, because published metrics are computed in float32."""

    def __post_init__(self):
        super().__post_init__()
        if self.write and self.precision not in (None, 'no'):
            raise ValueError(f'--write publishes figures in float32; leave out --precision {self.precision}')
        if self.write and not Path(self.model).is_dir():
            raise ValueError(f'--write needs a weights folder, and {self.model} is not one')
        if self.other_seeds and not self.write:
            raise ValueError('--other-seeds is for the card; add --write')


def check_seeds(folders: Sequence[str]) -> None:
    """Check that all weights were trained by the same recipe, each with its own seed.

    Raises:
        ValueError: The recipes differ, a seed occurs twice, or weights were fine-tuned.
        Any error of `check_run_records`.
    """
    runs = {folder: check_run_records(weights_folder(folder)) for folder in folders}
    if len(folders) == 1:
        return
    for folder, run in runs.items():
        if 'finetune' in run:
            raise ValueError(f'{folder} was fine-tuned, and --other-seeds is for weights of wrn-timm train; '
                             f'wrn-timm finetune --seeds measures all its seeds')
        first, other = (with_defaults(r['recipe'], Recipe) for r in (runs[folders[0]], run))
        if differ := [key for key in first | other if first.get(key) != other.get(key)]:
            raise ValueError(f'{folder} was trained with another recipe than {folders[0]} ({", ".join(differ)}); give '
                             f'weights that differ only by seed')
    seeds = [run.get('seed') for run in runs.values()]
    if len({*seeds}) < len(folders):
        raise ValueError(f'the seeds are {", ".join(map(str, seeds))}; each of the weights must have its own')


def trained_on(model: str, metrics: dict[str, Any]) -> bool:
    """Whether the metrics cover all files of the fine-tuning data, which is recognised by its name."""
    run = check_run_records(weights_folder(model))
    return 'finetune' in run and metrics['split'] == 'all files' and metrics['dataset'] == run.get('data')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('validate', __doc__), ValidateOptions)
    if options.write:  # fail before measuring, not after
        check_seeds([options.model, *options.other_seeds])
        check_place(weights_folder(options.model))
    measure = functools.partial(
        validate, data=options.data, machine=machine_of(options, Machine), batch_size=options.batch_size,
        split=options.split, precision=options.precision or ('no' if options.write else 'auto'))
    metrics = measure(options.model, corruptions=options.corruptions)
    if options.other_seeds:
        others = [measure(folder)['top1'] for folder in options.other_seeds]
        metrics['seeds'] = {'top1': summarise([metrics['top1'], *others])}
    if options.write and trained_on(options.model, metrics):
        print(json.dumps(metrics, indent=2))
        raise ValueError(f"{options.model} was trained on photographs of {metrics['dataset']}, so these figures are "
                         f"not written to its card; give the --split of its run, or other photographs")
    if options.write:  # before printing, because the reader may close the pipe
        finish_weights_folder(weights_folder(options.model), metrics)
    print(json.dumps(metrics, indent=2))
    return 1 if metrics['skipped'] else 0
