"""Training loop of a detector, which can stop after any step."""
from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision.transforms import v2
from tqdm import tqdm

from ..data.boxes import BoxedImages
from ..recipes import DetectConfig
from .find_objects import AS_TENSOR
from .machine import Machine, fused, resolve_precision
from .measure import begin_worker, largest_batch, out_of_memory
from .measure_boxes import Target
from .run import RunControl, progress_bar

__all__ = ['DetectorLoop', 'OnEpoch', 'fitting_batch', 'make_box_loader']

OnEpoch = Callable[[dict[str, float]], None]


def make_box_loader(dataset: Dataset, batches: Sequence[list[int]], machine: Machine, seed: int) -> DataLoader:
    """Create a loader for batches of images (3, H, W) of any size, with their targets.

    Args:
        dataset: Data set of (image, target) from `BoxedImages.as_dataset`.
        batches: Indices of the images of each batch.
        machine: Number of workers, and device.
        seed: Seed of the workers' random numbers.
    """
    return DataLoader(  # its own generator, so that it leaves alone the random state kept in checkpoints
        dataset, batch_sampler=batches, num_workers=machine.workers, collate_fn=_columns, worker_init_fn=begin_worker,
        pin_memory=torch.device(machine.device).type == 'cuda', generator=torch.Generator().manual_seed(seed))


def _drawn_batches(n: int, batch_size: int, seed: int) -> list[list[int]]:
    """Draw the batches of an epoch. An incomplete last batch is dropped unless it is the only one."""
    order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    return list(BatchSampler(order, batch_size, drop_last=n >= batch_size))


def _columns(rows: list[tuple[torch.Tensor, Target]]) -> tuple[list[torch.Tensor], list[Target]]:
    images, targets = zip(*rows, strict=True)
    return list(images), [{k: v.as_subclass(torch.Tensor) for k, v in t.items()} for t in targets]


@dataclasses.dataclass
class _Progress:
    """Progress and history of a run."""
    epoch: int = 0
    step: int = 0  # within the epoch
    total: float = 0.  # sum of this epoch's losses
    seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


class DetectorLoop:
    """Training loop of a run, which can stop after any step.

    Args:
        detector: Detector on the device of `machine`; trained in place.
        train: Training images.
        config: Fully resolved settings.
        control: Control of saving and stopping, with the run directory.
        machine: Device, workers, progress.
        on_epoch: Callback that receives each epoch's row of the history.
    """

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
        """Restore the state of a checkpoint."""
        self.detector.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        torch.set_rng_state(saved['rng'])
        self.progress = _Progress(**{f.name: saved[f.name] for f in dataclasses.fields(_Progress)})

    def run(self) -> bool:
        """Train to the end. Returns False if the run was stopped early."""
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
        """Train to the end of the epoch, or until the run has to stop. Returns the reason to stop, or ''."""
        progress, config = self.progress, self.config
        seed, began, reason = config.seed * 100_003 + progress.epoch, time.monotonic(), ''
        batches = _drawn_batches(len(self.train), config.batch_size, seed)[progress.step:]
        flip = [v2.RandomHorizontalFlip()] if config.flip else []
        augment = v2.Compose([*flip, v2.ColorJitter(0.2, 0.2, 0.2), AS_TENSOR])
        self.detector.train()
        bar.set_description(f'epoch {progress.epoch + 1}/{config.epochs}')
        dataset = self.train.as_dataset(augment, config.image_size)
        try:
            for images, targets in make_box_loader(dataset, batches, self.machine, seed):
                self.scheduler.step_update(progress.epoch * self.steps + progress.step)
                progress.total += self._loss(images, targets)
                self.control.check_finite(progress.total, 'the loss', progress.epoch + 1)
                progress.step += 1
                bar.update()
                bar.set_postfix(loss=f'{progress.total / progress.step:.3f}')
                if reason := self.control.reason_to_stop():
                    break
        except RuntimeError:
            if not self.control.signalled:  # else it also reached the workers, which only forked ones ignore
                raise
            reason = self.control.reason_to_stop()
        progress.seconds += time.monotonic() - began
        return reason

    def _loss(self, images: list[torch.Tensor], targets: list[Target]) -> float:
        """Run a training step and return its loss. An out-of-memory error says what to change."""
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
        rate = self.steps * min(self.config.batch_size, len(self.train)) / max(progress.seconds - before, 1e-9)
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
    """Return a context in which the detector is trained in the precision of the settings."""
    in_bfloat16 = resolve_precision(config.precision, device) == 'bf16'
    return _backbone_in_bfloat16(detector, device) if in_bfloat16 else contextlib.nullcontext()


@contextlib.contextmanager
def _backbone_in_bfloat16(detector: nn.Module, device: torch.device) -> Iterator[None]:
    """Run only the backbone in bfloat16. Box coordinates in bfloat16 would be off by whole pixels."""
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
    """Run a training step on a batch and return its loss."""
    losses = detector([image.to(device, non_blocking=True) for image in images],
                      [{k: v.to(device, non_blocking=True) for k, v in t.items()} for t in targets])
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(detector.parameters(), 10.)
    optimizer.step()
    return loss.item()


def fitting_batch(detector: nn.Module, config: DetectConfig, device: torch.device) -> int:
    """Return the batch size, halved until a training step fits into the device's memory.

    Raises:
        RuntimeError: Not even one image fits.
    """
    # on the CPU, so that the copy takes no device memory
    before = {k: v.to('cpu', copy=True) for k, v in detector.state_dict().items()}
    optimizer, side = _optimizer(detector, config), config.image_size
    corners = torch.rand(20, 2, device=device) * side / 2
    target = {'boxes': torch.cat([corners, corners + side / 4], 1),
              'labels': torch.ones(20, dtype=torch.int64, device=device)}

    def step(n: int) -> None:
        for _ in range(2):  # the first creates the optimizer state, so only the second needs the full memory
            _step(detector.train(), optimizer, list(torch.rand(n, 3, side, side)), [target] * n, device)

    with _precision(detector, config, device):
        found = largest_batch(step, config.batch_size)
    detector.zero_grad(set_to_none=True)
    detector.load_state_dict(before)
    if not found:
        raise RuntimeError(f'not even one image of {side} px fits into the memory of {device}; choose a smaller '
                           f'--image-size or --model')
    return found
