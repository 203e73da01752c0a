"""Training a detector on photographs with boxes: from a folder to weights, figures and a report."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2
from tqdm import tqdm

from ..data.boxes import BoxedImages, BoxScan, data_folder, divide, read_box_split, read_boxes, write_box_split
from ..data.folders import some
from ..detection import build_detector, export_detector, open_detector
from ..detector_card import finish_detector_folder
from ..files import atomic_write, make_folder, write_json
from ..names import printable
from ..recipes import TORCHVISION_DETECTOR, DetectConfig
from ..weights import find, open_model
from .detector_report import write_detector_report
from .find_objects import AS_TENSOR
from .machine import Machine, fused, in_float32, kept_random_state, resolve_precision
from .measure import begin_worker, largest_batch, out_of_memory
from .measure_boxes import Target, detection_metrics, predict_boxes
from .probe import summarise
from .run import (
    RunControl,
    RunDir,
    begun_with,
    check_place,
    config_of,
    environment,
    holds_checkpoint,
    planned_runs,
    progress_bar,
)

__all__ = ['asked_before', 'train_detector', 'train_detectors']

_logger = logging.getLogger(__name__)

_IMAGENET = ('wrn18_1', 'wrn50_2')
_CIFAR = 'wrn16_2.cifar100'
_ASKED = 'settings.json'  # of several seeds
_SHOWN = 6000  # photographs that a detector sees, with repetitions, where the number of epochs is left open
OnEpoch = Callable[[dict[str, float]], None]


def _loader(dataset: Dataset, batches: Sequence[list[int]], machine: Machine, seed: int) -> DataLoader:
    return DataLoader(  # without a generator of its own it would draw from the one whose state a checkpoint keeps
        dataset, batch_sampler=batches, num_workers=machine.workers, collate_fn=_columns, worker_init_fn=begin_worker,
        pin_memory=torch.device(machine.device).type == 'cuda', generator=torch.Generator().manual_seed(seed))


def _drawn_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """The images of each step of an epoch; a last step that is not full is left out if others are."""
    order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    return list(BatchSampler(order, batch_size, drop_last=n >= batch_size))


def _columns(rows: list[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    images, targets = zip(*rows, strict=True)
    return list(images), [{k: v.as_subclass(torch.Tensor) for k, v in t.items()} for t in targets]


@kept_random_state()
def train_detector(
        config: DetectConfig,
        data: str | Path,
        out: str | Path,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: OnEpoch | None = None,
) -> dict[str, Any] | None:
    """Train on `data` and leave a run directory with weights, metrics and a report.

    On a CPU a resumed run ends bit for bit as if it had not been stopped, from the middle of an epoch too; but with
    `workers` the rest of that epoch's photographs are changed otherwise.

    Args:
        config: Settings of the training.
        data: Folder or file as `read_boxes` reads it.
        out: Run directory.
        machine: Device, workers, time budget...
        on_epoch: Called with each epoch's line of the history.

    Returns:
        The metrics on the test split, as written to `metrics.json`, or None if the run was stopped (by the budget,
        SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite.
        RuntimeError: A step does not fit into memory.
        What `read_boxes`, `divide`, `fpn_backbone` and `RunDir` raise.
    """
    started, deadline, out = time.monotonic(), machine.deadline(), Path(out)
    if not machine.resume:
        RunDir.check(out, {})
        check_place(out)
    read = _read(config, data, out, machine)
    detector, config = _prepared(_kept(config, out, machine), read, out, machine)
    settings = {'detect': config, 'data': read.name, 'classes': read.train.classes}
    run = RunDir(out, settings, machine.resume, device=machine.device)
    atomic_write(out / 'split.csv', write_box_split(read.train, read.test, data_folder(data)))
    loop = _Loop(detector, read.train, config, RunControl(run, deadline), machine, on_epoch)
    if machine.resume and (saved := run.load_checkpoint()):
        loop.load_state_dict(saved)
        started -= loop.progress.seconds
        del saved
    run.log('%d classes, %d photographs to train on, %d to test on (split: %s)', len(read.train.classes),
            len(read.train), len(read.test), read.split)
    run.log('%s on %s%s at %d px on %s: %d epochs, batch size %d', config.detector, config.model,
            '' if config.pretrained or config.model == TORCHVISION_DETECTOR else ' (random weights)',
            config.image_size, machine.device, config.epochs, config.batch_size)
    if not loop.run():
        return None
    export_detector(detector, out / 'weights', json.loads(run.recipe_file.read_text(encoding='utf-8')))
    return _test(loop, read, started)


@dataclasses.dataclass(frozen=True)
class _Data:
    """What a detector is trained and tested on.

    Attributes:
        source: As it was named.
        scan: What is there.
        train: Images to train on.
        test: Images to test on.
        split: How they were told apart.
        leaks: Files to train on and files to test on that have the same content.
    """
    source: str
    scan: BoxScan
    train: BoxedImages
    test: BoxedImages
    split: str
    leaks: list[tuple[str, str]]

    @property
    def name(self) -> str:
        return printable(data_folder(self.source).resolve().name)


def _read(config: DetectConfig, data: str | Path, out: Path, machine: Machine) -> _Data:
    """Read the data and divide it, as a run that is resumed did."""
    scan = read_boxes(data, machine.on_bad)
    for line in scan.summary():
        _logger.info('%s', line)
    train, test, split = divide(scan, config.train_split, config.test_split, config.seed)
    if machine.resume and (out / 'split.csv').is_file():
        train, test = read_box_split(out / 'split.csv', scan, data_folder(data))
    for part, what in ((train, 'train'), (test, 'test')):
        if not any(map(len, part.labels)):
            raise ValueError(f'there is no box on the {len(part)} images to {what} on (split: {split}); name other '
                             f'parts by --train-split and --test-split')
    return _Data(str(data), scan, train, test, split, _leaks(scan, train, test))


def _test(loop: _Loop, data: _Data, started: float) -> dict[str, Any]:
    """Measure the exported detector on the test images, and write all that tells of it."""
    folder, machine, config = loop.control.run.path, loop.machine, loop.config
    detector = open_detector(folder, machine.device)
    in_order = list(BatchSampler(range(len(data.test)), config.batch_size, drop_last=False))
    loader = _loader(data.test.as_dataset(AS_TENSOR, config.image_size), in_order, machine, config.seed)
    with in_float32():
        found, reduced = predict_boxes(detector, loader, machine.device, machine.progress)
    predictions = [f | {'boxes': f['boxes'] * target['scale']} for f, target in zip(found, reduced, strict=True)]
    targets = [{'boxes': boxes, 'labels': labels} for boxes, labels in zip(
        data.test.boxes, data.test.labels, strict=True)]
    measured, curves = detection_metrics(predictions, targets, data.test.classes)
    metrics = measured | {
        'dataset': data.name, 'split': data.split, 'left_out': data.scan.bad, 'leaks': data.leaks,
        'train_images': len(data.train), 'epochs': config.epochs, 'image_size': config.image_size,
        'train_seconds': round(loop.progress.seconds, 1), 'seconds': round(time.monotonic() - started, 1),
        'environment': environment(machine.device), 'measured_by': 'wrn-timm detect'}
    write_detector_report(folder, metrics, curves, data.test, predictions,
                          {'data': data.source, 'summary': data.scan.summary()})
    for file in ('history.csv', 'curves.png'):
        atomic_write(folder / 'weights' / file, functools.partial(shutil.copyfile, folder / file))
    finish_detector_folder(folder / 'weights', metrics)
    write_json(folder / 'metrics.json', metrics)  # last, because it tells that the run is finished
    return metrics


def train_detectors(
        config: DetectConfig,
        data: str | Path,
        out: str | Path,
        seeds: int = 1,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: OnEpoch | None = None,
) -> dict[str, Any] | None:
    """Train `seeds` detectors, from `config.seed` on: in `out` if it is one, else in `out/seed-N`.

    Several runs leave `out/metrics.json` with the same as is returned, but `runs`.

    Returns:
        `dataset`, `seeds`, `seconds` of all, `runs` (their metrics), and of `map`, `map_50` and `map_75` the `mean`,
        the sample standard deviation `std` and the `values`. None if a run was stopped.

    Raises:
        What `train_detector` raises; the runs that ended are kept. With `resume` they are passed by.
    """
    runs, deadline = [], machine.deadline()
    planned = planned_runs(config, out, seeds, machine.resume)
    for _, folder, resume in planned if seeds > 1 else ():  # of all, before what was asked for is written anew
        if not resume:
            RunDir.check(folder, {})
    if seeds > 1 and not machine.resume:
        make_folder(Path(out))
        write_json(Path(out) / _ASKED, {'detect': dataclasses.asdict(config)})
    for own, folder, resume in planned:
        if seeds > 1 and resume and (folder / 'metrics.json').is_file():
            runs.append(json.loads((folder / 'metrics.json').read_text(encoding='utf-8')))
            continue
        left = dataclasses.replace(machine, resume=resume, time_budget=max(0., deadline - time.monotonic()))
        metrics = train_detector(own, data, folder, left, on_epoch)
        if metrics is None:
            return None
        runs.append(metrics)
    summary = {'dataset': runs[0]['dataset'], 'seeds': seeds, 'seconds': round(sum(run['seconds'] for run in runs), 1),
               **{key: summarise([run[key] for run in runs]) for key in ('map', 'map_50', 'map_75')}}
    if seeds > 1:
        write_json(Path(out) / 'metrics.json', summary)
    return {**summary, 'runs': runs}


def asked_before(out: Path) -> DetectConfig:
    """The settings that a run was started with, or, as they were asked for, those of runs of several seeds.

    Raises:
        What `begun_with` raises.
    """
    asked = out / _ASKED
    return config_of(asked, 'detect', DetectConfig) if asked.is_file() else begun_with(out, 'detect', DetectConfig)


def _leaks(scan: BoxScan, train: BoxedImages, test: BoxedImages) -> list[tuple[str, str]]:
    """Files to train on and files to test on that have the same content."""
    sides = {path: side for side, part in enumerate((train, test)) for path in part.paths}
    leaks = [(a, b) for twins in scan.twins for a in twins for b in twins if (sides.get(a), sides.get(b)) == (0, 1)]
    if leaks:
        _logger.warning('%d photographs to test on have the content of photographs to train on: %s', len(leaks),
                        some([f'{b} = {a}' for a, b in leaks], '; '))
    return leaks


def _kept(config: DetectConfig, out: Path, machine: Machine) -> DetectConfig:
    """The settings, with what a run that is resumed found for those that were left open."""
    if not (machine.resume and (out / 'recipe.json').is_file()):
        return config
    found = config_of(out / 'recipe.json', 'detect', DetectConfig)
    if config.model == 'auto':
        config = dataclasses.replace(config, model=found.model, pretrained=found.pretrained)
    left_open = ('image_size', 'anchor_scale', 'epochs', 'batch_size', 'out_channels', 'max_objects')
    return dataclasses.replace(
        config, **{name: getattr(found, name) for name in left_open if not getattr(config, name)})


def _prepared(config: DetectConfig, data: _Data, out: Path, machine: Machine) -> tuple[nn.Module, DetectConfig]:
    """The detector before training, and the settings with what was left open chosen."""
    device, any_batch = torch.device(machine.device), not config.batch_size
    resumed = machine.resume and holds_checkpoint(out)  # which has all weights
    if config.model == 'auto':
        config = dataclasses.replace(config, model=_found_model(config, device))
    config = _resolved(config, data.scan, data.train)
    torch.manual_seed(config.seed)
    try:
        detector = build_detector(config, data.train.classes, config.pretrained and not resumed)
    except RuntimeError as e:  # the weights are not there, or are damaged
        raise RuntimeError(f'{e} --no-pretrained starts from random weights.' if config.pretrained else str(e)) from e
    detector.to(device, memory_format=torch.channels_last)
    if any_batch and device.type == 'cuda':
        config = dataclasses.replace(config, batch_size=_fitting_batch(detector, config, device))
        torch.manual_seed(config.seed)
    return detector, config


def _found_model(config: DetectConfig, device: torch.device) -> str:
    """The backbone where none is named: one with ImageNet weights if they can be had, else one with CIFAR weights."""
    if not config.pretrained:
        return _CIFAR.partition('.')[0]
    names = _IMAGENET if device.type == 'cpu' else _IMAGENET[::-1]
    for arch in names:
        if here := next((name for name in timm.list_pretrained(f'{arch}.*') if find(name)), None):
            return here
    name = f'{names[0]}.{timm.get_pretrained_cfg(names[0]).tag}'
    try:
        open_model(name)
    except (OSError, RuntimeError) as e:
        _logger.warning(
            '%s\nThere are no ImageNet weights, so the backbone is %s, whose weights are of 32-pixel images. ImageNet '
            'weights of %s make better detectors: put a weights folder of that name into a folder named by '
            '$WRN_TIMM_WEIGHTS, or connect to the Hub', e, _CIFAR, ' or '.join(names))
        return _CIFAR
    return name


def _resolved(config: DetectConfig, scan: BoxScan, train: BoxedImages) -> DetectConfig:
    """The settings with what fits the data where they were left open."""
    longest = statistics.median(max(size) for size in scan.sizes.elements())
    if config.model == TORCHVISION_DETECTOR:
        config = dataclasses.replace(config, pretrained=False, out_channels=256)
    config = dataclasses.replace(
        config, image_size=config.image_size or min(640, max(320, 32 * round(longest / 32))),
        epochs=config.epochs or min(60, max(12, round(_SHOWN / len(train)))),
        batch_size=config.batch_size or min(8, max(2, len(train) // 40)),
        out_channels=config.out_channels or _fitting_channels(config.model),
        max_objects=config.max_objects or max(100, 2 * max(map(len, train.boxes))))
    if config.anchor_scale:
        return config
    boxes = torch.cat(train.boxes)
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt() * config.image_size / longest
    # the first level's anchors are as large as the smaller boxes, and the last one's 16 times that
    scale = float(sides.quantile(0.1)) / (4 if config.detector == 'faster_rcnn' else 8) if len(sides) else 8.
    return dataclasses.replace(config, anchor_scale=round(min(8., max(2., scale)), 1))


def _fitting_channels(model: str) -> int:
    """Channels of the pyramid for a backbone; a name that is not known is refused where the detector is made."""
    if not timm.is_model(model):
        return 256
    with torch.device('meta'):
        return 64 if timm.create_model(model).feature_info[-1]['num_chs'] <= 256 else 256


def _fitting_batch(detector: nn.Module, config: DetectConfig, device: torch.device) -> int:
    """The batch size, halved until a step fits the device's memory.

    Raises:
        RuntimeError: Not even one image fits.
    """
    # on the CPU, so that the copy takes no memory from the trial
    before = {k: v.to('cpu', copy=True) for k, v in detector.state_dict().items()}
    optimizer, side = _optimizer(detector, config), config.image_size
    corners = torch.rand(20, 2, device=device) * side / 2
    target = {'boxes': torch.cat([corners, corners + side / 4], 1),
              'labels': torch.ones(20, dtype=torch.int64, device=device)}

    def step(n: int) -> None:
        for _ in range(2):  # the second holds the optimizer's state, which the first makes, beside the activations
            _step(detector.train(), optimizer, list(torch.rand(n, 3, side, side)), [target] * n, device)

    with _precision(detector, config, device):
        found = largest_batch(step, config.batch_size)
    detector.zero_grad(set_to_none=True)
    detector.load_state_dict(before)
    if not found:
        raise RuntimeError(f'not even one image of {side} px fits into the memory of {device}; choose a smaller '
                           f'--image-size or --model')
    return found


@dataclasses.dataclass
class _Progress:
    """How far a run is, and what its records say."""
    epoch: int = 0
    step: int = 0  # within the epoch
    total: float = 0.  # this epoch's loss
    seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


class _Loop:
    """The epochs of a run, which can stop after any step."""

    def __init__(
            self,
            detector: nn.Module,
            train: BoxedImages,
            config: DetectConfig,
            control: RunControl,
            machine: Machine,
            on_epoch: OnEpoch | None = None,
    ):
        self.detector, self.train, self.config, self.control, self.machine = detector, train, config, control, machine
        self.on_epoch = on_epoch
        self.device = torch.device(machine.device)
        self.steps = max(1, len(train) // config.batch_size)
        self.optimizer = _optimizer(detector, config)
        self.scheduler = CosineLRScheduler(
            self.optimizer, t_initial=config.epochs * self.steps, t_in_epochs=False, warmup_t=config.warmup_steps,
            warmup_lr_init=config.lr / 100)
        self.progress = _Progress()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.detector.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        torch.set_rng_state(saved['rng'])
        self.progress = _Progress(**{f.name: saved[f.name] for f in dataclasses.fields(_Progress)})

    def run(self) -> bool:
        """Train to the end; False if the run stopped before it."""
        progress, epochs = self.progress, self.config.epochs
        done = progress.epoch * self.steps + progress.step
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.control)
            self.control.run.log('from epoch %d, step %d', progress.epoch, progress.step)
            bar = stack.enter_context(progress_bar(epochs * self.steps, done, self.machine.progress))
            stack.enter_context(_precision(self.detector, self.config, self.device))
            while progress.epoch < epochs:
                reason = self._epoch(bar)
                if progress.step == self.steps:
                    self._end_epoch()
                self.control.save({
                    'model': self.detector.state_dict(), 'optimizer': self.optimizer.state_dict(),
                    'rng': torch.get_rng_state(), **vars(progress)}, progress.history)
                if reason and progress.epoch < epochs:
                    self.control.log_stop(reason)
                    return False
        self.control.run.write_history(progress.history)
        return True

    def _epoch(self, bar: tqdm) -> str:
        """Train to the end of the epoch, or until the run has to stop; returns why."""
        progress, config = self.progress, self.config
        seed, began, reason = config.seed * 100_003 + progress.epoch, time.monotonic(), ''
        batches = _drawn_batches(len(self.train), config.batch_size, seed)[progress.step:]
        augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), AS_TENSOR])
        self.detector.train()
        bar.set_description(f'epoch {progress.epoch + 1}/{config.epochs}')
        dataset = self.train.as_dataset(augment, config.image_size)
        for images, targets in _loader(dataset, batches, self.machine, seed):
            self.scheduler.step_update(progress.epoch * self.steps + progress.step)
            progress.total += self._loss(images, targets)
            progress.step += 1
            bar.update()
            bar.set_postfix(loss=f'{progress.total / progress.step:.3f}')
            if reason := self.control.reason_to_stop():
                break
        self.control.check_finite(progress.total, 'the loss', progress.epoch + 1)
        progress.seconds += time.monotonic() - began
        return reason

    def _loss(self, images: list[torch.Tensor], targets: list[Target]) -> float:
        """The loss of a batch, after the step against it; memory that is short is an error that says what to do."""
        try:
            return _step(self.detector, self.optimizer, images, targets, self.device)
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            raise RuntimeError(
                f'out of memory on {self.device} at batch size {len(images)} and {self.config.image_size} px; choose '
                f'a smaller {"--batch-size or " * (len(images) > 1)}--image-size') from e

    def _end_epoch(self) -> None:
        progress = self.progress
        loss = progress.total / self.steps
        progress.epoch, progress.step, progress.total = progress.epoch + 1, 0, 0.
        before = progress.history[-1]['seconds'] if progress.history else 0.
        rate = self.steps * self.config.batch_size / max(progress.seconds - before, 1e-9)
        progress.history.append({
            'epoch': progress.epoch, 'lr': self.optimizer.param_groups[0]['lr'], 'train_loss': loss,
            'seconds': round(progress.seconds, 1), 'images_per_second': round(rate, 2)})
        if self.on_epoch:
            self.on_epoch(progress.history[-1])
        self.control.run.log('epoch %2d/%d  loss %.3f  %4.0f s', progress.epoch, self.config.epochs, loss,
                             progress.seconds)


def _optimizer(detector: nn.Module, config: DetectConfig) -> torch.optim.Optimizer:
    return create_optimizer_v2(
        detector, config.opt, lr=config.lr, weight_decay=config.weight_decay, **fused(config.opt))


def _precision(detector: nn.Module, config: DetectConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which the detector is trained in the precision of the settings."""
    in_bfloat16 = resolve_precision(config.precision, device) == 'bf16'
    return _backbone_in_bfloat16(detector, device) if in_bfloat16 else contextlib.nullcontext()


@contextlib.contextmanager
def _backbone_in_bfloat16(detector: nn.Module, device: torch.device) -> Iterator[None]:
    """The features alone in bfloat16: in it, the corners of boxes would be whole pixels off."""
    backbone = detector.backbone
    forward = torch.autocast(device.type, torch.bfloat16)(backbone.forward)
    backbone.forward = lambda images: {name: f.float() for name, f in forward(images).items()}
    try:
        yield
    finally:
        del backbone.forward


def _step(
        detector: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: list[torch.Tensor],
        targets: list[Target],
        device: torch.device,
) -> float:
    """The loss of a batch, after the step against it."""
    losses = detector([image.to(device, non_blocking=True) for image in images],
                      [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in targets])
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(detector.parameters(), 10.)
    optimizer.step()
    return loss.item()
