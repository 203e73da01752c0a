"""Speed of fine-tuning: the classifier alone, and all layers with the data loader."""
from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import wrn_timm
from wrn_timm.train.accelerator import make_accelerator
from wrn_timm.train.finetune_loop import Finetuner
from wrn_timm.train.machine import Machine
from wrn_timm.train.measure import make_loader
from wrn_timm.train.prepare import build_model, prepare_split, preprocessing, training_set
from wrn_timm.train.run import RunControl, RunDir

from .measuring import Case, Command, summarise, without


def head(command: Command) -> Iterator[Case]:
    """Seconds to train only the classifier without augmentation: backbone run every epoch, or features cached."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (('backbone every epoch', False), ('features cached', True)):
            config = dataclasses.replace(command.config, train='head', cache=cache, augment=False)
            metrics = wrn_timm.finetune(config, command.photographs, Path(folder) / name, Machine(
                command.device, command.workers, command.image_memory, progress=False))
            rows.append({'name': name, 'seconds': metrics['train_seconds'], 'accuracy': metrics['mean_per_class']})
    for row in rows:
        row |= {'ratio': rows[0]['seconds'] / row['seconds'], 'points': row['accuracy'] - rows[0]['accuracy']}
    yield Case(f"{config.model}, {metrics['train_files']} photographs at {metrics['input_size']} px, {config.epochs} "
               f"epochs", rows)


def finetune(command: Command) -> Iterator[Case]:
    """Images/s of fine-tuning: loader alone, steps alone on loaded images, and both as they run after the first epoch.

    `share_of_slower` is the speed of both relative to the slower of the two, `share_of_serial` relative to running them
    one after the other.
    """
    config = dataclasses.replace(command.config, holdout=0., epochs=1)
    accelerator = make_accelerator(config, command.device)
    model = build_model(config)
    split, _ = prepare_split(config, command.photographs)
    model.reset_classifier(len(split.train.classes))
    model.to(accelerator.device, memory_format=torch.channels_last)
    transforms, cfg = preprocessing(config, model, 'benchmark', split.train.classes)
    files = training_set(config, split, transforms['train'], cfg['input_size'][-1], command.image_memory * 1e9)
    batch = min(config.batch_size, len(files))
    ready = [files[i] for i in range(min(len(files) - len(files) % batch, 16 * batch))]

    def load_all() -> float:
        began, seen = time.perf_counter(), 0
        for _, labels, *_ in make_loader(files, batch, command.workers, shuffle=True, drop_last=True):
            seen += len(labels)
        return (time.perf_counter() - began) / seen

    def fit_all(dataset: Any, workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            control = RunControl(RunDir(Path(folder) / 'run', {}))
            machine = Machine(command.device, workers, progress=False)
            fitted = Finetuner(model, config, accelerator, control, machine).fit(dataset)
        return 1 / fitted.history[-1]['images_per_second']

    runs = {'loader and steps': lambda: fit_all(files, command.workers), 'loader alone': load_all,
            'steps alone': lambda: fit_all(ready, 0)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(command.rounds + 1):
        for name, run in runs.items():
            took = run()
            if i:  # the first round warms up
                seconds[name].append(took)
    rows = without('ms', summarise(seconds))
    both, loader, steps = seconds.values()
    rows[0] |= {'share_of_slower': statistics.median(map(lambda b, *parts: max(parts) / b, both, loader, steps)),
                'share_of_serial': statistics.median(map(lambda b, *parts: sum(parts) / b, both, loader, steps))}
    yield Case(f"{config.model}, {len(files)} photographs at {cfg['input_size'][-1]} px, batch {batch}, "
               f"{command.workers} workers", rows)
