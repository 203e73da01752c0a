"""Run networks over images and measure their accuracy, in the same way for all commands."""
from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from timm.data import resolve_model_data_config
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate
from tqdm import tqdm

from ..data.corrupt import CORRUPTIONS, corrupt
from ..data.folders import FolderScan, examine
from ..data.images import ImageFiles, ReadableOnly, collate_readable
from ..data.small_sets import NAMES, ImageArrays, load, normalise, parse_spec
from ..data.splits import data_name, list_source, read_split, source_root
from ..names import some
from ..recipes import Precision
from ..weights import eval_transform, open_model
from .machine import Machine, autocast, environment, hidden, in_float32, resolve_precision

__all__ = [
    'Features', 'Predictions', 'begin_worker', 'evaluate', 'largest_batch', 'loss_and_accuracy', 'make_loader',
    'out_of_memory', 'predict', 'predict_logits', 'validate']

Batches = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error means out of memory; oneDNN, on CPUs, has its own message for that."""
    return should_reduce_batch_size(error) or str(error).startswith('could not create a ')


def largest_batch(step: Callable[[int], None], start: int) -> int:
    """The largest of `start`, `start // 2`, `start // 4`... that fits the device's memory; 0 if none does.

    Args:
        step: Function that runs with a batch size.
        start: First batch size to try.
    """
    while start:
        try:
            step(start)
            return start
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
        clear_device_cache(garbage_collection=True)
        start //= 2
    return 0


@torch.inference_mode()
def predict_logits(
        network: torch.nn.Module,
        batches: Batches,
        device: torch.device | str = 'cpu',
        batch_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a network over batches of images, in float32 unless within an autocast context.

    Args:
        network: Network on `device`; left in evaluation mode.
        batches: Function of the batch size that returns batches of (images, labels).
        device: Device of the network.
        batch_size: Images per batch; fewer if they do not fit the device's memory.

    Returns:
        Logits (N, classes), float32, and labels (N,), on the CPU; both are empty if there are no images.

    Raises:
        RuntimeError: Out of memory with a single image.
    """
    network.eval()
    found: list[torch.Tensor] = []
    side = 0

    def run(batch_size: int) -> None:
        nonlocal side
        logits, labels = [], []
        for images, targets in batches(batch_size):
            side = images.shape[-1]
            images = images.to(device, memory_format=torch.channels_last if images.ndim == 4 else torch.preserve_format)
            logits.append(network(images).float().cpu())
            labels.append(targets)
        found[:] = torch.cat(logits or [torch.empty(0)]), torch.cat(labels or [torch.empty(0, dtype=torch.int64)])

    if not largest_batch(run, batch_size):
        raise RuntimeError(f'not even one image of {side} px fits into the memory of {device}; choose a smaller '
                           f'--input-size or --model')
    return found[0], found[1]


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Mean cross-entropy `loss`, and `accuracy` in %."""
    hits = (logits.argmax(1) == labels).float().mean()
    return {'loss': F.cross_entropy(logits, labels).item(), 'accuracy': 100 * hits.item()}


def evaluate(
        network: torch.nn.Module,
        data: ImageArrays,
        device: torch.device,
        precision: Precision = 'no',
        batch_size: int = 500,
) -> dict[str, float]:
    """Mean loss, and accuracy in %, of a network on small images, normalised by the data set's mean and std."""
    def batches(n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for images, labels in zip(data.images.split(n), data.labels.split(n), strict=True):
            yield normalise(images.to(device), data.mean, data.std), labels

    with autocast(device, resolve_precision(precision, device)):
        return loss_and_accuracy(*predict_logits(network, batches, device, batch_size))


class Features(Dataset):
    """A data set of features (N, C), or images (N, C, H, W), and labels (N,) in memory, indexed a batch at a time."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor):
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.features[i], self.labels[i]

    def __getitems__(self, index: Sequence[int]) -> tuple:
        index = torch.as_tensor(index)
        return self.features[index], self.labels[index], index, []


def begin_worker(worker: int) -> None:
    """Make a DataLoader worker ignore Ctrl-C, which reaches it too; the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(dataset: Dataset, batch_size: int, workers: int, pin: bool = False, **kwargs: Any) -> DataLoader:
    """A loader of (images, labels, indices, why other images could not be read).

    The indices of a Subset are those of its underlying data set.
    """
    inner = dataset.dataset if isinstance(dataset, Subset) else dataset
    if isinstance(inner, Features):
        return DataLoader(dataset, batch_size, collate_fn=_as_it_is, **kwargs)
    if isinstance(inner, IterableDataset):
        if inner is not dataset:
            raise ValueError('a streamed data set can only be read by one process')
        return DataLoader(dataset, batch_size, collate_fn=_with_none_unread, drop_last=kwargs.get('drop_last', False))
    readable = Subset(ReadableOnly(inner), dataset.indices) if inner is not dataset else ReadableOnly(dataset)
    return DataLoader(
        readable, batch_size, num_workers=min(workers, math.ceil(len(dataset) / batch_size)),
        collate_fn=collate_readable, worker_init_fn=begin_worker, pin_memory=pin, **kwargs)


def _with_none_unread(batch: Any) -> Any:
    return *default_collate(batch), []


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions of a network for the readable images of a data set.

    Attributes:
        logits: Logits (N, classes), float32, on the CPU.
        labels: Labels (N,), int64.
        index: Indices into the data set (N,), int64.
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
        workers: int = 0,
        title: str = '',
        progress: bool | None = None,
) -> Predictions:
    """Run a network over a data set, split among the processes; each of them gets the whole result.

    Precision and batch size are handled as in `predict_logits`.

    Args:
        network: Network on the accelerator's device; left in evaluation mode.
        dataset: Data set of (image, label).
        accelerator: Device and processes.
        workers: Number of processes that read images.
        title: Title of the progress bar; '' shows no bar.
        progress: Whether to show the bar; None shows it only in a terminal.

    Raises:
        ValueError: No image could be read.
        Any error of `predict_logits`.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    mine = dataset if world == 1 else Subset(dataset, range(rank, len(dataset), world))
    show = progress if title and accelerator.is_main_process else False
    index, bad = [], []

    def readable(batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        index.clear(), bad.clear()
        batches = make_loader(mine, batch_size, workers, accelerator.device.type == 'cuda')
        for images, labels, i, reasons in tqdm(
                batches, desc=title, unit='batch', leave=False, disable=hidden(show)):
            bad.extend(reasons)
            if images is not None:
                index.append(i)
                yield images, labels

    found = predict_logits(network, readable, accelerator.device) if len(mine) else ()
    mine = [*found, torch.cat(index)] if index else []
    gathered = gather_object([(mine, bad)]) if world > 1 else [(mine, bad)]
    bad = [reason for _, reasons in gathered for reason in reasons]
    parts = [part for part, _ in gathered if part]
    if not parts:
        raise ValueError(f'no image can be read: {some(bad, "; ")}')
    logits, labels, order = (torch.cat(column) for column in zip(*parts, strict=True))
    by_place = order.argsort()
    return Predictions(logits[by_place], labels[by_place], order[by_place], bad)


def validate(
        name: str,
        data: str,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        batch_size: int = 250,
        corruptions: bool = False,
        split: str = '',
        precision: Precision = 'no',
) -> dict[str, Any]:
    """Measure a pretrained model, loaded from disk, on a test set. All published figures come from this function.

    Args:
        name: timm name or weights folder.
        data: `NAME:DIR` for the test split of a named set; or `folder:DIR` with class folders, a CSV file or
            `caltech101:DIR`, as in `list_source` (the test part, or all files if they are not split).
        machine: Device, workers, and whether to download the data.
        batch_size: Images per batch; fewer if they do not fit the device's memory.
        corruptions: Also measure a named set under each of `data.corrupt.CORRUPTIONS`.
        split: `split.csv` of a fine-tuning run, whose test part is measured.
        precision: 'no' (float32 without TF32, as for all published figures), 'bf16', 'fp16', or 'auto' as in
            `resolve_precision`.

    Returns:
        The metrics of `classification_metrics`, with the data set, split, preprocessing and environment, and as
        `corruptions` the top-1 accuracy under each.

    Raises:
        ValueError: The data's classes are not among the model's; or `corruptions` is given for files, or `split` for a
            named set.
        Any error of `list_source`, `read_split` and `predict_logits`.
    """
    from .metrics import classification_metrics  # a slow import that training from scratch does not need
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}; it must be at least 1')
    device, precision = machine.device, resolve_precision(precision, machine.device)
    model = open_model(name).to(device, memory_format=torch.channels_last)
    config, transform = resolve_model_data_config(model), eval_transform(model)
    source, part, split, skipped = _test_part(data, split, corruptions, machine.download)
    part = _checked(part, model, name, data)

    def measure(part: ImageArrays | ImageFiles, what: str) -> dict[str, Any]:
        def batches(n: int) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            loader = DataLoader(
                part.as_dataset(transform), n, num_workers=machine.workers, worker_init_fn=begin_worker)
            return tqdm(loader, desc=what, unit='batch', leave=False, disable=hidden(machine.progress))

        with autocast(device, precision), in_float32():
            return classification_metrics(*predict_logits(model, batches, device, batch_size), part.classes)

    metrics = measure(part, 'validating')
    if corruptions:
        metrics['corruptions'] = {
            f'{kind} {strength:g}': measure(
                dataclasses.replace(part, images=corrupt(part.images, kind, strength)), kind)['top1']
            for kind, strengths in CORRUPTIONS.items() for strength in strengths}
    return {
        'dataset': source, 'split': split, **metrics, 'skipped': skipped,
        'precision': precision, 'preprocessing': {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        'environment': environment(device),
    }


def _test_part(
        data: str,
        split: str,
        corruptions: bool,
        download: bool,
) -> tuple[str, ImageArrays | ImageFiles, str, list[str]]:
    """What `validate` measures: name of the data, test part, name of that part, and why files were left out."""
    if data.partition(':')[0] in NAMES:
        if split:
            raise ValueError(f'{data} has a test split of its own; leave out --split')
        source, root = parse_spec(data)
        return source, load(source, root, train=False, download=download), 'test', []
    if corruptions:
        raise ValueError('corruptions are for the named sets of small images, not for files')
    where = data.removeprefix('folder:')
    if split:
        part = read_split(split, source_root(where, download)).test
        scan = FolderScan(part, test=part)
    else:
        scan = list_source(where, download=download)
    scan = examine(scan, only='test' if scan.test else 'train')
    called = Path(split).name or ('test' if scan.test else 'all files')
    return data_name(where), scan.test or scan.train, called, list(scan.bad)


def _checked(
        part: ImageArrays | ImageFiles,
        model: torch.nn.Module,
        name: str,
        data: str,
) -> ImageArrays | ImageFiles:
    """The images with the model's labels. Image files may lack some of the model's classes, but have no others."""
    labels = model.pretrained_cfg.get('label_names')
    if isinstance(part, ImageFiles) and labels and set(part.classes) <= set(labels):
        part = ImageFiles(part.paths, [labels.index(part.classes[i]) for i in part.labels], tuple(labels))
    if len(part.classes) != model.num_classes or (labels and tuple(labels) != tuple(part.classes)):
        raise ValueError(
            f'{name} knows {model.num_classes} classes ({", ".join((labels or ())[:3])}...), {data} has '
            f'{len(part.classes)} ({", ".join(part.classes[:3])}...)')
    return part
