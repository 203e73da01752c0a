"""Training a detector on photographs with boxes, and measuring it as COCO does."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import math
import shutil
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
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.boxes import BoxedImages, read_voc
from ..data.folders import read_rgb
from ..detection import DETECTORS, anchor_generator
from ..files import atomic_write
from ..schemas import check_detector, read_json
from ..weights import WEIGHTS_FILE, sha256_of, verify
from .machine import fused
from .recipes import check_numbers
from .run import RunDir, check_weights, environment, stop_requests

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
    anchor_scale: float = 8.
    """Side of a level's anchors, in strides of the level."""
    rois: int = 512
    """Regions an image that the second stage of Faster R-CNN learns from."""
    image_size: int = 640
    """Longer side that photographs are resized to, in pixels."""
    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 8
    """Images a step."""
    opt: str = 'adamw'
    """timm name of the optimiser."""
    lr: float = 5e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Decay of the weights, not of norms and biases."""
    warmup_steps: int = 100
    """Linear rise from lr / 100."""
    train_split: str = 'trainval'
    """List of the images to train on."""
    test_split: str = 'test'
    """List of the images measured once, at the end."""
    seed: int = 0
    """Of the weights, the order and the augmentation."""

    def __post_init__(self):
        if self.detector not in DETECTORS:
            raise ValueError(f'detector {self.detector!r} is unknown; choose of {", ".join(DETECTORS)}')
        for name, low in (('epochs', 1), ('batch_size', 1), ('rois', 4), ('image_size', 32), ('out_channels', 1)):
            if getattr(self, name) < low:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least {low}')
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
        device: str = 'cpu',
        workers: int = 0,
        on_bad: str = 'skip',
        time_budget: float = math.inf,
        resume: bool = False,
) -> dict[str, Any] | None:
    """Train on `data` and leave a run directory with weights, metrics and photographs with the boxes found.

    Args:
        config: How.
        data: Folder as `read_voc` reads it.
        out: Run directory.
        device: 'cpu' or 'cuda'; on CUDA the backbone computes in bfloat16 while it trains, where the
            GPU has it.
        workers: Processes that read photographs.
        on_bad: 'skip' leaves bad boxes and files out and names them, 'fail' stops.
        time_budget: Seconds after which the run stops, to be resumed.
        resume: Go on with the run in `out`: bit for bit on a CPU, from the middle of an epoch too (with `workers` the
            rest of that epoch's photographs are changed otherwise).

    Returns:
        The metrics on the test split, as written to `metrics.json`, or None if the run was stopped (by the budget,
        SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite.
        What `read_voc`, `fpn_backbone` and `RunDir` raise.
    """
    check_numbers({'time_budget': time_budget}, math.inf)
    started = time.monotonic()
    train, bad = read_voc(data, config.train_split, on_bad=on_bad)
    test, bad_test = read_voc(data, config.test_split, train.classes, on_bad)
    for reason in bad + bad_test:
        _logger.warning('left out: %s', reason)
    name = Path(data).resolve().name
    settings = {'detect': config, 'data': name, 'classes': train.classes}
    RunDir.check(out, settings, resume)
    torch.manual_seed(config.seed)
    detector = _build(config, len(train.classes), config.pretrained).to(device)
    optimizer = create_optimizer_v2(
        detector, config.opt, lr=config.lr, weight_decay=config.weight_decay, **fused(config.opt))
    augment = v2.Compose([v2.RandomHorizontalFlip(), v2.ColorJitter(0.2, 0.2, 0.2), *_AS_TENSOR])
    steps = max(1, len(train) // config.batch_size)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=config.epochs * steps, t_in_epochs=False, warmup_t=config.warmup_steps,
        warmup_lr_init=config.lr / 100)

    run = RunDir(out, settings, resume, device=device)
    history, position, total, seconds = [], 0, 0., 0.  # position: steps of the whole run; total: this epoch's loss
    if resume and (saved := run.load_checkpoint()):
        detector.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        torch.set_rng_state(saved['rng'])
        history, total, seconds = saved['history'], saved['total'], saved['seconds']
        position = saved['epoch'] * steps + saved['step']
        del saved

    with contextlib.ExitStack() as stack:
        asked = stack.enter_context(stop_requests())
        stack.enter_context(logging_redirect_tqdm())
        if device != 'cpu' and torch.cuda.is_bf16_supported(including_emulation=False):
            stack.enter_context(_backbone_in_bfloat16(detector, torch.device(device)))
        run.log('%d classes, %d images to train on, %d to test; %s on %s at %d px on %s', len(train.classes),
                len(train), len(test), config.detector, config.model, config.image_size, device)
        while position < config.epochs * steps:
            epoch, step = divmod(position, steps)
            detector.train()
            began, reason = time.monotonic(), ''
            seed = config.seed * 100_003 + epoch
            loader = _loader(train, augment, _drawn_batches(len(train), config.batch_size, seed)[step:], workers, seed)
            bar = tqdm(loader, desc=f'epoch {epoch + 1}/{config.epochs}', total=steps, initial=step, unit='batch',
                       leave=False, disable=None)
            for images, targets in bar:
                scheduler.step_update(position)
                total += _step(detector, optimizer, images, targets, torch.device(device))
                position += 1
                bar.set_postfix(loss=f'{total / (position - epoch * steps):.3f}')
                out_of_time = time.monotonic() - started > time_budget
                if reason := asked[0] if asked else 'the time budget' if out_of_time else '':
                    break
            bar.close()
            if not math.isfinite(total):
                raise FloatingPointError(
                    f'the loss is not finite in epoch {epoch + 1}; the checkpoints in {run.checkpoints} are from '
                    f'before. Try a smaller learning rate.')
            seconds += time.monotonic() - began
            if position % steps == 0:
                history.append({'epoch': epoch + 1, 'lr': optimizer.param_groups[0]['lr'],
                                'train_loss': total / steps, 'seconds': round(seconds, 1)})
                run.log('epoch %2d/%d  loss %.3f  %4.0f s', epoch + 1, config.epochs, total / steps, seconds)
                total = 0.
            epoch, step = divmod(position, steps)
            run.save({'epoch': epoch, 'step': step, 'model': detector.state_dict(), 'total': total, 'seconds': seconds,
                      'optimizer': optimizer.state_dict(), 'rng': torch.get_rng_state(), 'history': history}, history)
            if reason and position < config.epochs * steps:
                run.log('stopped by %s after epoch %d, step %d; go on with --resume', reason, epoch, step)
                return None

    _export(detector, run)
    in_order = list(BatchSampler(range(len(test)), config.batch_size, drop_last=False))
    metrics = evaluate_detector(
        detector, _loader(test, v2.Compose(_AS_TENSOR), in_order, workers, config.seed), test.classes, device)
    metrics |= {'dataset': name, 'split': config.test_split, 'left_out': bad + bad_test,
                'environment': environment(device)}
    atomic_write(run.path / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    draw(detector, test.classes, test.paths[:4], run.path / 'drawn', device)
    return metrics


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
