#!/usr/bin/env python3
"""Measure speed and memory of all contestants side by side in the same run.

    python scripts/benchmark.py                              # every section but trainers, on the bundled data
    python scripts/benchmark.py evaluate latency --models wrn28_10 wrn50_2 --json
    python scripts/benchmark.py int8 --data cifar10:DIR
    python scripts/benchmark.py head finetune --data caltech101:DIR --split random30     # options as for finetune
    python scripts/benchmark.py trainers --help              # accuracy of other libraries' trainers

The ratio on each line is the speed relative to the first line of its case: the median over the rounds, in each of which
every contestant runs once. `matmul` is the rate of computation relative to a large matrix product of the same type;
convolutions can exceed it.
"""
from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import timm
import torch
from benchmarks import finetuning, inference, trainers, training
from benchmarks.measuring import Command, matmul_rate, show

from wrn_timm.cli.common import reports_errors, show_error
from wrn_timm.cli.options import option, parse
from wrn_timm.recipes import FinetuneConfig
from wrn_timm.train.machine import environment

SECTIONS = {f.__name__: f for f in (
    inference.evaluate, inference.int8, training.train, inference.latency, inference.growth, training.scale,
    training.augment, inference.start, finetuning.head, finetuning.finetune)}
SHARED = tuple(f.name for f in dataclasses.fields(Command) if f.name != 'config')


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Command):
    sections: tuple[str, ...] = option((), 'SECTION', positional=True)
    """evaluate, int8, train, latency, growth, scale, augment, start, head, finetune; by default all."""

    def __post_init__(self):
        super().__post_init__()
        for name, known in (('sections', SECTIONS), ('models', timm.list_models('*'))):
            if unknown := [n for n in getattr(self, name) if n.partition('.')[0] not in known]:
                near = ', '.join(known) if name == 'sections' else "timm.list_models('wrn*') lists ours"
                raise ValueError(f'{name}: {unknown[0]} is unknown; {near}')
        if self.rounds < 1 or self.batch < 0 or self.size < 0:
            raise ValueError('rounds must be at least 1, batch and size at least 0')


@reports_errors
def main(argv: Sequence[str]) -> int:
    if argv and argv[0] == 'trainers':
        return trainers.main(argv[1:])
    purposes = {'Options': ('sections', *SHARED),
                'Settings of head and finetune': [f.name for f in dataclasses.fields(FinetuneConfig)]}
    command, config = parse(argv, ('benchmark', __doc__), BenchmarkOptions, FinetuneConfig, purposes=purposes)
    command = dataclasses.replace(command, config=config)
    torch.backends.cudnn.benchmark = command.device == 'cuda'
    if command.device == 'cuda':  # convolutions use TF32, so the matrix product they are compared with does too
        torch.backends.cuda.matmul.allow_tf32 = True
    results: dict[str, list[dict[str, Any]]] = {}
    failed = False
    for name in command.sections or SECTIONS:
        try:
            for case in SECTIONS[name](command):
                results.setdefault(name, []).append(dataclasses.asdict(case))
                if not command.json:
                    show(name, case)
        except Exception as e:  # it must not take the results of the other sections with it
            if '--traceback' in argv or isinstance(e, BrokenPipeError):
                raise
            failed = True
            print(name, end=': ', file=sys.stderr)
            show_error(e)
    about = {'device': command.device, 'threads': torch.get_num_threads(), 'rounds': command.rounds,
             **{f'matmul_gflops_{d}': round(matmul_rate(command.device, getattr(torch, d)) / 1e9, 1)
                for d in command.dtypes}, **environment(command.device)}
    if command.json:
        print(json.dumps({**about, 'sections': results}, indent=2))
    else:
        print('\n' + ', '.join(f'{k} {v}' for k, v in about.items()))
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
