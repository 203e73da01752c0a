"""The loop that fine-tunes: epochs over a data set that may lose files, on any devices, resumed at any epoch."""
from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from timm.data import Mixup
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, random_seed
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..data.folders import ReadableOnly, collate_readable, some
from .machine import fused
from .measure import predict_logits
from .recipes import FinetuneConfig
from .run import RunDir, duration, is_best

__all__ = ['ENOUGH_TO_CHOOSE', 'BatchTooLarge', 'Features', 'Fitted', 'Predictions', 'fit', 'largest_batch',
           'make_loader', 'predict']

ENOUGH_TO_CHOOSE = 100  # held-out files, to choose the epoch by; with fewer a file is more than epochs differ
_SECONDS_BETWEEN_DRAWINGS = 30
_SHARE_OF_SAVING = 10  # of the time, at most one part is spent on checkpoints


class Features(Dataset):
    """Features (N, C), or images (N, C, H, W), held in memory, and labels (N,); a batch is taken at once."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[i], self.labels[i]

    def __getitems__(self, index: Sequence[int]) -> tuple:
        index = torch.as_tensor(index)
        return self.features[index], self.labels[index], index, []


def make_loader(dataset: Dataset, batch_size: int, workers: int, pin: bool = False, **kwargs: Any) -> DataLoader:
    """Batches of (images, labels, indices into the data set that a Subset is of, why others could not be read)."""
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(inner, Features):
        return DataLoader(dataset, batch_size, collate_fn=_as_it_is, **kwargs)
    if isinstance(inner, IterableDataset):
        if inner is not dataset:
            raise ValueError('a data set that is streamed runs in one process')
        return DataLoader(dataset, batch_size, collate_fn=_with_none_unread, drop_last=kwargs.get('drop_last', False))
    readable = Subset(ReadableOnly(inner), dataset.indices) if inner is not dataset else ReadableOnly(dataset)
    return DataLoader(
        readable, batch_size, num_workers=min(workers, math.ceil(len(dataset) / batch_size)),
        collate_fn=collate_readable, pin_memory=pin, **kwargs)


def _with_none_unread(batch: Any) -> Any:
    return *default_collate(batch), []


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a network says of the readable images of a data set.

    Attributes:
        logits: (N, classes), float32, on the CPU.
        labels: int64 (N,).
        index: int64 (N,): place in the data set.
        bad: Why the other images could not be read.
    """
    logits: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor
    bad: list[str]


def predict(
        network: torch.nn.Module,
        dataset: Dataset,
        accelerator: Accelerator,
        batch_size: int = 64,
        workers: int = 0,
        title: str = '',
        progress: bool | None = None,
) -> Predictions:
    """Run a network over a data set, shared among the processes; each gets the whole result.

    It computes in float32, unless it is called within `accelerator.autocast()`.

    Args:
        network: In evaluation mode afterwards.
        dataset: Of (image, label).
        accelerator: Knows the device and the other processes.
        batch_size: Images a step and process; fewer where they do not fit the device's memory.
        workers: Processes that read images.
        title: Of the progress bar, which is not shown where it is empty.
        progress: False shows no bar; None shows it in a terminal.

    Raises:
        RuntimeError: Out of memory with one image.
        ValueError: No image could be read.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = dataset if world == 1 else Subset(dataset, range(rank, len(dataset), world))
    index, bad = [], []

    def readable(batch_size: int):
        index.clear(), bad.clear()
        batches = make_loader(mine, batch_size, workers, accelerator.device.type == 'cuda')
        show = title and accelerator.is_main_process and progress is not False
        for images, labels, i, reasons in tqdm(
                batches, desc=title, unit='batch', leave=False, disable=None if show else True):
            bad.extend(reasons)
            if images is not None:
                index.append(i)
                yield images, labels

    found: list[torch.Tensor] = []

    def run(batch_size: int) -> None:
        found[:] = predict_logits(network, readable(batch_size), accelerator.device)

    if len(mine) and not largest_batch(run, batch_size):
        raise RuntimeError(f'not even one image fits into the memory of {accelerator.device}; choose a smaller '
                           f'--input-size or --model')
    mine = [*found, torch.cat(index)] if index else []
    gathered = gather_object([(mine, bad)]) if world > 1 else [(mine, bad)]
    bad = [reason for _, reasons in gathered for reason in reasons]
    parts = [part for part, _ in gathered if part]
    if not parts:
        raise ValueError(f'no image can be read: {some(bad, "; ")}')
    logits, labels, order = (torch.cat(column) for column in zip(*parts, strict=True))
    by_place = order.argsort()
    return Predictions(logits[by_place], labels[by_place], order[by_place], bad)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether this says that memory was short; oneDNN, on a CPU, says it in its own words."""
    return should_reduce_batch_size(error) or str(error).startswith('could not create a ')


def largest_batch(step: Callable[[int], None], start: int) -> int:
    """The largest of `start`, `start / 2`, `start / 4`... that fits the device's memory; 0 if none does.

    Args:
        step: Runs with this batch size.
        start: First size tried.
    """
    while start:
        try:
            step(start)
            return start
        except RuntimeError as e:
            if not _out_of_memory(e):
                raise
        clear_device_cache(garbage_collection=True)
        start //= 2
    return 0


class BatchTooLarge(RuntimeError):
    """A step does not fit the device's memory.

    Attributes:
        fits: The batch size that was tried and fits, over all processes; 0 where not even one image does.
    """

    def __init__(self, message: str, fits: int):
        super().__init__(message)
        self.fits = fits


@dataclasses.dataclass
class Fitted:
    """What `fit` leaves.

    Attributes:
        network: The last epoch's weights, averaged ones where they are asked for.
        history: A line an epoch, or a penalty of the classifier on cached features.
        bad: Why files could not be read while training went on.
        stopped: Why it ended before the last epoch; '' if it did not.
        earlier: Seconds of it that a run it goes on with took.
        penalty: Of the classifier on cached features; 0 for other ways.
        last: Whether the last epoch is the one to take, whatever the held-out files say.
    """
    network: torch.nn.Module
    history: list[dict[str, float]]
    bad: list[str]
    stopped: str = ''
    earlier: float = 0.
    penalty: float = 0.
    last: bool = False

    def best_epoch(self) -> int:
        """The epoch most accurate on the held-out files (the later of equals), or the last where they do not choose."""
        if self.penalty:
            return next(row['epoch'] for row in self.history if row['penalty'] == self.penalty)
        if self.last:
            return self.history[-1]['epoch']
        return max(self.history, key=lambda row: (row.get('holdout_accuracy', 0), row['epoch']))['epoch']


class _Unfreezing:
    """Which layers train: none but the last at first, all from the middle of the run on, one stage after another.

    The order is timm's own (`group_matcher`), from the classifier to the stem. A frozen layer's BatchNorm statistics
    stand still too.
    """

    def __init__(self, network: torch.nn.Module, way: str, epochs: int):
        self.network, self.gradual = network, way == 'gradual'
        self.layer = {n: 0 for n, _ in network.named_parameters()}
        if way == 'gradual':
            self.layer = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
        elif way == 'head':
            head = {id(p) for p in network.get_classifier().parameters()}
            self.layer = {n: int(id(p) in head) for n, p in network.named_parameters()}
        self.last = max(self.layer.values())
        self.every = max(1, epochs // 2 / max(1, self.last))

    def train(self, epoch: int) -> None:
        """Set the network up for an epoch."""
        self.network.train()
        lowest = max(0, self.last - int(epoch // self.every)) if self.gradual else self.last
        for name, module in self.network.named_modules():
            for own, parameter in module.named_parameters(recurse=False):
                frozen = self.layer[f'{name}.{own}' if name else own] < lowest
                parameter.requires_grad_(not frozen)
                if frozen:
                    module.eval()


def fit(
        network: torch.nn.Module,
        train: Dataset,
        holdout: Dataset | None,
        config: FinetuneConfig,
        run: RunDir,
        accelerator: Accelerator,
        way: str = 'all',
        class_weights: torch.Tensor | None = None,
        mix: Mixup | None = None,
        workers: int = 0,
        on_bad: str = 'skip',
        resume: bool = False,
        deadline: float = math.inf,
        progress: bool | None = None,
        on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Train a network, keeping a checkpoint an epoch.

    All that is drawn at random is keyed by (seed, epoch), so that a run resumed at an epoch gives the same result.

    Args:
        network: On the accelerator's device.
        train: Of (image, label).
        holdout: Measured every epoch, to choose the epoch by where there are a hundred; None for none.
        config: How.
        run: Where checkpoints and history go.
        accelerator: Device, precision, processes and accumulation; it shares each batch among the processes.
        way: 'all', 'gradual', or 'head' (the classifier alone).
        class_weights: (classes,), of the loss.
        mix: Mixes pairs of images.
        workers: Processes that read images.
        on_bad: 'fail' stops at the first file that cannot be read any more, 'skip' names it and goes on.
        resume: Go on from the last checkpoint.
        deadline: `time.monotonic()` at which the run stops, at the end of an epoch; the first is always finished.
        progress: False shows no bar; None shows it in a terminal.
        on_epoch: Called with each line of the history.

    Raises:
        FloatingPointError: A loss is no longer finite, or a weight; the checkpoints before it stand.
        BatchTooLarge: Out of memory; the batch size that would fit is named.
        ValueError: A file cannot be read, with 'fail', or none of a whole batch can.
    """
    batch_size, world = min(config.batch_size, len(train)), accelerator.num_processes
    if batch_size % world:
        raise ValueError(f'batch size {batch_size} does not divide among {world} processes')
    order = torch.Generator()
    loader = make_loader(
        train, batch_size, workers, accelerator.device.type == 'cuda', shuffle=True, drop_last=True, generator=order)
    optimizer = create_optimizer_v2(
        network, config.opt, lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
        layer_decay=config.layer_decay if hasattr(network, 'group_matcher') else None,
        # it takes no group in which some layers have begun to train and some have not
        **({} if way == 'gradual' else fused(config.opt)))
    unfreezing = _Unfreezing(network, way, config.epochs)
    ema = ModelEmaV3(network, decay=config.ema_decay, use_warmup=True) if config.ema_decay else None
    state = _State(network, optimizer, ema)
    if resume and (found := run.load_checkpoint()):
        state.load_dict(found)
        del found  # as large as the network, the optimiser and the average together
    model, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    steps = len(train) // batch_size  # a stream's loader knows it less well
    scheduler, _ = create_scheduler_v2(
        state.optimizer, config.schedule, config.epochs, warmup_epochs=config.warmup_epochs, warmup_lr=config.lr / 100,
        decay_epochs=config.epochs / 3, step_on_epochs=False, updates_per_epoch=steps)
    if class_weights is not None:
        class_weights = class_weights.to(accelerator.device)
    main = accelerator.is_main_process
    bad, stopped, earlier = state.bad, '', state.seconds
    began = time.monotonic() - earlier
    measured = ema.module if ema else network
    timer = _Timer(run, steps)
    drawn = saved = -math.inf
    saving, saved_epoch = 0., state.epoch

    bar = tqdm(total=config.epochs * steps, initial=state.epoch * steps, unit='batch', leave=False, smoothing=0.05,
               disable=None if main and progress is not False else True)
    with bar, logging_redirect_tqdm():
        while state.epoch < config.epochs:
            if stopped := _agree(state.reason_to_stop(config.patience, deadline), accelerator):
                break
            random_seed((config.seed * 100_003 + state.epoch) % 2 ** 32, accelerator.process_index)
            order.manual_seed(config.seed * 100_003 + state.epoch)
            if isinstance(train, IterableDataset):
                train.set_epoch(state.epoch)
            unfreezing.train(state.epoch)
            epoch_began = time.monotonic()
            total, seen = torch.zeros((), device=accelerator.device), 0
            bar.set_description(f'epoch {state.epoch + 1}/{config.epochs}')
            for step, (images, labels, _, reasons) in enumerate(loader):
                timer.tell(step, (config.epochs - state.epoch) * steps)
                _check_readable(reasons, images is None, on_bad)
                bad += [r for r in reasons if r not in bad]
                scheduler.step_update(state.epoch * steps + step)
                if images.ndim == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                targets, smoothing = labels, config.label_smoothing
                if mix and len(images) > 1:
                    even = len(images) - len(images) % 2
                    images, targets = mix(images[:even], labels[:even])
                    smoothing = 0.  # the mixed targets have it
                with accelerator.accumulate(model):
                    try:
                        loss = _loss(model, images, targets, smoothing, class_weights)
                        accelerator.backward(loss)
                    except RuntimeError as e:
                        if not _out_of_memory(e):
                            raise
                        loss = None
                    if loss is None:  # outside the handler, which holds the tensors
                        raise _too_large(network, images, batch_size, world)
                    optimizer.step()
                    optimizer.zero_grad()
                if ema and accelerator.sync_gradients:
                    ema.update(network, step=state.epoch * steps + step)
                total += loss.detach()
                seen += len(labels)
                bar.update()
                if step % 10 == 0 and not bar.disable:
                    bar.set_postfix(loss=f'{total.item() / (step + 1):.3f}')
            mean_loss = accelerator.reduce(total, 'mean').item() / steps
            _check_finite(mean_loss, 'loss', state.epoch + 1, config.lr)
            trained = time.monotonic() - epoch_began
            row = {'epoch': state.epoch + 1, 'lr': max(g['lr'] for g in state.optimizer.param_groups),
                   'train_loss': mean_loss, 'images_per_second': round(seen * world / trained, 1)}
            if holdout is not None:
                with accelerator.autocast():
                    result = predict(measured, holdout, accelerator, workers=workers)
                row['holdout_loss'] = F.cross_entropy(result.logits, result.labels).item()
                _check_finite(row['holdout_loss'], 'loss on held-out files', state.epoch + 1, config.lr)
                row['holdout_accuracy'] = 100 * (result.logits.argmax(1) == result.labels).float().mean().item()
                bad += [r for r in result.bad if r not in bad]
            state.epoch += 1
            state.seconds = time.monotonic() - began
            state.epoch_seconds = time.monotonic() - epoch_began
            state.history.append({**row, 'seconds': round(state.seconds, 1)})
            now = time.monotonic()
            if now - saved >= _SHARE_OF_SAVING * saving or is_best(state.history):
                draw = now - drawn > _SECONDS_BETWEEN_DRAWINGS
                drawn = now if draw else drawn
                run.save(state.to_dict(), state.history, draw)
                saved, saved_epoch = time.monotonic(), state.epoch
                saving = saved - now
            if main:
                accuracy = f"  held-out accuracy {row['holdout_accuracy']:5.1f} %" if holdout is not None else ''
                run.log('epoch %2d/%d  loss %.3f%s  %.0f images/s  %.0f s', state.epoch, config.epochs, mean_loss,
                        accuracy, row['images_per_second'], state.seconds)
                if on_epoch:
                    on_epoch(state.history[-1])
    if saved_epoch != state.epoch:
        run.save(state.to_dict(), state.history)
    elif main:
        run.write_history(state.history)
    accelerator.wait_for_everyone()
    for parameter in network.parameters():
        parameter.requires_grad_(True)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    few = len(holdout or ()) < ENOUGH_TO_CHOOSE and not stopped  # before its end no epoch is the schedule's best
    return Fitted(measured, state.history, gather_object(bad) if world > 1 else bad, stopped, earlier, last=few)


@dataclasses.dataclass
class _State:
    """All that a run is, and that a checkpoint holds."""
    network: torch.nn.Module
    optimizer: torch.optim.Optimizer
    ema: ModelEmaV3 | None
    epoch: int = 0
    seconds: float = 0.
    epoch_seconds: float = 0.
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            'model': self.network.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'ema': self.ema.module.state_dict() if self.ema else None, 'epoch': self.epoch, 'step': 0,
            'seconds': self.seconds, 'epoch_seconds': self.epoch_seconds, 'history': self.history, 'bad': self.bad}

    def load_dict(self, saved: dict[str, Any]) -> None:
        self.network.load_state_dict(saved['model'])
        self.optimizer.load_state_dict(saved['optimizer'])
        if self.ema:
            self.ema.module.load_state_dict(saved['ema'])
        for name in ('epoch', 'seconds', 'epoch_seconds', 'history', 'bad'):
            setattr(self, name, saved[name])

    def reason_to_stop(self, patience: int, deadline: float) -> str:
        """Why the run ends here; '' if it does not."""
        if self.epoch and time.monotonic() + self.epoch_seconds > deadline:
            return 'the time budget'
        accuracies = [row['holdout_accuracy'] for row in self.history if 'holdout_accuracy' in row]
        since = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return f'{patience} epochs without a better held-out accuracy' if patience and since >= patience else ''


class _Timer:
    """Says once, after the first steps, how long the rest will take; the very first, which warms up, is left out."""

    def __init__(self, run: RunDir, steps: int):
        self._run, self._after, self._first, self._told = run, min(10, steps - 1), 0., False

    def tell(self, step: int, left: int) -> None:
        """To be called as each step begins; `left` counts the steps from the start of this epoch to the end."""
        if self._told:
            return
        if step <= min(1, self._after):
            self._first = time.monotonic()
        if step == self._after and step > 1:
            self._told = True
            seconds = (time.monotonic() - self._first) / (step - 1) * (left - step)
            self._run.log('about %s to go, besides measuring the held-out files', duration(seconds))


def _agree(reason: str, accelerator: Accelerator) -> str:
    """The reason of the first process that has one."""
    return reason if accelerator.num_processes == 1 else next(filter(None, gather_object([reason])), '')


def _check_readable(reasons: list[str], none_left: bool, on_bad: str) -> None:
    if reasons and on_bad == 'fail':
        raise ValueError(some(reasons, '; '))
    if none_left:
        raise ValueError(f'no file of a whole batch can be read any more: {some(reasons, "; ")}. The checkpoints '
                         f'stand; mend it and go on with --resume')


def _check_finite(loss: float, what: str, epoch: int, lr: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f'the {what} is {loss} in epoch {epoch}; try a smaller --lr than {lr:g}')


def _loss(model, images, targets, smoothing, class_weights) -> torch.Tensor:
    return F.cross_entropy(model(images).float(), targets, class_weights, label_smoothing=smoothing)


def _too_large(network: torch.nn.Module, images: torch.Tensor, batch_size: int, world: int) -> BatchTooLarge:
    network.zero_grad(set_to_none=True)
    shape, device = images.shape[1:], images.device
    fits = largest_batch(lambda n: network(torch.zeros(n, *shape, device=device)).sum().backward(),
                         len(images) // 2) * world
    network.zero_grad(set_to_none=True)
    advice = f'--batch-size {fits} fits, with --accumulate {math.ceil(batch_size / fits)} to the same effect' if fits \
        else 'not even one image fits; choose a smaller --input-size or --model'
    return BatchTooLarge(f'out of memory on {device} at batch size {batch_size}; {advice}', fits)
