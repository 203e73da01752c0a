"""Train from scratch by a recipe, with the data set on the device, in one or more processes."""
from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.tracking import get_available_trackers
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..data.augment import AutoAugment, RandAugment, TrivialAugment, mixer
from ..data.on_device import DeviceLoader
from ..data.small_sets import ImageArrays, load
from ..files import atomic_write
from ..recipes import Precision, Recipe, check_numbers
from ..weights import export_weights
from ..wrn import WideResNet
from .accelerator import RunAccelerator
from .machine import Machine, autocast, environment, kept_random_state, resolve_precision
from .measure import evaluate
from .optimizers import create_optimizer
from .run import RunControl, RunDir, any_process, is_best, progress_bar

__all__ = ['Learner', 'ScratchMachine', 'create_model', 'train']

_DOWNLOAD = datetime.timedelta(hours=2)  # processes wait at most so long for the first, which may be downloading


@dataclasses.dataclass(frozen=True)
class ScratchMachine(Machine):
    """Machine settings of training from scratch."""

    precision: Precision = 'auto'
    """'bf16', 'no' (float32), or 'auto': bfloat16 on GPUs and CPUs that are faster in it."""
    compile: bool | None = None
    """Compile the network; None does so on CUDA only. On a CPU this needs a C++ compiler."""
    grad_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass, to save memory. BatchNorm then updates its running
    statistics twice per step, as in timm, so they follow the last batches more closely."""
    checkpoint_every: float = 60.
    """Seconds between checkpoints; more if they are slow to write, so that they take at most a twentieth of the time. 0
    writes one at every step, or at every twentieth step with several processes. The best epoch, and a run that stops,
    are saved at once."""
    tracker: str = ''
    """Experiment tracker for the metrics of every epoch: 'tensorboard', 'wandb', 'trackio' or another that accelerate
    supports."""

    def __post_init__(self):
        super().__post_init__()
        check_numbers({'checkpoint_every': self.checkpoint_every}, math.inf)
        if self.precision == 'fp16':
            raise ValueError("training from scratch does not support precision 'fp16'; choose 'auto', 'bf16' or 'no' "
                             "(float32)")


@dataclasses.dataclass
class _Progress:
    """Progress of a run, as saved in its checkpoints."""
    sums: torch.Tensor  # loss and accuracy, summed over the steps of this epoch
    epoch: int = 0
    step: int = 0  # within the epoch
    timed: int = 0  # steps of this epoch whose time is in `seconds`
    seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def gather(self, rank: int) -> None:
        """Move the sums of all processes to the first one, which saves them."""
        dist.all_reduce(self.sums)
        self.sums *= not rank

    def end_epoch(self, lr: float, size: int, steps: int, batch_size: int, world: int) -> None:
        """Append the epoch's row to the history and move on to the next epoch."""
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
    """A network with the optimizer, schedule and EMA weights of a recipe.

    In a process group, the network is data parallel.

    Args:
        model: Network on its device, trained in place.
        recipe: Settings of the training.
        steps: Optimizer steps per epoch.
        seed: Seed of dropout and mixing. It is combined with the step and the process, so that a resumed run draws the
            same numbers.
        compile: Compile the network; the first step at each image size then takes about a minute.
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
        self._mix = mixer(recipe.mixup, recipe.cutmix, model.num_classes)
        self._parameters, self._buffers = list(model.parameters()), list(model.buffers())
        self._forward, rank = model, 0
        if dist.is_initialized():
            self._forward, rank = DistributedDataParallel(model), dist.get_rank()
        if compile:  # around DDP, to exchange gradients while others are computed
            self._forward = torch.compile(self._forward, dynamic=False)
        self._seed = seed * 1009 + rank
        self.precision = resolve_precision(precision, self.device)
        if self.precision == 'fp16':  # it would need gradient scaling
            self.precision = 'no'

    @property
    def averaged(self) -> torch.nn.Module:
        """The network to measure and to export: with EMA weights if they are on."""
        return self.ema.module if self.ema else self.model

    def step(self, number: int, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take optimizer step `number` of the run; returns mean loss and accuracy, (2,), without synchronizing."""
        self.scheduler.step_update(number)
        torch.manual_seed(self._seed * 1_000_003 + number)
        targets = labels
        if self._mix:
            images, targets = self._mix(images, labels)
            images = images.contiguous(memory_format=torch.channels_last)  # mixing may have changed it
        with _compilation():
            loss, logits = self._backward(images, targets)
        if self.recipe.sam_rho:
            climbed = _climb(self._parameters, self.recipe.sam_rho)
            statistics = [b.clone() for b in self._buffers]  # BatchNorm's, which the second pass would update again
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
        """Weights, optimizer state and EMA weights."""
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Load a `state_dict`, which may come from another device."""
        self.model.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])


@contextlib.contextmanager
def _compilation() -> Iterator[None]:
    """Add advice to errors of torch.compile, which fails without Triton or a C++ compiler."""
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


@torch.no_grad()
def _climb(parameters: list[torch.Tensor], rho: float) -> list[torch.Tensor]:
    """Move by `rho` along the gradient (arXiv:2010.01412, equation 2); returns the steps, to be undone."""
    grads = [p.grad for p in parameters]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    steps = torch._foreach_mul(grads, rho / (norm + 1e-12))
    torch._foreach_add_(parameters, steps)
    return steps


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[tuple[int, int]]:
    """Join the processes that `torchrun` started, if any; yields the rank and the number of processes."""
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(int(os.environ.get('LOCAL_RANK', 0)))
    joining = world > 1 and not dist.is_initialized()
    if joining:
        dist.init_process_group('nccl' if cuda else 'gloo', timeout=_DOWNLOAD)
    yield rank, world
    # not after an error, where this would wait for the others; accelerate's trackers may already have done it
    if joining and dist.is_initialized():
        dist.destroy_process_group()


def _augmentation(recipe: Recipe, size: int) -> torch.nn.Module | None:
    if recipe.trivial_augment:
        return TrivialAugment()
    if recipe.rand_augment:
        return RandAugment(recipe.rand_augment, recipe.rand_magnitude, size)
    if recipe.auto_augment:
        return AutoAugment('svhn' if recipe.dataset == 'svhn' else 'cifar10', size)
    return None


def _data(recipe: Recipe, folder: str, download: bool, rank: int, world: int) -> tuple[ImageArrays, ImageArrays | None]:
    """The training images, and the held-out images if there are any."""
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
    available = [str(t) for t in get_available_trackers()]
    if name not in available:
        raise ValueError(f'tracker {name!r} is not known or not installed; install it (pip install {name}) or choose '
                         f'among {", ".join(available) or "none"}')


@contextlib.contextmanager
def _tracker(name: str, run: RunDir, settings: dict[str, Any], device: torch.device) -> Iterator[Any]:
    """An Accelerator with the requested tracker; None without one."""
    if not name:
        yield None
        return
    tracker = RunAccelerator(device.type, log_with=name, project_dir=run.path)
    told = {k: str(v) if isinstance(v, tuple) else v for k, v in vars(settings['recipe']).items()}
    tracker.init_trackers('wrn_timm', told)
    try:
        yield tracker
    finally:
        tracker.end_training()


def create_model(recipe: Recipe, num_classes: int) -> torch.nn.Module:
    """The network of a recipe, with random weights."""
    return timm.create_model(  # which ignores options that are None
        recipe.model, num_classes=num_classes, stem=recipe.stem or None, conv_drop_rate=recipe.conv_drop_rate or None)


@kept_random_state()
def train(
        recipe: Recipe,
        data_dir: str,
        out: str | Path,
        seed: int = 0,
        half: bool = False,
        machine: ScratchMachine = ScratchMachine(),  # noqa: B008  (it is frozen)
) -> Path | None:
    """Train a network and write a weights folder to the run directory.

    Under `torchrun`, the processes share each batch, and only the first one writes files. On a CPU, the result of a
    resumed run is bit for bit that of an uninterrupted one, even if it stopped in the middle of an epoch.

    Args:
        recipe: Settings of the training.
        data_dir: Folder of the data set's official files.
        out: Run directory.
        seed: Seed of the weights, the order and the augmentation.
        half: Export convolution and linear weights in half precision.
        machine: Device, precision, time budget...

    Returns:
        The weights folder; None if the run was stopped early (by the time budget, SIGTERM or Ctrl-C), and in all
        processes but the first.

    Raises:
        FloatingPointError: The loss is no longer finite; earlier checkpoints are kept.
        Any error of `load` and `RunDir`.
    """
    deadline, device = machine.deadline(), torch.device(machine.device)
    settings = {'recipe': recipe, 'seed': seed}
    _check_tracker(machine.tracker)
    with contextlib.ExitStack() as stack:
        rank, world = stack.enter_context(_processes(device))
        stack.callback(setattr, torch.backends.cudnn, 'benchmark', torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = True  # shapes stay the same
        if not rank:
            RunDir.check(out, settings, machine.resume)  # before the data is read
        data, held_out = _data(recipe, data_dir, machine.download, rank, world)
        loader = DeviceLoader(
            data, recipe.batch_size, device, pad=recipe.pad, flip=recipe.flip, alternate_flip=recipe.alternate_flip,
            cutout=recipe.cutout, augment=_augmentation(recipe, data.images.shape[-1]), seed=seed, rank=rank,
            world_size=world)
        learner = _learner(recipe, len(data.classes), len(loader), seed, machine)
        run = RunDir(out, settings, machine.resume, write=not rank, device=device,
                     notes={'precision': learner.precision})
        control = RunControl(run, deadline, machine.checkpoint_every)
        tracker = stack.enter_context(_tracker(machine.tracker, run, settings, device))
        loop = _Loop(learner, loader, held_out, control, tracker)
        if machine.resume and (saved := run.load_checkpoint()):
            loop.load_state_dict(saved)
            del saved  # as large as the network, the optimizer and the EMA weights together
        run.log('%s on %s, precision %s, %d process(es), from epoch %d, step %d', recipe.model, device,
                learner.precision, world, loop.progress.epoch, loop.progress.step)
        run.log(', '.join(f'{k} {v}' for k, v in environment(device).items()))
        stack.enter_context(control)
        finished = loop.run(machine.progress)
    return _export(recipe, learner, data, half, run) if finished and not rank else None


def _learner(recipe: Recipe, classes: int, steps: int, seed: int, machine: ScratchMachine) -> Learner:
    device = torch.device(machine.device)
    cuda = device.type == 'cuda'
    torch.manual_seed(seed)
    model = create_model(recipe, classes).to(device, memory_format=torch.channels_last)
    if machine.grad_checkpointing:
        model.set_grad_checkpointing()
    compile = cuda if machine.compile is None else machine.compile
    return Learner(model, recipe, steps, seed, compile, machine.precision)


def _export(recipe: Recipe, learner: Learner, data: ImageArrays, half: bool, run: RunDir) -> Path:
    folder = run.path / 'weights'
    export_weights(learner.averaged, folder, {
        'tag': recipe.tag or recipe.dataset, 'mean': data.mean, 'std': data.std, 'label_names': data.classes,
        'input_size': tuple(data.images.shape[1:]), 'crop_pct': 1.0,
        # not those of weights that others trained for the same network
        **({} if isinstance(learner.averaged, WideResNet) else {'license': None, 'origin_url': None})}, half)
    for name in ('recipe.json', 'history.csv', 'curves.png'):
        atomic_write(folder / name, partial(shutil.copyfile, run.path / name))
    return folder


class _Loop:
    """The training loop, which can stop after any step.

    Args:
        learner: The network to train.
        loader: Training batches.
        held_out: Held-out images, measured after every epoch; None for none.
        control: Run directory, and when to save and to stop.
        tracker: Accelerator whose tracker gets the metrics of every epoch; None for none.
    """

    def __init__(
            self,
            learner: Learner,
            loader: DeviceLoader,
            held_out: ImageArrays | None,
            control: RunControl,
            tracker: Any,
    ):
        self.learner, self.loader, self.held_out, self.control, self.tracker = (
            learner, loader, held_out, control, tracker)
        self.recipe, self.device, self.steps = learner.recipe, learner.device, len(loader)
        self.progress = _Progress(torch.zeros(2, device=self.device))
        self._warm = 0  # the size that the network is compiled for

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Resume from a checkpoint."""
        self.learner.load_state_dict(saved)
        self.progress = _Progress(**{f.name: saved[f.name] for f in dataclasses.fields(_Progress)})
        self.progress.sums = self.progress.sums.to(self.device) * (not self.loader.rank)  # summed over all processes

    def run(self, show: bool | None = None) -> bool:
        """Train to the end; returns False if the run stopped before it.

        Args:
            show: Whether to show a progress bar; None shows it only in a terminal.
        """
        progress, run = self.progress, self.control.run
        done = progress.epoch * self.steps + progress.step
        with progress_bar(self.recipe.epochs * self.steps, done, False if self.loader.rank else show) as bar:
            while progress.epoch < self.recipe.epochs:
                stop, due = self._train(bar)
                if progress.step == self.steps:
                    self._end_epoch()
                    due |= progress.epoch == self.recipe.epochs or is_best(progress.history)
                elif self.loader.world_size > 1:
                    progress.gather(self.loader.rank)
                if due or stop:
                    self.control.save({**self.learner.state_dict(), **vars(progress)}, progress.history)
                else:  # no checkpoint and no curves, which can take longer than an epoch
                    run.write_history(progress.history, draw=False)
                if stop and progress.epoch < self.recipe.epochs:
                    self.control.log_stop(self.control.reason_to_stop() or 'another process')
                    return False
        run.write_history(progress.history)
        return True

    def _train(self, bar: tqdm) -> tuple[bool, bool]:
        """Train until the epoch ends, the run has to stop or a checkpoint is due; returns the latter two."""
        progress, size = self.progress, self.recipe.size_at(self.progress.epoch, self.loader.size[0])
        self.learner.model.train()
        if not progress.step:
            progress.sums = torch.zeros_like(progress.sums)
        bar.set_description(f'epoch {progress.epoch + 1}/{self.recipe.epochs}')
        began, first_timed, stop, due = time.monotonic(), progress.step, False, False
        for images, labels in self.loader.epoch(progress.epoch, progress.step, size):
            result = self.learner.step(progress.epoch * self.steps + progress.step, images, labels)
            progress.sums = progress.sums + result
            progress.step += 1
            bar.update()
            if self._warm != size:  # the step that compiles is timed separately
                torch.cuda.synchronize() if self.device.type == 'cuda' else None
                self.control.run.log(
                    'first step at %d px, including compilation: %.1f s', size, time.monotonic() - began)
                self._warm, began, first_timed = size, time.monotonic(), progress.step
            if self.loader.world_size == 1 or progress.step % 20 == 0 or progress.step == self.steps:
                due = self.control.save_is_due and not self.loader.rank
                stop, due = any_process(bool(self.control.reason_to_stop()), due, device=self.device)
                if stop or due:
                    break
        self.control.check_finite(progress.sums[0].item(), 'the loss', progress.epoch + 1)  # waits for the device
        progress.seconds += time.monotonic() - began
        progress.timed += progress.step - first_timed
        return stop, due

    def _end_epoch(self) -> None:
        progress = self.progress
        size = self.recipe.size_at(progress.epoch, self.loader.size[0])
        progress.end_epoch(self.learner.optimizer.param_groups[0]['lr'], size, self.steps, self.recipe.batch_size,
                           self.loader.world_size)
        row = progress.history[-1]
        if self.held_out:
            measured = evaluate(self.learner.averaged, self.held_out, self.device, self.learner.precision)
            self.control.check_finite(measured['loss'], 'the loss on held-out images', progress.epoch)
            row |= {f'holdout_{k}': v for k, v in measured.items()}
        self.control.run.log('  '.join(f'{k} {v:.4g}' for k, v in row.items()))
        if self.tracker:
            self.tracker.log(row, step=progress.epoch)
