"""The one place where a published number is made: weights reloaded from disk through `timm.create_model`."""
from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.corrupt import CORRUPTIONS, corrupt
from ..data.folders import FolderScan, ImageFiles, examine
from ..data.small_sets import NAMES, ImageArrays, load, parse_spec
from ..data.splits import data_name, list_source, read_split, source_root
from ..weights import find, read_config, verify
from .machine import Precision, autocast, resolve_precision
from .measure import classification_metrics, predict_logits
from .run import environment

__all__ = ['eval_transform', 'normalised', 'open_model', 'source_of', 'validate', 'weights_folder',
           'weights_name']


_LOCAL = 'local-dir:'


def open_model(name: str, pretrained: bool = True, **kwargs: Any) -> torch.nn.Module:
    """A model by timm name (`wrn16_1.cifar10`) or weights folder, in evaluation mode.

    Args:
        name: timm name, weights folder or run directory.
        pretrained: With the weights. Those of a folder are verified first, whichever network they are of.
        kwargs: Of `timm.create_model`.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no weights file.
        RuntimeError: The weights file or its configuration is damaged, or they do not agree.
        ValueError: timm knows no such model; the nearest are named.
        What `timm.create_model` raises.
    """
    source = source_of(name)
    if not source.startswith(_LOCAL):
        return timm.create_model(source, pretrained=pretrained, **kwargs).eval()
    folder = Path(source.removeprefix(_LOCAL))
    architecture = read_config(folder).get('architecture')
    if not architecture or not timm.is_model(architecture):
        raise ValueError(f'{folder / "config.json"} names the architecture {architecture!r}; {_nearest(architecture)}')
    if pretrained:
        verify(folder)
    try:
        return timm.create_model(source, pretrained=pretrained, **kwargs).eval()
    except (AssertionError, AttributeError, KeyError, TypeError) as e:
        if kwargs:  # they may be what does not fit
            raise
        raise RuntimeError(f'{folder / "config.json"} makes no {architecture}: {type(e).__name__}: {e}') from e


def source_of(name: str) -> str:
    """What `timm.create_model` takes for a timm name or a weights folder; it raises the same as `open_model`."""
    if Path(name).is_dir():
        return f'{_LOCAL}{weights_folder(name)}'
    if ':' in name:
        return name
    if Path(name).is_file():
        raise FileNotFoundError(f'{name} is a file; give the weights folder that it stands in')
    if '/' in name or os.sep in name:
        raise FileNotFoundError(f'no weights folder at {name}')
    if not timm.is_model(name):
        raise ValueError(f'timm knows no model {name}; {_nearest(name)}')
    if name not in timm.list_models('wrn*', include_tags=True) and (folder := find(name)):
        return f'{_LOCAL}{folder}'  # another network's weights, beside ours
    return name


def _nearest(name: str | None) -> str:
    found = difflib.get_close_matches((name or '').partition('.')[0], timm.list_models(), n=3, cutoff=0.5)
    return f'nearest: {", ".join(found) or "none"}'


def weights_folder(path: str | Path) -> Path:
    """A weights folder, or that of a run directory: the best one of `finetune.py`, the one of `train.py`.

    Raises:
        FileNotFoundError: It is neither.
    """
    path = Path(path)
    for folder in (path, path / 'best', path / 'weights'):
        if (folder / 'config.json').is_file():
            return folder
    raise FileNotFoundError(f'{path} is neither a weights folder nor a run that has ended: there is no config.json')


def weights_name(name: str) -> str:
    """What to call the weights that `open_model` opens by a timm name or a folder: `<arch>.<tag>`, and no path."""
    local = name.removeprefix(_LOCAL)
    if not Path(local).is_dir():  # it may have been one
        return Path(local).name if local != name or ':' not in name else name
    try:
        config = read_config(weights_folder(local))
        return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
    except (FileNotFoundError, KeyError, RuntimeError):  # it has no tag, or has gone since
        return Path(local).resolve().name


def eval_transform(model: torch.nn.Module) -> Any:
    """timm's preprocessing of a PIL image for this model, as its own configuration says."""
    return create_transform(**resolve_model_data_config(model), is_training=False)


def validate(
        name: str,
        data: str,
        batch_size: int = 250,
        device: str = 'cpu',
        workers: int = 0,
        download: bool = False,
        corruptions: bool = False,
        split: str = '',
        precision: Precision = 'no',
) -> dict[str, Any]:
    """Measure a pretrained model on a test set.

    Args:
        name: timm name or weights folder.
        data: `NAME:DIR` of a named set (its test split); or `folder:DIR` of class folders, a CSV file or
            `caltech101:DIR`, as `list_source` reads them (the part to test on, or all files where they are not split).
        batch_size: Images a step; fewer where they do not fit the device's memory.
        device: Where the model runs.
        workers: Processes that read images.
        download: Fetch a named set if it is missing.
        corruptions: Measure a named set under each of `data.corrupt.CORRUPTIONS` too.
        split: The `split.csv` of a fine-tuned run, whose part to test on is measured.
        precision: 'no' is float32 (and not TF32), as in all published figures; 'bf16', 'fp16', or 'auto': bfloat16 on
            GPUs and CPUs that are faster in it.

    Returns:
        The metrics of `classification_metrics`, with the data set, split, preprocessing and environment; top-1 under
        each corruption as `corruptions`.

    Raises:
        RuntimeError: Out of memory with one image.
        ValueError: The data's classes are not among the model's; corruptions are asked for on files, or a split of a
            named set.
        What `list_source` and `read_split` raise.
    """
    from .finetune_loop import largest_batch  # it takes a second to import accelerate, and `predict.py` imports this
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}; it must be at least 1')
    precision = resolve_precision(precision, device)
    files = data.partition(':')[0] not in NAMES
    if corruptions and files:
        raise ValueError('corruptions are for the named sets of small images, not for files')
    if split and not files:
        raise ValueError(f'{data} has a test split of its own; leave out --split')
    model = open_model(name).to(device, memory_format=torch.channels_last)
    config = resolve_model_data_config(model)
    transform = eval_transform(model)
    if files:
        where = data.removeprefix('folder:')
        scan = FolderScan(read_split(split, source_root(where, download)).test) if split else list_source(
            where, download=download)
        scan = examine(scan, only='test' if scan.test else 'train')
        source, part, skipped = data_name(where), scan.test or scan.train, list(scan.bad)
        split = Path(split).name or ('test' if scan.test else 'all files')
    else:
        source, root = parse_spec(data)
        part, split, skipped = load(source, root, train=False, download=download), 'test', []
    labels = model.pretrained_cfg.get('label_names')
    if files and labels and set(part.classes) < set(labels):
        part = ImageFiles(part.paths, [labels.index(part.classes[i]) for i in part.labels], tuple(labels))
    if len(part.classes) != model.num_classes or (labels and tuple(labels) != tuple(part.classes)):
        raise ValueError(
            f'{name} knows {model.num_classes} classes ({", ".join((labels or ())[:3])}...), {data} has '
            f'{len(part.classes)} ({", ".join(part.classes[:3])}...)')

    def measure(part: ImageArrays | ImageFiles, what: str) -> dict[str, Any]:
        found: list[torch.Tensor] = []

        def run(batch_size: int) -> None:
            loader = DataLoader(part.as_dataset(transform), batch_size, num_workers=workers)
            with tqdm(loader, desc=what, unit='batch', leave=False, disable=None) as progress:
                with autocast(device, precision):
                    found[:] = predict_logits(model, progress, device)

        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            if not largest_batch(run, batch_size):
                raise RuntimeError(
                    f"not even one image of {config['input_size'][-1]} px fits into the memory of {device}")
        return classification_metrics(*found, part.classes)

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


def normalised(images: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    """uint8 images (N, 3, H, W) as the model wants them."""
    config = resolve_model_data_config(model)
    mean, std = (torch.tensor(config[k])[:, None, None] for k in ('mean', 'std'))
    return (images.float() / 255 - mean) / std
