"""Fine-tune pretrained weights on photographs.

    wrn-timm finetune                          # in a checkout: its sample of Caltech 101, a minute on a laptop
    wrn-timm finetune --data DIR --out RUN     # DIR holds a folder of photographs per class
    wrn-timm finetune --data caltech101:DIR --download --split random30 --train head --out RUN
    wrn-timm finetune --data DIR --probe all   # rank all available weights, without training
    torchrun --nproc-per-node 8 -m wrn_timm.cli finetune --data DIR --out RUN
"""
from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.bundled import sample
from ..files import write_json
from ..names import printable
from ..recipes import FinetuneConfig, finetune_command
from ..train.finetune import finetune_seeds
from ..train.machine import Machine, usable_cores
from ..train.probe import probe
from ..train.run import TIME_BUDGET, begun_with, check_place, has_begun
from ..train.transfer_results import record_transfer, transfer_folder
from .common import STOPPED, Training, is_main_process, log_to_terminal, machine_of, reports_errors, resumable
from .options import option, parse

PURPOSES = {
    'Main options': (
        'data', 'out', 'model', 'train', 'epochs', 'input_size', 'lr', 'batch_size', 'split', 'seeds', 'probe',
        'resume'),
    'Data': ('holdout', 'parts', 'num_classes', 'input_key', 'target_key', 'nested', 'download', 'on_bad'),
    'Network': ('pretrained', 'stem', 'cache'),
    'Optimisation': (
        'accumulate', 'opt', 'momentum', 'weight_decay', 'layer_decay', 'schedule', 'warmup_epochs', 'label_smoothing',
        'class_weights', 'ema_decay', 'patience', 'seed'),
    'Augmentation': (
        'augment', 'flip', 'min_scale', 'color_jitter', 'auto_augment', 'random_erase', 'mixup', 'cutmix'),
    'Machine': ('device', 'precision', 'workers', 'image_memory', 'time_budget'),
    'Output': ('record', 'messages', 'traceback'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneOptions(Training):
    """Command-line options in addition to the training settings."""
    data: str = ''
    """Folder of class folders, FILE.csv (path, label), caltech101:DIR or a timm data set (hfds/...). In a checkout, the
    default is the bundled sample of Caltech 101."""
    out: str = 'runs/finetune'
    resume: bool = False
    """Continue the run in --out with its own settings; give its --data again."""
    workers: int = min(8, usable_cores()) if torch.cuda.is_available() else 0
    """Processes that read photographs."""
    image_memory: float = option(1., 'GB')
    """Memory per process for keeping decoded photographs between epochs, in GB. Photographs that do not fit are decoded
    again in every epoch; the result is the same."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with unreadable files: skip leaves them out and lists them, fail stops the run."""
    download: bool = False
    """Download Caltech 101 if it is missing."""
    time_budget: float = option(Training.time_budget, 'SECONDS')
    """Start no epoch that would not finish within this many seconds."""
    seeds: int = 1
    """Number of runs, each with its own seed; their mean and standard deviation are written too."""
    probe: tuple[str, ...] = option((), 'WEIGHTS', nargs='+')
    """Train nothing. Rank these weights ('all': all that are available) by nearest neighbours and a linear classifier
    on their features, using held-out training files. Only the best are evaluated on the test files. The results are
    written to RUN/probe.json."""
    record: bool = False
    """Also write the results to transfer.json in the weights folder, for the tables of weights/README.md."""
    messages: Literal['text', 'json', 'quiet'] = 'text'
    """What is printed: lines and a progress bar, a JSON object per line, or errors only."""

    def __post_init__(self):
        super().__post_init__()
        if not (self.data or sample()):
            raise ValueError('--data is missing: give a folder with one folder of photographs per class, FILE.csv or '
                             'caltech101:DIR (the sample of Caltech 101 is only part of a checkout)')

    @property
    def source(self) -> str:
        """Data to train on."""
        return self.data or str(sample())


def emit(row: dict[str, Any], options: FinetuneOptions) -> None:
    """Print a row as JSON if --messages is json."""
    if options.messages == 'json':
        print(json.dumps(row), flush=True)


def run_probe(options: FinetuneOptions, config: FinetuneConfig, machine: Machine) -> None:
    """Rank the weights; every result is saved at once, because the next weights may be damaged."""
    if os.environ.get('WORLD_SIZE', '1') != '1':
        raise ValueError('--probe runs in one process; start it without torchrun')
    check_place(Path(options.out))
    kept = {}

    def write(rows: Iterable[dict[str, Any]]) -> None:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        write_json(Path(options.out) / 'probe.json', list(rows))

    def keep(row: dict[str, Any]) -> None:
        kept[row['weights'], row['way']] = row
        emit(row, options)
        write(kept.values())

    rows = probe(options.probe, options.source, config, options.seeds, options.record, machine, keep)
    write(rows)
    for row in rows if options.record else ():
        record_transfer(row['weights'], [row])
    if options.messages == 'text':
        show_probe(rows, options, config)


def run_training(options: FinetuneOptions, config: FinetuneConfig, machine: Machine) -> int:
    """Fine-tune, print the results, and return the exit code."""
    result = finetune_seeds(
        config, options.source, options.out, options.seeds, machine, lambda row: emit(row, options))
    if not is_main_process():
        return 0
    if result is None:
        return STOPPED
    shown = result if options.seeds > 1 else result['runs'][0]
    emit(shown, options)
    if options.messages == 'text':
        show(shown, options.out)
    if options.record and (stopped := [run for run in result['runs'] if run['stopped'] == TIME_BUDGET]):
        raise ValueError(f"the run was stopped by {TIME_BUDGET} after epoch {stopped[0]['epochs']}, so it is not "
                         f"recorded; continue with --resume")
    if options.record:
        record_transfer(config.model, [{k: v for k, v in result.items() if k != 'runs'}])
    return 0


def show(result: dict[str, Any], out: str) -> None:
    """Print the results as text."""
    if 'runs' in result:
        for key in ('top1', 'mean_per_class', 'ece'):
            print(f"{key:15} {spread(result[key])} %, {result['seeds']} seeds")
    else:
        tested = f"photographs of {printable(result['tested_on'])}" if result['tested_on'] else 'test photographs'
        print(f"accuracy {result['top1']:.1f} % on {result['images']} {tested}, mean per-class accuracy "
              f"{result['mean_per_class']:.1f} %; see {printable(out)}/report.html")


def spread(score: dict[str, Any]) -> str:
    """Mean, with the standard deviation if there are several values."""
    return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if len(score['values']) > 1 else '')


def show_probe(rows: list[dict[str, Any]], options: FinetuneOptions, config: FinetuneConfig) -> None:
    """Print the ranking, and the command that trains the best weights."""
    print(f"{'accuracy, % (mean per-class accuracy, %)':46}{'held-out files':>26}{'test files':>26}  seconds")
    for row in rows:
        held_out, test = (f"{spread(scores['top1'])} ({spread(scores['mean_per_class'])})" if 'top1' in scores else '-'
                          for scores in (row['holdout'], row))
        print(f"{printable(row['weights']):26} {row['input_size']:>3} px  {row['way']:13}{held_out:>26}{test:>26} "
              f"{row['seconds']:8.0f}")
    kept = ('split', 'holdout', 'input_size', 'nested', 'seed')
    settings = {'model': rows[0]['weights'], **{name: getattr(config, name) for name in kept}}
    out = 'RUN' if has_begun(Path(options.out)) else options.out
    print(f"\nBest on the held-out files: {rows[0]['weights']}. To train all its layers (or, with --train head, only "
          f"the classifier, in seconds), run:\n\n  {finetune_command(settings, options.source, out)}")


def read(argv: Sequence[str]) -> tuple[FinetuneOptions, FinetuneConfig]:
    """Parse the command line."""
    def start(options: FinetuneOptions) -> FinetuneConfig:
        return begun_with(Path(options.out), 'finetune', FinetuneConfig) if options.resume else FinetuneConfig()

    return parse(argv, ('finetune', __doc__), FinetuneOptions, FinetuneConfig, start, PURPOSES)


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, config = read(argv)
    text = options.messages == 'text'
    log_to_terminal(logging.INFO if text and is_main_process() else logging.ERROR)
    if options.record:
        for name in options.probe or [config.model]:
            if name != 'all':
                transfer_folder(name)  # fail before training, not after
    machine = machine_of(options, Machine, progress=None if text else False)
    if options.probe:
        run_probe(options, config, machine)
        return 0
    with resumable(options.out):
        return run_training(options, config, machine)
