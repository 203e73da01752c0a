"""The fine-tuning loop. It skips files that become unreadable, runs in one or more processes and can be resumed."""
from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, distribute_bn, random_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from ..data.augment import mixer
from ..data.splits import ENOUGH_TO_CHOOSE
from ..names import duration, some
from ..recipes import FinetuneConfig
from .machine import Machine, fused
from .measure import largest_batch, loss_and_accuracy, make_loader, out_of_memory, predict
from .run import RunControl, RunDir, agreed, any_process, is_best, progress_bar

__all__ = ['BatchTooLarge', 'Finetuner', 'Fitted']


class BatchTooLarge(RuntimeError):
    """A training step does not fit the device's memory.

    Attributes:
        fits: Largest batch size tried that fits, over all processes; 0 if not even one image does.
    """

    def __init__(self, message: str, fits: int):
        super().__init__(message)
        self.fits = fits


@dataclasses.dataclass
class Fitted:
    """The result of a fine-tuning run.

    Attributes:
        network: The network after the last epoch, with EMA weights if they are on.
        history: One row per epoch, or per penalty of a classifier on cached features.
        bad: Why files could not be read during training.
        stopped: Why training ended before the last epoch; '' if it did not.
        interrupted: Whether a signal to any process stopped training.
        penalty: Penalty of a classifier on cached features; 0 otherwise.
        temperature: Temperature by which its weights were divided.
        last: Whether to use the last epoch regardless of the held-out accuracy.
    """
    network: torch.nn.Module
    history: list[dict[str, float]]
    bad: list[str]
    stopped: str = ''
    interrupted: bool = False
    penalty: float = 0.
    temperature: float = 1.
    last: bool = False

    def best_epoch(self) -> int:
        """The epoch of the best weights: the highest held-out accuracy (the later of equals), or the last epoch."""
        if self.penalty:
            return next(row['epoch'] for row in self.history if row['penalty'] == self.penalty)
        if self.last:
            return self.history[-1]['epoch']
        return max(self.history, key=lambda row: (row.get('holdout_accuracy', 0), row['epoch']))['epoch']


class _Unfreezing:
    """Selects the layers to train: all, only the classifier ('head'), or more and more of them ('gradual').

    'gradual' begins with the classifier and unfreezes the stages in the reverse order of timm's `group_matcher`, so
    that all layers train from the middle of the run on. The BatchNorm statistics of frozen layers are frozen too.
    """

    def __init__(self, network: torch.nn.Module, way: str, epochs: int):
        self.network, self.gradual = network, way == 'gradual'
        self.layer = {n: 0 for n, _ in network.named_parameters()}
        if way == 'gradual':
            self.layer = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
        elif way == 'head':
            classifier = network.get_classifier()  # a tuple in distilled networks
            head = {id(p) for part in (classifier if isinstance(classifier, tuple) else [classifier])
                    for p in part.parameters()}
            self.layer = {n: int(id(p) in head) for n, p in network.named_parameters()}
        self.last = max(self.layer.values())
        self.half = epochs // 2

    def train(self, epoch: int) -> None:
        """Put the network into training mode for an epoch, and freeze or unfreeze its layers."""
        self.network.train()
        lowest = self.last
        if self.gradual:
            lowest = self.last - self.last * epoch // self.half if epoch < self.half else 0
        for name, module in self.network.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                frozen = self.layer[f'{name}.{own}' if name else own] < lowest
                parameter.requires_grad_(not frozen)
                if frozen:
                    module.eval()


@dataclasses.dataclass
class _State:
    """Progress of a run, as saved in its checkpoints."""
    epoch: int = 0
    seconds: float = 0.
    epoch_seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def note_bad(self, reasons: list[str]) -> None:
        """Record why files could not be read, without repetitions."""
        self.bad = list(dict.fromkeys([*self.bad, *reasons])) if reasons else self.bad

    def epochs_without_gain(self) -> int:
        """Epochs since the highest held-out accuracy."""
        accuracies = [row['holdout_accuracy'] for row in self.history if 'holdout_accuracy' in row]
        return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


class Finetuner:
    """Trains a network, saving checkpoints between epochs.

    Random numbers depend only on (seed, epoch, process), so that a run resumed at an epoch gives the same result.

    Args:
        network: Network on the accelerator's device, trained in place.
        config: Settings of the training.
        accelerator: Device, precision and gradient accumulation; it splits each batch among the processes.
        control: Run directory, and when to save and to stop.
        machine: Workers, handling of unreadable files, and whether to resume.
        on_epoch: Called with each epoch's row of the history.

    Raises:
        Any error of `RunDir.load_checkpoint`.
    """

    def __init__(
            self,
            network: torch.nn.Module,
            config: FinetuneConfig,
            accelerator: Accelerator,
            control: RunControl,
            machine: Machine = Machine(),  # noqa: B008  (it is frozen)
            on_epoch: Callable[[dict[str, float]], None] | None = None,
    ):
        self.network, self.config, self.accelerator = network, config, accelerator
        self.control, self.machine, self.on_epoch = control, machine, on_epoch
        self.optimizer = create_optimizer_v2(
            network, config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            layer_decay=config.layer_decay if hasattr(network, 'group_matcher') else None,
            # A fused optimizer does not accept a group in which only some layers have started to train. And if the
            # first float16 step overflows, the momentum of fused SGD starts from uninitialised memory.
            **({} if config.train == 'gradual' or accelerator.scaler else fused(config.opt)))
        self.ema = ModelEmaV3(network, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
        self._unfreezing = _Unfreezing(network, config.train, config.epochs)
        self._mix = mixer(config.mixup, config.cutmix, network.num_classes)
        self._state = _State()
        if machine.resume and (found := control.run.load_checkpoint()):
            self._load(found)

    @property
    def averaged(self) -> torch.nn.Module:
        """The network to measure and to export: with EMA weights if they are on."""
        return self.ema.module if self.ema else self.network

    @property
    def seconds(self) -> float:
        """Training time up to the last complete epoch, in seconds."""
        return self._state.seconds

    def fit(
            self,
            train: Dataset,
            holdout: Dataset | None = None,
            class_weights: torch.Tensor | None = None,
    ) -> Fitted:
        """Train to the end, or until the time budget, a signal or early stopping ends the run.

        An epoch that would not finish within the time budget is not started, except the first.

        Args:
            train: Data set of (image, label).
            holdout: Held-out data set, measured after every epoch. It chooses the epoch if it has at least 100 files.
            class_weights: Weights of the classes in the loss, (classes,).

        Raises:
            FloatingPointError: A loss or a weight is no longer finite; earlier checkpoints are kept.
            BatchTooLarge: Out of memory; the message names a batch size that fits.
            ValueError: A file cannot be read and `machine.on_bad` is 'fail'; no file of a batch can be read; or the
                batch size cannot be divided among the processes.
        """
        state, config, accelerator = self._state, self.config, self.accelerator
        model, loader = self._prepare(train)
        if class_weights is not None:
            class_weights = class_weights.to(accelerator.device)
        stopped, amid, saved_epoch, began = '', False, state.epoch, time.monotonic() - state.seconds
        show = self.machine.progress if accelerator.is_main_process else False
        with progress_bar(config.epochs * self._steps, state.epoch * self._steps, show) as bar:
            while state.epoch < config.epochs:
                if stopped := self._reason_to_stop():
                    break
                epoch_began = time.monotonic()
                self._begin_epoch(train, loader)
                row = self._epoch(model, loader, class_weights, bar, holdout=holdout)
                if amid := row is None:
                    stopped = self.control.reason_to_stop() or 'another process'
                    break
                state.epoch += 1
                state.seconds, state.epoch_seconds = time.monotonic() - began, time.monotonic() - epoch_began
                state.history.append({**row, 'seconds': round(state.seconds, 1)})
                if self.control.save_is_due or is_best(state.history):
                    self.control.save(self._saved(), state.history)
                    saved_epoch = state.epoch
                self._tell(state.history[-1])
        if saved_epoch != state.epoch and not amid:  # mid-epoch, the weights are of no complete epoch
            self.control.save(self._saved(), state.history)
            saved_epoch = state.epoch
        if saved_epoch:
            self.control.run.write_history(state.history)
        self._clean_up()
        few = len(holdout or ()) < ENOUGH_TO_CHOOSE and not stopped  # if stopped early, the last epoch may not be best
        bad = list(dict.fromkeys(gather_object(state.bad))) if accelerator.num_processes > 1 else state.bad
        interrupted, = any_process(self.control.signalled, device=accelerator.device)
        return Fitted(self.averaged, state.history, bad, stopped, interrupted, last=few)

    def _prepare(self, train: Dataset) -> tuple[torch.nn.Module, DataLoader]:
        """The network and the loader, prepared by accelerate to share each batch among the processes."""
        config, world = self.config, self.accelerator.num_processes
        self._batch_size = min(config.batch_size, len(train))
        if self._batch_size % world:
            raise ValueError(f'batch size {self._batch_size} cannot be divided among {world} processes')
        self._order = torch.Generator()
        loader = make_loader(train, self._batch_size, self.machine.workers, self.accelerator.device.type == 'cuda',
                             shuffle=True, drop_last=True, generator=self._order)
        self._steps = len(train) // self._batch_size  # less exact from the loader of a stream
        self._timer = _Timer(self.control.run, self._steps)
        self._scheduler, _ = create_scheduler_v2(
            self.optimizer, config.schedule, config.epochs, warmup_epochs=config.warmup_epochs,
            warmup_lr=config.lr / 100, decay_epochs=config.epochs / 3, step_on_epochs=False,
            updates_per_epoch=self._steps)
        model, self._stepper, loader = self.accelerator.prepare(self.network, self.optimizer, loader)
        return model, loader

    def _reason_to_stop(self) -> str:
        """Why the run ends before the next epoch; '' if it does not."""
        state, patience = self._state, self.config.patience
        reason = self.control.reason_to_stop(state.epoch_seconds or -math.inf)
        if not reason and patience and state.epochs_without_gain() >= patience:
            reason = f'{patience} epochs without a better held-out accuracy'
        return agreed(reason)

    def _begin_epoch(self, train: Dataset, loader: DataLoader) -> None:
        epoch, seed = self._state.epoch, self.config.seed * 100_003 + self._state.epoch
        random_seed(seed % 2 ** 32, self.accelerator.process_index)
        self._order.manual_seed(seed)
        if isinstance(train, IterableDataset):
            loader.set_epoch(epoch)  # accelerate counts on from there and informs the stream
            train.set_epoch(epoch)
        self._unfreezing.train(epoch)

    def _epoch(self, *training: Any, holdout: Dataset | None) -> dict[str, float] | None:
        """Train and measure; returns the row of the history, or None if a signal stopped the epoch."""
        try:
            row = self._train(*training)
            return row and row | self._measure(holdout)
        except RuntimeError:
            # the signal also reached the loader's workers, which only forked ones ignore; several processes would wait
            # for one another
            if self.control.signalled and self.accelerator.num_processes == 1:
                return None
            raise

    def _train(
            self,
            model: torch.nn.Module,
            loader: DataLoader,
            class_weights: torch.Tensor | None,
            bar: tqdm,
    ) -> dict[str, float] | None:
        """Train for one epoch; returns its row of the history, or None if a signal stopped it."""
        epoch, world = self._state.epoch, self.accelerator.num_processes
        began, seen, every = time.monotonic(), 0, self.config.accumulate
        total = torch.zeros((), device=self.accelerator.device)
        bar.set_description(f'epoch {epoch + 1}/{self.config.epochs}')
        for step, (images, labels, _, reasons) in enumerate(loader):
            self._timer.tell(step, (self.config.epochs - epoch) * self._steps)
            self._check_readable(reasons, images is None)
            self._scheduler.step_update(epoch * self._steps + step)
            group = min(every, self._steps - step // every * every)  # the last of an epoch may be smaller
            total += self._step(model, images, labels, class_weights, group)
            if self.ema and self.accelerator.sync_gradients:
                self.ema.update(self.network, step=epoch * math.ceil(self._steps / every) + step // every)
            seen += len(labels)
            bar.update()
            if step % 10 == 0 and not bar.disable:
                bar.set_postfix(loss=f'{total.item() / (step + 1):.3f}')
            if (world == 1 or step % 20 == 19) and step < self._steps - 1 and any_process(
                    self.control.signalled, device=total.device)[0]:
                return None
        loss = self.accelerator.reduce(total, 'mean').item() / self._steps
        self.control.check_finite(loss, 'the loss', epoch + 1)
        rate = seen * world / (time.monotonic() - began)
        return {'epoch': epoch + 1, 'lr': max(g['lr'] for g in self.optimizer.param_groups), 'train_loss': loss,
                'images_per_second': round(rate, 1)}

    def _check_readable(self, reasons: list[str], none_left: bool) -> None:
        if reasons and self.machine.on_bad == 'fail':
            raise ValueError(some(reasons, '; '))
        if none_left:
            raise ValueError(f'none of the files of a batch can be read any more: {some(reasons, "; ")}. The '
                             f'checkpoints are kept; fix the files and continue with --resume')
        self._state.note_bad(reasons)

    def _step(
            self,
            model: torch.nn.Module,
            images: torch.Tensor,
            labels: torch.Tensor,
            class_weights: torch.Tensor | None,
            group: int = 1,
    ) -> torch.Tensor:
        """Take a training step on a batch, one of `group` whose gradients are averaged; returns its loss."""
        targets = labels
        if self._mix:
            images, targets = self._mix(images, labels)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.accelerator.accumulate(model):
            try:
                with self.accelerator.autocast():
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), targets, class_weights,
                                       label_smoothing=self.config.label_smoothing)
                self.accelerator.backward(loss * (self.config.accumulate / max(group, 1)))  # it divides by `accumulate`
            except RuntimeError as e:
                if not out_of_memory(e):
                    raise
                loss = logits = None
            if loss is None:  # outside the handler, which keeps the tensors alive
                with self.accelerator.autocast():
                    raise _too_large(self.network, images, self._batch_size, self.accelerator.num_processes)
            self._stepper.step()
            self._stepper.zero_grad()
        return loss.detach()

    def _measure(self, holdout: Dataset | None) -> dict[str, float]:
        """Loss and accuracy on the held-out files, for the history."""
        if self.accelerator.num_processes > 1:  # BatchNorm statistics differ between processes
            distribute_bn(self.averaged, self.accelerator.num_processes, reduce=True)
        if holdout is None:
            return {}
        with self.accelerator.autocast():
            result = predict(self.averaged, holdout, self.accelerator, workers=self.machine.workers)
        self._check_readable(result.bad, none_left=False)
        measured = loss_and_accuracy(result.logits, result.labels)
        self.control.check_finite(measured['loss'], 'the loss on held-out files', self._state.epoch + 1)
        return {f'holdout_{k}': v for k, v in measured.items()}

    def _tell(self, row: dict[str, float]) -> None:
        if not self.accelerator.is_main_process:
            return
        accuracy = f"  held-out accuracy {row['holdout_accuracy']:5.1f} %" if 'holdout_accuracy' in row else ''
        self.control.run.log('epoch %2d/%d  loss %.3f%s  %.0f images/s  %.0f s', row['epoch'], self.config.epochs,
                             row['train_loss'], accuracy, row['images_per_second'], row['seconds'])
        if self.on_epoch:
            self.on_epoch(row)

    def _saved(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {'model': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(),
                'ema': self.ema.module.state_dict() if self.ema else None, 'step': 0, **vars(self._state)}

    def _load(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])
        self._state = _State(**{f.name: saved[f.name] for f in dataclasses.fields(_State)})
        self._state.epoch_seconds = 0.  # perhaps of another machine

    def _clean_up(self) -> None:
        """Release the network from accelerate and unfreeze it."""
        self.accelerator.wait_for_everyone()
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        self.accelerator.free_memory()


class _Timer:
    """Logs the remaining time once, after a few steps; the first step, a warm-up, is not timed."""

    def __init__(self, run: RunDir, steps: int):
        self._run, self._after, self._first, self._told = run, min(10, steps - 1), 0., False

    def tell(self, step: int, left: int) -> None:
        """Call at the start of each step; `left` is the number of steps from the start of this epoch to the end."""
        if self._told:
            return
        if step <= min(1, self._after):
            self._first = time.monotonic()
        if step == self._after and step > 1:
            self._told = True
            seconds = (time.monotonic() - self._first) / (step - 1) * (left - step)
            self._run.log('about %s of training to go', duration(seconds))


def _too_large(network: torch.nn.Module, images: torch.Tensor, batch_size: int, world: int) -> BatchTooLarge:
    network.zero_grad(set_to_none=True)
    shape, device = images.shape[1:], images.device

    def step(n: int) -> None:
        batch = torch.zeros(n, *shape, device=device).contiguous(memory_format=torch.channels_last)
        network(batch).float().sum().backward()

    fits = largest_batch(step, len(images) // 2) * world
    network.zero_grad(set_to_none=True)
    advice = f'use --batch-size {fits} --accumulate {math.ceil(batch_size / fits)} for the same effect' if fits \
        else 'not even one image fits; choose a smaller --input-size or --model'
    return BatchTooLarge(f'out of memory on {device} at batch size {batch_size}; {advice}', fits)
