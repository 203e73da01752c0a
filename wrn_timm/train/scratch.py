"""Training from scratch: one recipe, one data set on the device, one run directory, any number of processes."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

from ..data.augment import AutoAugment, RandAugment, TrivialAugment
from ..data.on_device import DeviceLoader
from ..data.small_sets import ImageArrays, load
from ..files import atomic_write
from .machine import Precision, autocast, resolve_precision
from .optimizers import create_optimizer
from .recipes import Recipe, check_numbers
from .run import RunDir, environment, export_weights, is_best, stop_requests

__all__ = ['Learner', 'create_model', 'evaluate', 'train']

_SHARE_OF_SAVING = 20  # of the time, at most one part is spent on checkpoints


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        data: ImageArrays,
        device: torch.device,
        batch_size: int = 500,
        precision: Precision = 'no',
) -> dict[str, float]:
    """Mean loss and accuracy in % of a model on images as they are, normalised by the data set's statistics."""
    model.eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))
    loss = correct = torch.zeros((), device=device)
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        labels = labels.to(device)
        images = (images.to(device).float() / 255 - mean) / std
        with autocast(device, resolve_precision(precision, device)):
            logits = model(images.contiguous(memory_format=torch.channels_last)).float()
        loss = loss + F.cross_entropy(logits, labels, reduction='sum')
        correct = correct + (logits.argmax(1) == labels).sum()
    return {'loss': loss.item() / len(data), 'accuracy': 100 * correct.item() / len(data)}


@dataclasses.dataclass
class _Progress:
    """How far a run is, and what its records say."""
    sums: torch.Tensor  # of loss and of hits, in this epoch
    epoch: int = 0
    step: int = 0  # within the epoch
    timed: int = 0  # steps of it that `seconds` has the time of
    seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def gather(self, rank: int) -> None:
        """Move the sums of all processes to the first, which writes them down."""
        dist.all_reduce(self.sums)
        self.sums *= not rank

    def end_epoch(self, lr: float, size: int, steps: int, batch_size: int, world: int) -> None:
        """Put the epoch's line into the history, and the position at the start of the next."""
        if world > 1:
            dist.all_reduce(self.sums)
        loss, hits = (self.sums / (steps * world)).tolist()
        before = self.history[-1]['seconds'] if self.history else 0.
        self.history.append({
            'epoch': self.epoch + 1, 'lr': lr, 'size': size, 'train_loss': loss, 'train_accuracy': 100 * hits,
            'seconds': round(self.seconds, 2),
            'images_per_second': round(self.timed * batch_size / max(self.seconds - before, 1e-9))})
        self.epoch, self.step, self.timed = self.epoch + 1, 0, 0


class Learner:
    """A network with its optimiser, schedule and averaged weights, as a recipe has them.

    In a process group the network is data parallel.

    Args:
        model: On its device; trained in place.
        recipe: How.
        steps: Optimiser steps an epoch.
        seed: Of dropout and mixing, together with the step and the process: a resumed run draws the same.
        compile: Compile the network; the first step at each image size then takes a minute or so.
        precision: 'bf16', 'no' (float32), or 'auto': bfloat16 on GPUs and CPUs that are faster in it.
    """

    def __init__(
            self,
            model: torch.nn.Module,
            recipe: Recipe,
            steps: int,
            seed: int = 0,
            compile: bool = False,
            precision: Precision = 'auto',
    ):
        self.device = next(model.parameters()).device
        cuda = self.device.type == 'cuda'
        if recipe.sync_batchnorm:
            if not cuda:
                raise ValueError('sync_batchnorm works on CUDA devices only; leave it off')
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        self.model, self.recipe = model, recipe
        self.optimizer = create_optimizer(model, recipe)
        self.ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
        self.scheduler = _schedule(recipe, self.optimizer, steps)
        self._mix = _mixer(recipe, model.num_classes)
        self._parameters, self._buffers = list(model.parameters()), list(model.buffers())
        self._forward, rank = model, 0
        if dist.is_initialized():
            self._forward, rank = DistributedDataParallel(model), dist.get_rank()
        if compile:  # around it, so that gradients are exchanged while others are computed
            self._forward = torch.compile(self._forward, dynamic=False)
        self._seed = seed * 1009 + rank
        self.precision = resolve_precision(precision, self.device)
        if self.precision == 'fp16':  # its gradients would have to be scaled
            self.precision = 'no'

    @property
    def averaged(self) -> torch.nn.Module:
        """The network to measure and to export."""
        return self.ema.module if self.ema else self.model

    def step(self, number: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take optimiser step `number` of the run; returns (2,): mean loss and share of hits, without waiting."""
        self.scheduler.step_update(number)
        torch.manual_seed(self._seed * 1_000_003 + number)
        targets = labels
        if self._mix:
            images, targets = self._mix(images, labels)
            images = images.contiguous(memory_format=torch.channels_last)  # which rolling may have undone
        with _compilation():
            loss, logits = self._backward(images, targets)
        if self.recipe.sam_rho:
            climbed = _climb(self._parameters, self.recipe.sam_rho)
            statistics = [b.clone() for b in self._buffers]  # BatchNorm's, which the second pass would take again
            self._backward(images, targets)
            for buffer, kept in zip(self._buffers, statistics, strict=True):
                buffer.copy_(kept)
            torch._foreach_sub_([p.data for p in self._parameters], climbed)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model, number)
        return torch.stack([loss, (logits.argmax(1) == labels).float().mean()])

    def _backward(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad()
        with autocast(self.device, self.precision):
            logits = self._forward(images)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.recipe.label_smoothing)
        loss.backward()
        return loss.detach(), logits.detach()

    def state_dict(self) -> dict[str, Any]:
        """Weights, momentum and averaged weights."""
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, on this device or another."""
        self.model.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])


@contextlib.contextmanager
def _compilation() -> Iterator[None]:
    """Say what to do where the compiler fails, as it does without Triton or a C++ compiler."""
    try:
        yield
    except Exception as e:
        if not isinstance(e, torch._dynamo.exc.TorchDynamoException):
            raise
        raise RuntimeError(
            f'torch.compile failed ({" ".join(str(e).split()[:40])}); --no-compile trains without it') from e


def _schedule(recipe: Recipe, optimizer: torch.optim.Optimizer, steps: int) -> Scheduler:
    stepwise, linear = recipe.schedule == 'step', recipe.schedule == 'linear'
    scheduler, _ = create_scheduler_v2(
        optimizer, {'step': 'multistep', 'linear': 'poly'}.get(recipe.schedule, recipe.schedule),
        recipe.epochs if stepwise else recipe.epochs - recipe.warmup_epochs, decay_milestones=recipe.drop_epochs,
        decay_rate=1. if linear else recipe.drop_factor,  # the power of 'poly'
        warmup_epochs=recipe.warmup_epochs, warmup_prefix=not stepwise, warmup_lr=recipe.lr / 100, step_on_epochs=False,
        updates_per_epoch=steps)
    return scheduler


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


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """This process's rank and the number of processes that `torchrun` started, joined for as long as it is open."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    joining = world > 1 and not dist.is_initialized()
    if joining:
        dist.init_process_group('nccl' if cuda else 'gloo')
    yield rank, world
    # not after an error: it would wait for the others; and accelerate's trackers end it themselves
    if joining and dist.is_initialized():
        dist.destroy_process_group()


def _any_process(flags: tuple[bool, ...], ask: bool, world: int, device: torch.device) -> tuple[bool, ...]:
    """Which flags any process raised. The others are asked, and waited for, where `ask` is set on all."""
    if world == 1:
        return flags
    if not ask:
        return (False,) * len(flags)
    raised = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(map(bool, raised.tolist()))


def _augmentation(recipe: Recipe, size: int) -> torch.nn.Module | None:
    if recipe.trivial_augment:
        return TrivialAugment()
    if recipe.rand_augment:
        return RandAugment(recipe.rand_augment, recipe.rand_magnitude, size)
    if recipe.auto_augment:
        return AutoAugment('svhn' if recipe.dataset == 'svhn' else 'cifar10', size)
    return None


def _data(recipe: Recipe, folder: str, download: bool, rank: int, world: int) -> tuple[ImageArrays, ImageArrays | None]:
    """The images to train on, and those held out."""
    if rank:
        dist.barrier()  # the first process may be downloading
    data = load(recipe.dataset, folder, train=True, download=download and not rank)
    if world > 1 and not rank:
        dist.barrier()
    if not recipe.holdout:
        return data, None
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data.subset(order[recipe.holdout:]), data.subset(order[:recipe.holdout])


def _check_tracker(name: str) -> None:
    if not name:
        return
    from accelerate.tracking import get_available_trackers  # takes seconds to import, and few ask for it
    available = [str(t) for t in get_available_trackers()]
    if name not in available:
        raise ValueError(f'tracker {name!r} is not known or not installed; install it (pip install {name}) or choose '
                         f'among {", ".join(available) or "none"}')


@contextlib.contextmanager
def _tracker(name: str, run: RunDir, settings: dict[str, Any], device: torch.device) -> Iterator[Any]:
    """accelerate with the one tracker asked for, or None."""
    if not name:
        yield None
        return
    from accelerate import Accelerator
    tracker = Accelerator(cpu=device.type == 'cpu', log_with=name, project_dir=run.path)
    told = {k: str(v) if isinstance(v, tuple) else v for k, v in vars(settings['recipe']).items()}
    tracker.init_trackers('wrn_timm', told)
    try:
        yield tracker
    finally:
        tracker.end_training()


def create_model(recipe: Recipe, num_classes: int) -> torch.nn.Module:
    """The network of a recipe, with fresh weights."""
    return timm.create_model(recipe.model, num_classes=num_classes, **_model_args(recipe), **(
        {'conv_drop_rate': recipe.conv_drop_rate} if recipe.conv_drop_rate else {}))


def _model_args(recipe: Recipe) -> dict[str, Any]:
    """What the network's shape depends on beside its name."""
    return {'stem': recipe.stem} if recipe.stem else {}


def train(
        recipe: Recipe,
        data_dir: str,
        out: str | Path,
        device: str = 'cpu',
        seed: int = 0,
        time_budget: float = math.inf,
        checkpoint_every: float = 60.,
        resume: bool = False,
        download: bool = False,
        compile: bool | None = None,
        grad_checkpointing: bool = False,
        half: bool = False,
        tracker: str = '',
        precision: Precision = 'auto',
) -> Path | None:
    """Train a network and leave a weights folder in the run directory.

    Started by `torchrun`, the processes share each batch, and the first one writes.

    Args:
        recipe: How.
        data_dir: Folder of the data set's official files.
        out: Run directory.
        device: 'cpu' or 'cuda'.
        seed: Of the weights, the order and the augmentation.
        time_budget: Seconds after which the run stops, to be resumed.
        checkpoint_every: Seconds between checkpoints, and more where they are slow to write, so that they take at most
            a twentieth of the time; 0 writes one every step, or every twentieth where processes have to agree. The best
            epoch and a run that stops have theirs at once.
        resume: Go on with the run in `out`: bit for bit on a CPU, from the middle of an epoch too.
        download: Fetch the data set if it is missing.
        compile: Compile the network; None does so on CUDA alone. On a CPU it needs a C++ compiler.
        grad_checkpointing: Recompute the activations of each block in the backward pass, for memory.
        half: Export convolution and linear weights in half precision.
        tracker: 'tensorboard', 'wandb', 'trackio' or another of accelerate's, told of every epoch.
        precision: 'bf16', 'no' (float32), or 'auto': bfloat16 on GPUs and CPUs that are faster in it.

    Returns:
        The weights folder, or None if the run was stopped (by the budget, SIGTERM or Ctrl-C) before its end.

    Raises:
        FloatingPointError: The loss is no longer finite; the checkpoints before it stand.
        What `load` and `RunDir` raise.
    """
    check_numbers({'time_budget': time_budget, 'checkpoint_every': checkpoint_every}, math.inf)
    deadline = time.monotonic() + time_budget
    device = torch.device(device)
    cuda = device.type == 'cuda'
    settings = {'recipe': recipe, 'seed': seed}
    _check_tracker(tracker)
    with contextlib.ExitStack() as stack:
        rank, world = stack.enter_context(_processes(device))
        if not rank:
            RunDir.check(out, settings, resume)  # before the data is read
        data, held_out = _data(recipe, data_dir, download, rank, world)
        loader = DeviceLoader(
            data, recipe.batch_size, device, pad=recipe.pad, flip=recipe.flip, alternate_flip=recipe.alternate_flip,
            cutout=recipe.cutout, augment=_augmentation(recipe, data.images.shape[-1]), seed=seed, rank=rank,
            world_size=world)
        steps = len(loader)

        torch.manual_seed(seed)
        torch.backends.cudnn.benchmark |= cuda  # shapes stay the same
        model = create_model(recipe, len(data.classes)).to(device, memory_format=torch.channels_last)
        if grad_checkpointing:
            model.set_grad_checkpointing()
        learner = Learner(model, recipe, steps, seed, cuda if compile is None else compile, precision)
        progress = _Progress(torch.zeros(2, device=device))

        run = RunDir(out, settings, resume, write=not rank, device=device, notes={'precision': learner.precision})
        tracking = stack.enter_context(_tracker(tracker, run, settings, device))
        if resume and (saved := run.load_checkpoint()):
            learner.load_state_dict(saved)
            progress = _Progress(**{f.name: saved[f.name] for f in dataclasses.fields(_Progress)})
            progress.sums = progress.sums.to(device) * (not rank)  # they are of all processes
            del saved  # as large as the network, the optimiser and the average together
        run.log('%s on %s, precision %s, %d process(es), from epoch %d, step %d', recipe.model, device,
                learner.precision, world, progress.epoch, progress.step)
        run.log(', '.join(f'{k} {v}' for k, v in environment(device).items()))

        asked = stack.enter_context(stop_requests())
        last_saved, saving, stopping, due, warm = time.monotonic(), 0., False, False, 0
        while progress.epoch < recipe.epochs:
            model.train()
            size = recipe.size_at(progress.epoch, data.images.shape[-1])
            if not progress.step:
                progress.sums = torch.zeros_like(progress.sums)
            batches = tqdm(
                loader.epoch(progress.epoch, progress.step, size), desc=f'epoch {progress.epoch + 1}/{recipe.epochs}',
                total=steps, initial=progress.step, unit='img', unit_scale=recipe.batch_size, leave=False,
                disable=True if rank else None)
            began, first_timed = time.monotonic(), progress.step
            for images, labels in batches:
                result = learner.step(progress.epoch * steps + progress.step, images, labels)
                progress.sums = progress.sums + result
                progress.step += 1
                if warm != size:  # the step that compiles is told apart
                    torch.cuda.synchronize() if cuda else None
                    run.log('first step at %d px, compilation included: %.1f s', size, time.monotonic() - began)
                    warm, began, first_timed = size, time.monotonic(), progress.step

                now = time.monotonic()
                reason = asked[0] if asked else 'the time budget' if now > deadline else ''
                ask = progress.step % 20 == 0 or progress.step == steps
                due = not rank and now - last_saved > checkpoint_every + _SHARE_OF_SAVING * saving
                stopping, due = _any_process((bool(reason), due), ask, world, device)
                if stopping or due:
                    break

            finite = math.isfinite(progress.sums[0].item())  # waits for the device
            now = time.monotonic()
            progress.seconds += now - began
            progress.timed += progress.step - first_timed
            if not finite:
                raise FloatingPointError(
                    f'the loss is not finite at epoch {progress.epoch + 1}, step {progress.step}; the checkpoints in '
                    f'{run.checkpoints} are from before. Try a smaller learning rate.')
            if progress.step == steps:
                progress.end_epoch(
                    learner.optimizer.param_groups[0]['lr'], size, steps, recipe.batch_size, world)
                row = progress.history[-1]
                if held_out:
                    measured = evaluate(learner.averaged, held_out, device, precision=learner.precision)
                    row |= {f'holdout_{k}': v for k, v in measured.items()}
                    if not math.isfinite(row['holdout_loss']):
                        raise FloatingPointError(
                            f'the loss on held-out images is not finite after epoch {progress.epoch}; the checkpoints '
                            f'in {run.checkpoints} are from before. Try a smaller learning rate.')
                run.log('  '.join(f'{k} {v:.4g}' for k, v in row.items()))
                if tracking:
                    tracking.log(row, step=progress.epoch)
                due |= progress.epoch == recipe.epochs or is_best(progress.history)
            elif world > 1:
                progress.gather(rank)
            if due or stopping:
                run.save({**learner.state_dict(), **vars(progress)}, progress.history)
                last_saved = time.monotonic()
                saving = last_saved - now if checkpoint_every else 0.
            else:  # an epoch can be shorter than writing its checkpoint, or drawing its curves, takes
                run.write_history(progress.history, draw=False)
            if stopping and progress.epoch < recipe.epochs:
                run.log('stopped by %s after epoch %d, step %d; go on with --resume', reason or 'another process',
                        progress.epoch, progress.step)
                return None

        if rank:
            return None
        folder = run.path / 'weights'
        export_weights(learner.averaged, folder, {
            'tag': recipe.tag or recipe.dataset, 'mean': data.mean, 'std': data.std, 'label_names': data.classes,
            'input_size': tuple(data.images.shape[1:]), 'crop_pct': 1.0}, half, _model_args(recipe))
        for name in ('recipe.json', 'history.csv', 'curves.png'):
            atomic_write(folder / name, partial(shutil.copyfile, run.path / name))
        return folder
