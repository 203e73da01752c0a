"""Train detectors on photographs with boxes, from a folder to weights, metrics and a report."""
from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import BatchSampler

from ..data.boxes import BoxedImages, BoxScan, data_folder, divide, read_box_split, read_boxes, write_box_split
from ..detection import build_detector, export_detector, open_detector
from ..detector_card import finish_detector_folder
from ..files import atomic_write, make_folder, write_json
from ..names import counted, printable, some
from ..recipes import TORCHVISION_DETECTOR, DetectConfig
from ..weights import find, open_model
from .detector_loop import DetectorLoop, OnEpoch, fitting_batch, make_box_loader
from .detector_report import write_detector_report
from .find_objects import AS_TENSOR
from .machine import Machine, environment, in_float32, kept_random_state
from .measure_boxes import detection_metrics, predict_boxes
from .metrics import summarise
from .run import (
    RunControl,
    RunDir,
    begun_with,
    check_begun,
    check_place,
    config_of,
    holds_checkpoint,
    planned_runs,
    run_each,
)

__all__ = ['asked_before', 'train_detector', 'train_detectors']

_logger = logging.getLogger(__name__)

_IMAGENET = ('wrn18_1', 'wrn50_2')
_CIFAR = 'wrn16_2.cifar100'
_ASKED = 'settings.json'  # written if there are several seeds
_SHOWN = 6000  # training photographs over all epochs, from which the default number of epochs follows


@kept_random_state()
def train_detector(
        config: DetectConfig,
        data: str | Path,
        out: str | Path,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: OnEpoch | None = None,
) -> dict[str, Any] | None:
    """Train a detector and write a run directory with weights, metrics and a report.

    On a CPU, a resumed run reproduces the result of an uninterrupted one bit for bit, even from the middle of an epoch.
    With `workers`, however, the rest of that epoch is augmented differently.

    Args:
        config: Training settings.
        data: Folder or file for `read_boxes`.
        out: Run directory.
        machine: Device, workers, time budget...
        on_epoch: Callback that receives each epoch's row of the history.

    Returns:
        The metrics on the test split, as written to `metrics.json`, or None if the run was stopped (by the budget,
        SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite.
        RuntimeError: A step does not fit into memory.
        Any error of `read_boxes`, `divide`, `fpn_backbone` and `RunDir`.
    """
    started, deadline, out = time.monotonic(), machine.deadline(), Path(out)
    if machine.resume:
        check_begun(out)
    else:
        RunDir.check(out, {})
        check_place(out)
    read = _read(config, data, out, machine)
    detector, config = _prepared(_kept(config, out, machine), read, out, machine)
    settings = {'detect': config, 'data': read.name, 'classes': read.train.classes}
    run = RunDir(out, settings, machine.resume, device=machine.device)
    atomic_write(out / 'split.csv', write_box_split(read.train, read.test, data_folder(data)))
    loop = DetectorLoop(detector, read.train, config, RunControl(run, deadline), machine, on_epoch)
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
    """Training and test data of a run.

    Attributes:
        source: Folder or file as given by the user.
        scan: Scan of the source.
        train: Training images.
        test: Test images.
        split: Description of the split.
        leaks: Pairs of a training and a test file with the same content.
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
    """Read and split the data. A resumed run keeps its split."""
    scan = read_boxes(data, machine.on_bad)
    for line in scan.summary():
        _logger.info('%s', line)
    train, test, split = divide(scan, config.train_split, config.test_split, config.seed)
    if machine.resume and (out / 'split.csv').is_file():
        train, test = read_box_split(out / 'split.csv', scan, data_folder(data))
    for part, what in ((train, 'train'), (test, 'test')):
        if not any(map(len, part.labels)):
            raise ValueError(f'none of the {len(part)} images to {what} on has a box (split: {split}); choose other '
                             f'parts with --train-split and --test-split')
    return _Data(str(data), scan, train, test, split, _leaks(scan, train, test))


def _test(loop: DetectorLoop, data: _Data, started: float) -> dict[str, Any]:
    """Evaluate the exported detector on the test images, and write metrics, report and card."""
    folder, machine, config = loop.control.run.path, loop.machine, loop.config
    detector = open_detector(folder, machine.device)
    in_order = list(BatchSampler(range(len(data.test)), config.batch_size, drop_last=False))
    loader = make_box_loader(data.test.as_dataset(AS_TENSOR, config.image_size), in_order, machine, config.seed)
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
    write_json(folder / 'metrics.json', metrics)  # last, because it marks the run as finished
    return metrics


def train_detectors(
        config: DetectConfig,
        data: str | Path,
        out: str | Path,
        seeds: int = 1,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_epoch: OnEpoch | None = None,
) -> dict[str, Any] | None:
    """Train one detector for each of `seeds` seeds, starting with `config.seed`.

    A single run is written to `out`, several to `out/seed-N`. With several runs, `out/metrics.json` holds everything
    that is returned except `runs`.

    Returns:
        A dict with `dataset`, `seeds`, `seconds` (the total), `runs` (the metrics of each), and for `map`, `map_50` and
        `map_75` the `mean`, the sample standard deviation `std` and the `values`. None if a run was stopped.

    Raises:
        Any error of `train_detector`. Finished runs are kept; with `resume`, they are skipped.
    """
    planned = planned_runs(config, out, seeds, machine.resume)
    for _, folder, resume in planned if seeds > 1 else ():  # check all before the settings are overwritten
        if not resume:
            RunDir.check(folder, {})
    if seeds > 1 and not machine.resume:
        make_folder(Path(out))
        write_json(Path(out) / _ASKED, {'detect': dataclasses.asdict(config)})
    runs = run_each(planned, lambda own, folder, left: train_detector(own, data, folder, left, on_epoch), machine)
    if runs is None:
        return None
    summary = {'dataset': runs[0]['dataset'], 'seeds': seeds, 'seconds': round(sum(run['seconds'] for run in runs), 1),
               **{key: summarise([run[key] for run in runs]) for key in ('map', 'map_50', 'map_75')}}
    if seeds > 1:
        write_json(Path(out) / 'metrics.json', summary)
    return {**summary, 'runs': runs}


def asked_before(out: Path) -> DetectConfig:
    """Return the settings that a run was started with. For several seeds, these are the settings as requested.

    Raises:
        Any error of `begun_with`.
    """
    asked, single = out / _ASKED, (out / 'recipe.json').is_file()
    return begun_with(out, 'detect', DetectConfig) if single or not asked.is_file() else config_of(
        asked, 'detect', DetectConfig)


def _leaks(scan: BoxScan, train: BoxedImages, test: BoxedImages) -> list[tuple[str, str]]:
    """Return the pairs of a training and a test file with the same content, and warn about them."""
    sides = {path: side for side, part in enumerate((train, test)) for path in part.paths}
    leaks = [(a, b) for twins in scan.twins for a in twins for b in twins if (sides.get(a), sides.get(b)) == (0, 1)]
    if leaks:
        _logger.warning('%s with the same content as training photographs: %s', counted(len(leaks), 'test photograph'),
                        some([f'{b} = {a}' for a, b in leaks], '; '))
    return leaks


def _kept(config: DetectConfig, out: Path, machine: Machine) -> DetectConfig:
    """Fill in settings that are not given with the values that the run to be resumed chose for them."""
    if not (machine.resume and (out / 'recipe.json').is_file()):
        return config
    found = config_of(out / 'recipe.json', 'detect', DetectConfig)
    if config.model == 'auto':
        config = dataclasses.replace(config, model=found.model, pretrained=found.pretrained)
    left_open = ('image_size', 'anchor_scale', 'epochs', 'batch_size', 'out_channels', 'max_objects')
    return dataclasses.replace(
        config, **{name: getattr(found, name) for name in left_open if not getattr(config, name)})


def _prepared(config: DetectConfig, data: _Data, out: Path, machine: Machine) -> tuple[nn.Module, DetectConfig]:
    """Build the detector, and choose the settings that are not given."""
    device, any_batch = torch.device(machine.device), not config.batch_size
    resumed = machine.resume and holds_checkpoint(out)  # the checkpoint has all weights
    if config.model == 'auto':
        config = dataclasses.replace(config, model=_found_model(config, device))
    config = _resolved(config, data.scan, data.train)
    torch.manual_seed(config.seed)
    try:
        detector = build_detector(config, data.train.classes, config.pretrained and not resumed)
    except RuntimeError as e:  # missing or damaged weights
        raise RuntimeError(f'{e} --no-pretrained starts from random weights.' if config.pretrained else str(e)) from e
    detector.to(device, memory_format=torch.channels_last)
    if any_batch and device.type == 'cuda':
        config = dataclasses.replace(config, batch_size=fitting_batch(detector, config, device))
        torch.manual_seed(config.seed)
    return detector, config


def _found_model(config: DetectConfig, device: torch.device) -> str:
    """Choose the backbone: one with ImageNet weights if they are available, else one with CIFAR weights."""
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
            '%s\nImageNet weights are not available, so the backbone is %s, which was trained on 32-pixel images. The '
            'ImageNet weights of %s make better detectors: put their folder into the folder that $WRN_TIMM_WEIGHTS '
            'points to, or connect to the Hub', e, _CIFAR, ' or '.join(names))
        return _CIFAR
    return name


def _resolved(config: DetectConfig, scan: BoxScan, train: BoxedImages) -> DetectConfig:
    """Choose the settings that are not given to suit the data."""
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
    # the first level's anchors are as large as the smaller boxes; the last level's are 16 times as large
    scale = float(sides.quantile(0.1)) / (4 if config.detector == 'faster_rcnn' else 8) if len(sides) else 8.
    return dataclasses.replace(config, anchor_scale=round(min(8., max(2., scale)), 1))


def _fitting_channels(model: str) -> int:
    """Number of pyramid channels for a backbone. Unknown names are rejected later, when the detector is built."""
    if not timm.is_model(model):
        return 256
    with torch.device('meta'):
        return 64 if timm.create_model(model).feature_info[-1]['num_chs'] <= 256 else 256
