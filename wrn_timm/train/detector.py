"""Training a detector on photographs with boxes, and measuring it as COCO does."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, save_image
from tqdm import tqdm

from ..data.boxes import BoxedImages, BoxScan, data_folder, divide, read_box_split, read_boxes, write_box_split
from ..data.folders import read_rgb, some
from ..detection import DETECTORS, anchor_generator
from ..files import atomic_write
from ..recipes import check_numbers
from ..schemas import check_detector, read_json
from ..weights import WEIGHTS_FILE, check_weights, sha256_of, verify
from .machine import Machine, fast_bfloat16, fused
from .run import RunControl, RunDir, config_of, environment, progress_bar

__all__ = ['DetectConfig', 'detect', 'draw', 'evaluate_detector', 'load_detector']

_logger = logging.getLogger(__name__)

Target = dict[str, torch.Tensor]
PEER = 'torchvision/resnet50_fpn'


@dataclasses.dataclass(frozen=True)
class DetectConfig:
    """How a detector is trained: a cosine from a short warm-up, photographs mirrored and their colours changed."""

    model: str = 'wrn50_2'
    """timm name of a WRN; 'torchvision/resnet50_fpn' is torchvision's own detector on ResNet-50, to compare with."""
    detector: str = 'faster_rcnn'
    """'faster_rcnn' or 'retinanet'."""
    pretrained: bool = False
    """Start from the tag's weights, BatchNorm frozen."""
    frozen_stages: int = 0
    """Stages not trained, with the stem."""
    out_channels: int = 256
    """Channels of the feature pyramid."""
    anchor_scale: float = 0.
    """Side of a level's anchors, in strides of the level; 0 finds it from the sizes of the boxes."""
    rois: int = 512
    """Regions per image that the second stage of Faster R-CNN is trained on."""
    image_size: int = 0
    """Longer side to which photographs are resized, in pixels; 0 takes that of the photographs, from 320 to 640."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 8
    """Images per step."""
    opt: str = 'adamw'
    """timm name of the optimizer."""
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decay of the weights, not of norms and biases."""
    warmup_steps: int = 100
    """Linear rise from lr / 100."""
    train_split: str = ''
    """Part of the data to train on; '' finds it, or splits by the seed."""
    test_split: str = ''
    """Part of the data that is measured once, at the end; '' finds it."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""

    def __post_init__(self):
        if self.detector not in DETECTORS:
            raise ValueError(f'detector {self.detector!r} is unknown; choose one of {", ".join(DETECTORS)}')
        for name, low in (('epochs', 1), ('batch_size', 1), ('rois', 4), ('out_channels', 1)):
            if getattr(self, name) < low:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least {low}')
        if self.image_size and self.image_size < 32:
            raise ValueError(f'image_size is {self.image_size}; it must be at least 32, or 0')
        check_numbers(vars(self))
        fixed = {'detector': 'faster_rcnn', 'pretrained': False, 'frozen_stages': 0, 'out_channels': 256}
        for name, value in fixed.items() if self.model == PEER else ():
            if getattr(self, name) != value:
                raise ValueError(f'{name} is {getattr(self, name)}; of {PEER} it is {value}')


def _build(config: DetectConfig, num_classes: int, pretrained: bool) -> nn.Module:
    # with the shorter side's bound as high as the longer's, the longer one decides
    detector_kwargs = dict(min_size=config.image_size, max_size=config.image_size)
    if config.detector == 'faster_rcnn':
        detector_kwargs |= dict(box_batch_size_per_image=config.rois)
    if config.model == PEER:
        return fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=num_classes + 1, **detector_kwargs,
            rpn_anchor_generator=anchor_generator((4, 8, 16, 32, 64), config.anchor_scale))
    return DETECTORS[config.detector](
        config.model, num_classes, anchor_scale=config.anchor_scale, out_channels=config.out_channels,
        pretrained=pretrained, frozen_norm=config.pretrained, frozen_stages=config.frozen_stages,
        detector_kwargs=detector_kwargs)


def _loader(images: BoxedImages, transform: Any, batches: Sequence[list[int]], workers: int, seed: int) -> DataLoader:
    return DataLoader(  # without a generator of its own it would draw from the one whose state a checkpoint keeps
        images.as_dataset(transform), batch_sampler=batches, num_workers=workers, collate_fn=_columns,
        generator=torch.Generator().manual_seed(seed))


def _drawn_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """The images of each step of an epoch; a last step that is not full is left out if others are."""
    order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    return list(BatchSampler(order, batch_size, drop_last=n >= batch_size))


def _columns(rows: list[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    images, targets = zip(*rows, strict=True)
    return list(images), [{k: v.as_subclass(torch.Tensor) for k, v in t.items()} for t in targets]


_AS_TENSOR = (v2.ToImage(), v2.ToDtype(torch.float32, scale=True))


@torch.inference_mode()
def evaluate_detector(
        detector: nn.Module,
        loader: Iterable[tuple[list[torch.Tensor], list[Target]]],
        classes: tuple[str, ...],
        device: torch.device | str = 'cpu',
) -> dict[str, Any]:
    """Mean average precision as COCO defines it, in %, by torchmetrics on pycocotools.

    Returns:
        `images`, `map` (mean over the overlaps 0.5 to 0.95), `map_50`, `map_75`, and `map_per_class` by name (None
        where the images have no box of the class).
    """
    detector.eval()
    metric = MeanAveragePrecision(class_metrics=True)
    n = 0
    for images, targets in loader:
        found = detector([image.to(device) for image in images])
        metric.update([{k: v.cpu() for k, v in f.items()} for f in found], targets)
        n += len(images)
    result = metric.compute()
    per_class = dict(zip(result['classes'].reshape(-1).tolist(), result['map_per_class'].reshape(-1).tolist(),
                         strict=True))
    return {
        'images': n, **{k: round(100 * result[k].item(), 2) for k in ('map', 'map_50', 'map_75')},
        'map_per_class': {c: round(100 * per_class[i], 2) if per_class.get(i, -1) >= 0 else None
                          for i, c in enumerate(classes, start=1)}}


def detect(
        config: DetectConfig,
        data: str | Path,
        out: str | Path,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
) -> dict[str, Any] | None:
    """Train on `data` and leave a run directory with weights, metrics and photographs with the boxes found.

    On CUDA the backbone computes in bfloat16 while it trains, where the GPU has it. On a CPU a resumed run ends bit for
    bit as if it had not been stopped, from the middle of an epoch too; but with `workers` the rest of that epoch's
    photographs are changed otherwise.

    Args:
        config: How.
        data: Folder or file as `read_boxes` reads it.
        out: Run directory.
        machine: Device, workers, time budget...

    Returns:
        The metrics on the test split, as written to `metrics.json`, or None if the run was stopped (by the budget,
        SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite.
        What `read_boxes`, `divide`, `fpn_backbone` and `RunDir` raise.
    """
    deadline, device = machine.deadline(), torch.device(machine.device)
    root = data_folder(data)
    scan = read_boxes(data, machine.on_bad)
    for line in scan.summary():
        _logger.info('%s', line)
    kept = Path(out) / 'split.csv'
    train, test, how = divide(scan, config.train_split, config.test_split, config.seed)
    if machine.resume and kept.is_file():
        train, test = read_box_split(kept, scan, root)
    leaks = _leaks(scan, train, test)
    config = _resolved(_kept(config, Path(out), machine), scan, train)
    name = root.resolve().name
    settings = {'detect': config, 'data': name, 'classes': train.classes}
    RunDir.check(out, settings, machine.resume)
    torch.manual_seed(config.seed)
    detector = _build(config, len(train.classes), config.pretrained).to(device)
    run = RunDir(out, settings, machine.resume, device=device)
    atomic_write(kept, write_box_split(train, test, root))
    loop = _Loop(detector, train, config, RunControl(run, deadline), machine)
    if machine.resume and (saved := run.load_checkpoint()):
        loop.load_state_dict(saved)
        del saved
    run.log('%d classes, %d photographs to train on, %d to test on (split: %s); %s on %s at %d px on %s',
            len(train.classes), len(train), len(test), how, config.detector, config.model, config.image_size, device)
    if not loop.run():
        return None
    _export(detector, run)
    in_order = list(BatchSampler(range(len(test)), config.batch_size, drop_last=False))
    loader = _loader(test, v2.Compose(_AS_TENSOR), in_order, machine.workers, config.seed)
    metrics = evaluate_detector(detector, loader, test.classes, device) | {
        'dataset': name, 'split': how, 'left_out': scan.bad, 'leaks': leaks, 'environment': environment(device)}
    atomic_write(run.path / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    draw(detector, test.classes, test.paths[:4], run.path / 'drawn', device)
    return metrics


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
    return dataclasses.replace(config, image_size=config.image_size or found.image_size,
                               anchor_scale=config.anchor_scale or found.anchor_scale)


def _resolved(config: DetectConfig, scan: BoxScan, train: BoxedImages) -> DetectConfig:
    """The settings with image size and anchors that fit the data, where they were left open."""
    longest = statistics.median(max(size) for size in scan.sizes.elements())
    image_size = config.image_size or min(640, max(320, 32 * round(longest / 32)))
    if config.anchor_scale or config.model == PEER:
        return dataclasses.replace(config, image_size=image_size, anchor_scale=config.anchor_scale or 8.)
    boxes = torch.cat(train.boxes)
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt() * image_size / longest
    # the first level's anchors are as large as the smaller boxes, and the last one's 16 times that
    scale = float(sides.quantile(0.1)) / (4 if config.detector == 'faster_rcnn' else 8) if len(sides) else 8.
    return dataclasses.replace(config, image_size=image_size, anchor_scale=round(min(8., max(2., scale)), 1))


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
    ):
        self.detector, self.train, self.config, self.control, self.machine = detector, train, config, control, machine
        self.device = torch.device(machine.device)
        self.steps = max(1, len(train) // config.batch_size)
        self.optimizer = create_optimizer_v2(
            detector, config.opt, lr=config.lr, weight_decay=config.weight_decay, **fused(config.opt))
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
            bar = stack.enter_context(progress_bar(epochs * self.steps, done, self.machine.progress))
            if self.device.type == 'cuda' and fast_bfloat16(self.device):
                stack.enter_context(_backbone_in_bfloat16(self.detector, self.device))
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
        augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), *_AS_TENSOR])
        self.detector.train()
        bar.set_description(f'epoch {progress.epoch + 1}/{config.epochs}')
        for images, targets in _loader(self.train, augment, batches, self.machine.workers, seed):
            self.scheduler.step_update(progress.epoch * self.steps + progress.step)
            progress.total += _step(self.detector, self.optimizer, images, targets, self.device)
            progress.step += 1
            bar.update()
            bar.set_postfix(loss=f'{progress.total / progress.step:.3f}')
            if reason := self.control.reason_to_stop():
                break
        self.control.check_finite(progress.total, 'the loss', progress.epoch + 1)
        progress.seconds += time.monotonic() - began
        return reason

    def _end_epoch(self) -> None:
        progress = self.progress
        loss = progress.total / self.steps
        progress.epoch, progress.step, progress.total = progress.epoch + 1, 0, 0.
        progress.history.append({'epoch': progress.epoch, 'lr': self.optimizer.param_groups[0]['lr'],
                                 'train_loss': loss, 'seconds': round(progress.seconds, 1)})
        self.control.run.log('epoch %2d/%d  loss %.3f  %4.0f s', progress.epoch, self.config.epochs, loss,
                             progress.seconds)


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
    losses = detector([image.to(device) for image in images],
                      [{k: v.to(device) for k, v in t.items()} for t in targets])
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(detector.parameters(), 10.)
    optimizer.step()
    return loss.item()


def _export(detector: nn.Module, run: RunDir) -> None:
    folder = run.path / 'weights'
    check_weights(detector.state_dict(), folder)
    folder.mkdir(exist_ok=True)
    tensors = {k: v.contiguous() for k, v in detector.state_dict().items()}
    file = folder / WEIGHTS_FILE
    atomic_write(file, lambda p: save_file(tensors, p))
    record = json.loads(run.recipe_file.read_text(encoding='utf-8')) | {'sha256': sha256_of(file)}
    atomic_write(folder / 'detector.json', json.dumps(record, indent=2) + '\n')
    shutil.copymode(folder / 'detector.json', file)  # safetensors lets nobody else read it


def load_detector(run: str | Path, device: str = 'cpu') -> tuple[nn.Module, tuple[str, ...]]:
    """The detector of a finished run, in evaluation mode, and the names of its classes (label 1 is the first).

    Raises:
        FileNotFoundError: There is no run that has ended.
        ValueError: `detector.json` is damaged, or of another version.
        RuntimeError: The weights file is damaged, or not the one that `detector.json` names.
    """
    folder = Path(run) / 'weights'
    if not (folder / 'detector.json').is_file():
        raise FileNotFoundError(f'{run} holds no detector; train one with --out {run}')
    settings = read_json(folder / 'detector.json', check_detector)
    file = verify(folder, settings.get('sha256'), named_by='detector.json')
    try:
        config = DetectConfig(**settings['detect'])
        detector = _build(config, len(settings['classes']), pretrained=False)
    except TypeError as e:
        raise ValueError(f'{folder / "detector.json"} does not make a detector: {e}') from e
    detector.load_state_dict(load_file(file))
    return detector.to(device).eval(), tuple(settings['classes'])


@torch.inference_mode()
def draw(
        detector: nn.Module,
        classes: tuple[str, ...],
        photographs: Iterable[str | Path],
        folder: Path,
        device: str = 'cpu',
        threshold: float = 0.5,
) -> list[dict[str, Any]]:
    """Write each photograph to `folder` as PNG with the boxes found on it.

    Args:
        detector: In evaluation mode.
        classes: Names of its classes.
        photographs: Files.
        folder: Made if it is not there.
        device: Where the detector is.
        threshold: Lowest score of a box that counts.

    Returns:
        For each the path of the `drawing`, and `objects` with `label`, `score` and `box` (xmin, ymin, xmax, ymax in
        pixels of the photograph).

    Raises:
        ValueError: A file is no image; it is named.
    """
    colours = ('red', 'blue', 'green', 'purple', 'orange', 'teal', 'brown', 'magenta')
    folder.mkdir(parents=True, exist_ok=True)
    results, taken = [], set()
    for path in photographs:
        image = v2.Compose(_AS_TENSOR)(read_rgb(path)).as_subclass(torch.Tensor)
        found = {k: v.cpu() for k, v in detector([image.to(device)])[0].items()}
        keep = found['scores'] >= threshold
        boxes, scores, index = found['boxes'][keep], found['scores'][keep].tolist(), found['labels'][keep].tolist()
        drawing = draw_bounding_boxes(
            image, boxes, [f'{classes[i - 1]} {100 * s:.0f}' for i, s in zip(index, scores, strict=True)],
            [colours[i % len(colours)] for i in index], width=2) if len(boxes) else image
        stem = Path(path).stem
        names = itertools.chain([stem], (f'{stem}_{i}' for i in itertools.count(2)))
        taken.add(name := next(n for n in names if n not in taken))
        target = folder / f'{name}.png'
        atomic_write(target, lambda p, drawing=drawing: save_image(drawing, p))
        results.append({'image': str(path), 'drawing': str(target), 'objects': [
            {'label': classes[i - 1], 'score': round(s, 4), 'box': [round(v, 1) for v in box]}
            for i, s, box in zip(index, scores, boxes.tolist(), strict=True)]})
    return results
