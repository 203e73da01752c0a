"""Training from scratch: one recipe, one data set on the device, one run directory, any number of processes."""
from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from ..data.datasets import ImageArrays, load
from ..data.device import DeviceLoader
from .recipes import Recipe
from .rundir import RunDir, export_weights

__all__ = ['evaluate', 'train']

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        data: ImageArrays,
        device: torch.device,
        batch_size: int = 500,
) -> dict[str, float]:
    """Mean loss and accuracy in % of a model on images as they are, normalised by the data set's statistics."""
    model.eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))
    loss = correct = torch.zeros((), device=device)
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        labels = labels.to(device)
        logits = model((images.to(device).float() / 255 - mean) / std).float()
        loss = loss + F.cross_entropy(logits, labels, reduction='sum')
        correct = correct + (logits.argmax(1) == labels).sum()
    return {'loss': loss.item() / len(data), 'accuracy': 100 * correct.item() / len(data)}


@dataclasses.dataclass
class _State:
    """All that a run is, and that a checkpoint holds."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    sums: torch.Tensor  # of loss and of hits, in this epoch
    epoch: int = 0
    step: int = 0  # within the epoch
    seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        cuda = self.sums.is_cuda
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None, 'sums': self.sums,
            'epoch': self.epoch, 'step': self.step, 'seconds': self.seconds, 'history': self.history,
            'rng': torch.get_rng_state(), 'cuda_rng': torch.cuda.get_rng_state() if cuda else None}

    def load_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])
        self.sums = saved['sums'].to(self.sums.device)
        self.epoch, self.step, self.seconds = saved['epoch'], saved['step'], saved['seconds']
        self.history = saved['history']
        torch.set_rng_state(saved['rng'].cpu())
        if saved['cuda_rng'] is not None and self.sums.is_cuda:
            torch.cuda.set_rng_state(saved['cuda_rng'].cpu())


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """A list to which SIGTERM and the first Ctrl-C add their name, for the loop to stop at the end of its step."""
    asked: list[str] = []

    def note(number: int, frame: Any) -> None:
        asked.append(signal.Signals(number).name)
        signal.signal(number, previous[number])  # a second one acts at once

    previous = {}
    with contextlib.suppress(ValueError):  # signals can be handled in the main thread alone
        previous = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    if recipe.schedule == 'step':
        return MultiStepLRScheduler(
            optimizer, [e * steps for e in recipe.drop_epochs], decay_rate=recipe.drop_factor, t_in_epochs=False)
    return CosineLRScheduler(
        optimizer, t_initial=recipe.epochs * steps, t_in_epochs=False, warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.lr / 100)


def _mixer(recipe: Recipe, classes: int) -> Callable | None:
    kinds = [kind(alpha=alpha, num_classes=classes)
             for kind, alpha in ((v2.MixUp, recipe.mixup), (v2.CutMix, recipe.cutmix)) if alpha]
    return v2.RandomChoice(kinds) if kinds else None


@torch.no_grad()
def _climb(parameters: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """Move to the sharpest point within `rho` (arXiv:2010.01412, equation 2); returns the steps, to be taken back."""
    grads = [p.grad for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    steps = torch._foreach_mul(grads, rho / (norm + 1e-12))
    torch._foreach_add_(parameters, steps)
    return steps


def _any_process(flag: bool, ask: bool, world: int, device: torch.device) -> bool:
    """Whether any process raised its flag. The others are asked, and waited for, where `ask` is set on all."""
    if world == 1:
        return flag
    if not ask:
        return False
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags.item())


def _end_epoch(state: _State, lr: float, steps: int, batch_size: int, world: int) -> None:
    """Put the epoch's line into the history, and the position at the start of the next."""
    if world > 1:
        dist.all_reduce(state.sums, dist.ReduceOp.AVG if state.sums.is_cuda else dist.ReduceOp.SUM)
        state.sums = state.sums if state.sums.is_cuda else state.sums / world
    before = state.history[-1]['seconds'] if state.history else 0.
    state.history.append({
        'epoch': state.epoch + 1, 'lr': lr, 'train_loss': state.sums[0].item() / steps,
        'train_accuracy': 100 * state.sums[1].item() / steps, 'seconds': round(state.seconds, 2),
        'images_per_second': round(steps * batch_size / max(state.seconds - before, 1e-9))})
    state.epoch, state.step = state.epoch + 1, 0


def train(
        recipe: Recipe,
        data_dir: str,
        out: str | Path,
        device: str = 'cpu',
        seed: int = 0,
        time_budget: float = math.inf,
        checkpoint_every: float = 300.,
        resume: bool = False,
        download: bool = False,
) -> Path | None:
    """Train a network and leave a weights folder in the run directory.

    Started by `torchrun`, the processes share each batch, and the first one writes.

    Args:
        recipe: How.
        data_dir: Folder of the data set's official files.
        out: Run directory.
        device: 'cpu' or 'cuda'. On CUDA the network is compiled and computes in bfloat16.
        seed: Of the weights, the order and the augmentation.
        time_budget: Seconds after which the run stops, to be resumed.
        checkpoint_every: Seconds between checkpoints; there is one at the end of each epoch too.
        resume: Go on with the run in `out`: bit for bit on a CPU, from the middle of an epoch too.
        download: Fetch the data set if it is missing.

    Returns:
        The weights folder, or None if the run was stopped (by the budget, SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite; the checkpoints before it stand.
        What `load` and `RunDir` raise.
    """
    started = time.monotonic()
    world = int(os.environ.get('WORLD_SIZE', 1))
    rank = int(os.environ.get('RANK', 0))
    main = rank == 0
    if device == 'cuda':
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    device = torch.device(device)
    cuda = device.type == 'cuda'

    if world > 1 and not dist.is_initialized():
        dist.init_process_group('nccl' if cuda else 'gloo')
    if not main:
        dist.barrier()  # the first process may be downloading
    data = load(recipe.dataset, data_dir, train=True, download=download and main)
    if main and world > 1:
        dist.barrier()
    held_out = None
    if recipe.holdout:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data, held_out = data.subset(order[recipe.holdout:]), data.subset(order[:recipe.holdout])
    loader = DeviceLoader(
        data, recipe.batch_size, device, pad=recipe.pad, flip=recipe.flip, cutout=recipe.cutout,
        trivial_augment=recipe.trivial_augment, seed=seed, rank=rank, world_size=world)
    steps = len(loader)

    torch.manual_seed(seed)
    kwargs = {'conv_drop_rate': recipe.conv_drop_rate} if recipe.conv_drop_rate else {}
    model = timm.create_model(recipe.model, num_classes=len(data.classes), **kwargs)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model, 'nesterov', lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum,
        filter_bias_and_bn=not recipe.decay_norm, **({'fused': True} if cuda else {'foreach': True}))
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    state = _State(model, optimizer, ema, torch.zeros(2, device=device))
    scheduler, mix = _schedule(recipe, optimizer, steps), _mixer(recipe, len(data.classes))
    parameters = list(model.parameters())

    settings = {'recipe': dataclasses.asdict(recipe), 'seed': seed, 'device': str(device)}
    run = RunDir(out, settings, resume, write=main)
    if resume and (saved := run.load_checkpoint(device)):
        state.load_dict(saved)
    forward = torch.compile(model) if cuda else model
    if world > 1:
        forward = DistributedDataParallel(forward)
        if rank:  # the first process's dropout and mixing are its own
            torch.manual_seed(seed * 100_003 + rank)

    def backward(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            logits = forward(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    last_saved, stopping = time.monotonic(), False
    with _stop_requests() as asked:
        while state.epoch < recipe.epochs:
            model.train()
            if not state.step:
                state.sums = torch.zeros_like(state.sums)
            batches = tqdm(
                loader.epoch(state.epoch, state.step), desc=f'epoch {state.epoch + 1}/{recipe.epochs}', total=steps,
                initial=state.step, unit='img', unit_scale=recipe.batch_size, leave=False,
                disable=None if main else True)
            began = time.monotonic()
            for images, labels in batches:
                step = state.epoch * steps + state.step
                scheduler.step_update(step)
                targets = labels
                if mix:
                    images, targets = mix(images, labels)
                loss, logits = backward(images, targets)
                if recipe.sam_rho:
                    climbed = _climb(parameters, recipe.sam_rho)
                    backward(images, targets)
                    torch._foreach_sub_([p.data for p in parameters], climbed)
                optimizer.step()
                if ema:
                    ema.update(model, step)
                state.sums = state.sums + torch.stack([loss, (logits.argmax(1) == labels).float().mean()])
                state.step += 1

                now = time.monotonic()
                reason = asked[0] if asked else 'the time budget' if now - started > time_budget else ''
                ask = state.step % 20 == 0 or state.step == steps
                stopping = _any_process(bool(reason), ask, world, device)
                if stopping or now - last_saved > checkpoint_every:
                    break

            last_saved = time.monotonic()
            state.seconds += last_saved - began
            if not math.isfinite(state.sums[0].item()):
                raise FloatingPointError(
                    f'the loss is not finite at epoch {state.epoch + 1}, step {state.step}; the checkpoints in '
                    f'{run.checkpoints} are from before. Try a smaller learning rate.')
            if state.step == steps:
                _end_epoch(state, optimizer.param_groups[0]['lr'], steps, recipe.batch_size, world)
                if held_out:
                    measured = evaluate(ema.module if ema else model, held_out, device)
                    state.history[-1] |= {f'holdout_{k}': v for k, v in measured.items()}
                _logger.info('  '.join(f'{k} {v:.4g}' for k, v in state.history[-1].items()))
            run.save(state.to_dict(), state.history)
            if stopping and state.epoch < recipe.epochs:
                _logger.info('stopped by %s after epoch %d, step %d; go on with --resume', reason or 'another process',
                             state.epoch, state.step)
                return None

    if not main:
        return None
    folder = run.path / 'weights'
    export_weights(ema.module if ema else model, folder, {
        'tag': recipe.dataset, 'mean': data.mean, 'std': data.std, 'label_names': data.classes,
        'input_size': tuple(data.images.shape[1:]), 'crop_pct': 1.0})
    for name in ('recipe.json', 'history.csv', 'curves.png'):
        shutil.copy(run.path / name, folder / name)
    return folder
