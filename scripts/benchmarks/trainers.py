"""Fine-tune the same weights on the same split with several libraries' trainers, and evaluate all of them alike.

    pip install fastai ultralytics
    python scripts/benchmark.py trainers --data caltech101:DIR --split random30 --input-size 32 --epochs 10 --seeds 3

Contestants are `wrn-timm finetune`, timm's own `train.py` (a checkout of timm in $TIMM_SOURCE), fastai's `fine_tune`
and ultralytics' classification trainer. Each gets the same folders `train/`, `val/` and `test/`, weights, input size,
epochs and batch size. All other settings are the trainer's defaults, including how the epoch is chosen by `val/`.
`test/` is evaluated once, with the contestant's own preprocessing.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader

from wrn_timm.cli.common import Options, reports_errors
from wrn_timm.cli.options import option, parse
from wrn_timm.data.bundled import sample
from wrn_timm.data.folders import examine, list_folder
from wrn_timm.data.images import ImageFiles
from wrn_timm.data.splits import data_name, list_source, make_split
from wrn_timm.files import write_json
from wrn_timm.recipes import FinetuneConfig
from wrn_timm.train.finetune import finetune
from wrn_timm.train.machine import Machine, environment
from wrn_timm.train.measure import predict_logits
from wrn_timm.train.metrics import classification_metrics, summarise
from wrn_timm.weights import eval_transform, open_model

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(Options):
    """Options of the comparison."""
    trainers: tuple[str, ...] = option((), 'TRAINER', positional=True)
    """wrn_timm, timm, fastai, ultralytics; by default all."""
    data: str = str(sample())
    """Folder of class folders, FILE.csv or caltech101:DIR, as for finetune; the default is the bundled sample."""
    split: str = '70-30'
    """Split protocol, as for finetune."""
    model: str = 'wrn16_1.cifar10'
    """timm name of the model, with tag."""
    input_size: int = 64
    """Side of the square input, in pixels."""
    epochs: int = 30
    """Passes over the training files."""
    batch_size: int = 16
    """Files per step."""
    seeds: int = 1
    """Number of seeds, each with its own split and run."""
    out: str = ''
    """JSON file to write the figures to."""

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.trainers) - set(TRAINERS):
            raise ValueError(f'trainer {sorted(unknown)[0]} is unknown; choose from {", ".join(TRAINERS)}')


Predict = Callable[[ImageFiles], torch.Tensor]  # logits (N, classes) of photographs


def reading(model: nn.Module, transform: Any) -> Predict:
    """Return a function from photographs to logits, with `transform` as preprocessing."""
    return lambda files: predict_logits(model, functools.partial(DataLoader, files.as_dataset(transform)))[0]


def with_wrn_timm(command: Command, data: Path, out: Path, seed: int) -> Predict:
    config = FinetuneConfig(model=command.model, input_size=command.input_size, epochs=command.epochs,
                            batch_size=command.batch_size, seed=seed)
    finetune(config, data, out, Machine('cpu', progress=False))
    model = open_model(str(out / 'best'))
    return reading(model, eval_transform(model))


def with_timm(command: Command, data: Path, out: Path, seed: int) -> Predict:
    size = ('3', str(command.input_size), str(command.input_size))
    classes = len(list((data / 'train').iterdir()))
    options = {
        'device-modules': 'wrn_timm', 'data-dir': data, 'train-split': 'train', 'val-split': 'val', 'device': 'cpu',
        'model': command.model, 'num-classes': classes, 'epochs': command.epochs, 'batch-size': command.batch_size,
        'seed': seed, 'workers': 1, 'output': out, 'experiment': 'run'}
    script = [sys.executable, Path(os.environ['TIMM_SOURCE']) / 'train.py', '--pretrained', '--no-prefetcher']
    subprocess.run(
        [*script, *(str(word) for k, v in options.items() for word in (f'--{k}', v)), '--input-size', *size],
        check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    model = timm.create_model(command.model, num_classes=classes, checkpoint_path=str(out / 'run/model_best.pth.tar'))
    data_config = resolve_model_data_config(model, {'input_size': tuple(map(int, size))})
    return reading(model, create_transform(**data_config))


def with_fastai(command: Command, data: Path, out: Path, seed: int) -> Predict:
    from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, set_seed, vision_learner

    set_seed(seed)
    size = command.input_size
    loaders = ImageDataLoaders.from_folder(
        data, train='train', valid='val', seed=seed, item_tfms=Resize(2 * size), batch_tfms=aug_transforms(size=size),
        bs=command.batch_size, num_workers=0, device='cpu')
    learner = vision_learner(loaders, command.model, path=out)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(command.epochs)

    def predict(files: ImageFiles) -> torch.Tensor:
        with learner.no_bar():
            return learner.get_preds(dl=loaders.test_dl([Path(p) for p in files.paths]))[0].log()

    return predict


def with_ultralytics(command: Command, data: Path, out: Path, seed: int) -> Predict:
    from ultralytics.data.augment import classify_transforms
    from ultralytics.models.yolo.classify import ClassificationTrainer
    from ultralytics.nn.tasks import ClassificationModel

    class Model(ClassificationModel):
        """Wrap a timm network as an ultralytics model, whose input is not normalised."""

        def __init__(self, classes: int):
            nn.Module.__init__(self)
            self.model = nn.Sequential(timm.create_model(command.model, pretrained=True, num_classes=classes))
            self.stride, self.yaml = torch.ones(1), {}
            for name in ('mean', 'std'):
                self.register_buffer(name, torch.tensor(self.model[0].default_cfg[name])[:, None, None])

        def predict(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return self.model((x - self.mean) / self.std)

    best = {}

    class Trainer(ClassificationTrainer):
        def save_model(self) -> None:
            if self.best_fitness == self.fitness:
                best.update({k: v.clone() for k, v in self.ema.ema.state_dict().items()})

        def final_eval(self) -> None:
            pass

    trainer = Trainer(overrides=dict(
        model='yolo11n-cls.yaml', data=str(data), epochs=command.epochs, imgsz=command.input_size,
        batch=command.batch_size, device='cpu', workers=0, plots=False, verbose=False, seed=seed, project=str(out),
        exist_ok=True, val=True))
    model = trainer.model = Model(trainer.data['nc'])
    trainer.train()
    model.load_state_dict(best)
    return reading(model.float(), classify_transforms(command.input_size))


TRAINERS: dict[str, Callable[[Command, Path, Path, int], Predict]] = {
    'wrn_timm': with_wrn_timm, 'timm': with_timm, 'fastai': with_fastai, 'ultralytics': with_ultralytics}


@contextlib.contextmanager
def folders(command: Command, seed: int) -> Iterator[Path]:
    """Write the split as temporary folders `train/`, `val/` and `test/` with links to the files."""
    split = make_split(examine(list_source(command.data)), command.split, 0.1, seed)
    with tempfile.TemporaryDirectory() as root:
        for part, files in (('train', split.train), ('val', split.holdout), ('test', split.test)):
            for i, (path, label) in enumerate(zip(files.paths, files.labels, strict=True)):
                link = Path(root, part, files.classes[label], f'{i}{Path(path).suffix}')
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(Path(path).resolve())
        yield Path(root)


def compare(command: Command) -> dict[str, Any]:
    """Train with each contestant, and return the metrics of all."""
    rows = []
    for name in command.trainers or TRAINERS:
        runs, seconds = [], []
        for seed in range(command.seeds):
            with folders(command, seed) as data, tempfile.TemporaryDirectory() as out:
                random.seed(seed), torch.manual_seed(seed)
                began = time.monotonic()
                predict = TRAINERS[name](command, data, Path(out), seed)
                seconds.append(time.monotonic() - began)
                test = list_folder(data).test
                runs.append(classification_metrics(predict(test), torch.tensor(test.labels), test.classes))
            print(f'{name}, seed {seed}: {runs[-1]["top1"]:.2f} %, mean of the classes '
                  f'{runs[-1]["mean_per_class"]:.2f} %, {seconds[-1]:.0f} s', flush=True)
        rows.append({'trainer': name, 'seconds': summarise(seconds), **{
            key: summarise([run[key] for run in runs]) for key in ('top1', 'mean_per_class')}})
    settings = {k: v for k, v in dataclasses.asdict(command).items() if k not in ('trainers', 'data', 'out')}
    versions = {name: version(name) for name in ('fastai', 'ultralytics') if name in (command.trainers or TRAINERS)}
    return {**settings, 'data': data_name(command.data), 'rows': rows, 'environment': environment('cpu') | versions}


@reports_errors
def main(argv: Sequence[str]) -> int:
    command, _ = parse(argv, ('benchmark', __doc__), Command)
    logging.basicConfig(level=logging.ERROR)
    names = command.trainers or TRAINERS  # check for them before minutes are spent
    if absent := [n for n in ('fastai', 'ultralytics') if n in names and not find_spec(n)]:
        raise ValueError(f'not installed: {", ".join(absent)}; pip install {" ".join(absent)}, or name other trainers')
    if 'timm' in names and not Path(os.environ.get('TIMM_SOURCE', ''), 'train.py').is_file():
        raise ValueError('set TIMM_SOURCE to a checkout of timm, whose package lacks train.py, or name other trainers')
    result = compare(command)
    if command.out:
        write_json(Path(command.out), result)
    return 0
