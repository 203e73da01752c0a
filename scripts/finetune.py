#!/usr/bin/env python3
"""Fine-tune pretrained weights on photographs: a folder a class, a CSV of path and label, or Caltech 101.

    python scripts/finetune.py                          # the bundled sample of Caltech 101, two minutes on a laptop
    python scripts/finetune.py --data DIR --out RUN
    python scripts/finetune.py --data caltech101:DIR --download --split random30 --train head --out RUN
    python scripts/finetune.py --data DIR --probe all   # score every weight at hand, training none
    torchrun --nproc-per-node 8 scripts/finetune.py --data DIR --out RUN
"""
from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import math
import os
import re
import shlex
import signal
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.command import reports_errors
from wrn_timm.files import atomic_write
from wrn_timm.names import printable, terminal_handler
from wrn_timm.recipes import FinetuneConfig
from wrn_timm.train.finetune import finetune_seeds
from wrn_timm.train.machine import Machine
from wrn_timm.train.probe import probe
from wrn_timm.train.run import check_place, config_of, holds_checkpoint
from wrn_timm.train.transfer_results import record_transfer, transfer_folder

SAMPLE = Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'caltech101_sample'

PURPOSES = {  # the options as --help shows them
    'The options that matter first': (
        'data', 'out', 'model', 'train', 'epochs', 'input_size', 'lr', 'batch_size', 'split', 'seeds', 'probe',
        'resume'),
    'Data': ('holdout', 'parts', 'num_classes', 'nested', 'download', 'on_bad'),
    'Network': ('pretrained', 'stem', 'cache'),
    'Optimisation': (
        'accumulate', 'opt', 'momentum', 'weight_decay', 'layer_decay', 'schedule', 'warmup_epochs', 'label_smoothing',
        'class_weights', 'ema_decay', 'patience', 'seed'),
    'Augmentation': (
        'augment', 'min_scale', 'color_jitter', 'auto_augment', 'random_erase', 'mixup', 'cutmix'),
    'Machine': ('device', 'precision', 'workers', 'image_memory', 'time_budget'),
    'Output': ('record', 'messages', 'traceback'),
}


@dataclasses.dataclass(frozen=True)
class Command:
    config: Annotated[FinetuneConfig, tyro.conf.arg(name='')] = dataclasses.field(default_factory=FinetuneConfig)
    data: str = str(SAMPLE)
    """Folder of class folders, FILE.csv (path, label) or caltech101:DIR; by default the bundled sample."""
    out: str = 'runs/finetune'
    """Run directory."""
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """'cpu' or 'cuda'."""
    workers: int = min(8, os.cpu_count() or 1) if torch.cuda.is_available() else 0
    """Processes that read photographs."""
    image_memory: float = 1.
    """GB of decoded photographs that each process keeps from epoch to epoch; those that do not fit are decoded every
    time, to the same result."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with unreadable files: leave them out and name them, or stop."""
    download: bool = False
    """Fetch Caltech 101 if it is missing."""
    resume: bool = False
    """Go on with the run in --out, by its own settings; name its --data again."""
    time_budget: float = math.inf
    """Seconds after which no epoch is begun that would not end within them."""
    seeds: int = 1
    """Runs, each with its own seed; their mean and standard deviation are written too."""
    probe: tuple[str, ...] = ()
    """Train nothing; rank these weights ('all': every weight at hand) by nearest neighbours and a linear classifier on
    their features, on files held out of training, measure the best on the test files, and write RUN/probe.json."""
    record: bool = False
    """Keep the figures in the folder of the weights too (transfer.json), for the table of README."""
    messages: Literal['text', 'json', 'quiet'] = 'text'
    """What is printed: lines and a progress bar, a JSON object a line, or errors alone."""
    traceback: bool = False
    """Show where an error arose."""


def help_text() -> str:
    """What --help shows: the options by purpose, each with the docstring of its field."""
    fields: dict[str, tuple[Any, str]] = {}
    for owner in (FinetuneConfig, Command):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        text = {a.target.id: b.value.value for a, b in itertools.pairwise(body)
                if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
        fields |= {f.name: (f, text[f.name]) for f in dataclasses.fields(owner) if f.name in text}
    lines = [__doc__.strip()]
    for purpose, names in PURPOSES.items():
        lines += ['', f'{purpose}:']
        for field, text in map(fields.__getitem__, names):
            name, default, kind = field.name.replace('_', '-'), field.default, str(field.type)
            choices = '|'.join(re.findall(r"'([^']+)'", kind)) if kind.startswith('Literal') else ''
            value = f' {choices or name.rpartition("-")[2].upper()}' + ' ...' * kind.startswith('tuple')
            shown = ' '.join(map(str, default)) if isinstance(default, tuple) else 'yes' if default is True else default
            told = shown not in ('', False, math.inf, str(SAMPLE))
            lines += [f'  --{"[no-]" * (default is True)}{name}{value * (kind != "bool")}',
                      *textwrap.wrap(' '.join(text.split()) + f' (default: {shown})' * told, 112,
                                     initial_indent=' ' * 6, subsequent_indent=' ' * 6)]
    return '\n'.join(lines)


def defaults(argv: Sequence[str]) -> Command:
    """What is meant where nothing is said: with --resume, what the run was started with."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('--out', type=Path, default=Command.out)
    parser.add_argument('--resume', action='store_true')
    known, _ = parser.parse_known_args(argv)
    runs = [known.out, *sorted(known.out.glob('seed-*'), key=lambda p: (len(p.name), p.name))]  # of several the first
    recipe = next((run / 'recipe.json' for run in runs if (run / 'recipe.json').is_file()), None)
    if not (known.resume and recipe):
        return Command()
    return Command(config_of(recipe, 'finetune', FinetuneConfig))


def run(command: Command) -> dict[str, Any] | list[dict[str, Any]] | None:
    """Do what the command says, and return its figures."""
    config, text = command.config, command.messages == 'text'
    machine = Machine(
        command.device, command.workers, command.image_memory, command.on_bad, command.download, command.resume,
        command.time_budget, None if text else False)

    def emit(row: dict[str, Any]) -> None:
        if command.messages == 'json':
            print(json.dumps(row), flush=True)

    main = os.environ.get('RANK', '0') == '0'
    if command.probe and os.environ.get('WORLD_SIZE', '1') != '1':
        raise ValueError('--probe runs in one process; start it without torchrun')
    if command.record:
        for name in command.probe or [config.model]:
            if name != 'all':
                transfer_folder(name)  # before hours are spent
    if command.probe:
        check_place(Path(command.out))
        kept = {}

        def write(rows: Iterable[dict[str, Any]]) -> None:
            Path(command.out).mkdir(parents=True, exist_ok=True)
            atomic_write(Path(command.out) / 'probe.json', json.dumps(list(rows), indent=2) + '\n')

        def keep(row: dict[str, Any]) -> None:  # one at a time: the next weights may be damaged
            kept[row['weights'], row['way']] = row
            emit(row)
            write(kept.values())

        rows = probe(command.probe, command.data, config, command.seeds, command.record, machine, keep)
        write(rows)
        for row in rows if command.record else ():
            record_transfer(row['weights'], [row])
        return rows
    result = finetune_seeds(config, command.data, command.out, command.seeds, machine, emit)
    if result is None:
        return None
    if command.record and main:
        record_transfer(config.model, [{k: v for k, v in result.items() if k != 'runs'}])
    return result if command.seeds > 1 else result['runs'][0]


def show(result: dict[str, Any] | list[dict[str, Any]], command: Command) -> None:
    """Print the figures for people."""
    if isinstance(result, list):
        show_probe(result, command)
    elif 'runs' in result:
        for key in ('top1', 'mean_per_class', 'ece'):
            print(f"{key:15} {spread(result[key])} %, {result['seeds']} seeds")
    else:
        tested = f"photographs of {printable(result['tested_on'])}" if result['tested_on'] else 'test photographs'
        print(f"accuracy {result['top1']:.1f} % on {result['images']} {tested}, mean of the classes "
              f"{result['mean_per_class']:.1f} %; see {printable(command.out)}/report.html")


def spread(score: dict[str, Any]) -> str:
    """Mean, and the standard deviation where there are several values."""
    return f"{score['mean']:.1f}" + (f" ± {score['std']:.1f}" if len(score['values']) > 1 else '')


def show_probe(rows: list[dict[str, Any]], command: Command) -> None:
    """Print the ranking, and the command that trains the best weights."""
    print(f"{'accuracy, % (mean of the classes, %)':46}{'held-out files':>26}{'test files':>26}  seconds")
    for row in rows:
        held_out, test = (f"{spread(scores['top1'])} ({spread(scores['mean_per_class'])})" if 'top1' in scores else '-'
                          for scores in (row['holdout'], row))
        print(f"{printable(row['weights']):26} {row['input_size']:>3} px  {row['way']:13}{held_out:>26}{test:>26} "
              f"{row['seconds']:8.0f}")
    config = dataclasses.replace(command.config, model=rows[0]['weights'])
    flags = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ('model', 'split', 'holdout', 'input_size', 'nested', 'seed') and value != field.default:
            name = '--' + field.name.replace('_', '-')
            flags += [name] if value is True else [name, str(value)]
    print(f"\nThe best by held-out files is {rows[0]['weights']}. Train all its layers (or, with --train head, the "
          f"classifier alone, in seconds):\n\n"
          f"  {shlex.join(['python', 'scripts/finetune.py', '--data', command.data, *flags, '--out', command.out])}")


@contextlib.contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """A cluster's way to stop a job ends it as a person's does."""
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@reports_errors
def main(argv: Sequence[str]) -> int:
    main_process = os.environ.get('RANK', '0') == '0'
    if {'-h', '--help'} & set(argv):
        print(help_text())
        return 0
    command = tyro.cli(Command, args=argv, prog='finetune.py', description=__doc__, default=defaults(argv))
    logging.basicConfig(handlers=[terminal_handler()], force=True, level=logging.INFO)
    logging.getLogger().setLevel(logging.INFO if command.messages == 'text' and main_process else logging.ERROR)
    logging.getLogger('timm').setLevel(logging.WARNING)
    try:
        with sigterm_as_ctrl_c():
            result = run(command)
    except KeyboardInterrupt:
        saved = holds_checkpoint(command.out) and not command.probe
        print('stopped; go on with --resume' if saved else 'stopped before anything was saved; to begin again, run the '
              'same command', file=sys.stderr)
        return 130
    if result is None:
        return 130
    if main_process and command.messages == 'json' and isinstance(result, dict):
        print(json.dumps(result), flush=True)
    if main_process and command.messages == 'text':
        show(result, command)
    return 0


if __name__ == '__main__':
    sys.exit(main())
