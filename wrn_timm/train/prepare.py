"""Prepare fine-tuning: list and split the files, build the network, and choose the preprocessing."""
from __future__ import annotations

import copy
import logging
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.utils import random_seed
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

from ..data.folders import EXAMINED_AT_MOST, FolderScan, examine
from ..data.images import ImageFiles
from ..data.splits import Split, list_source, make_split, read_split, source_root
from ..data.timm_sets import NamedImages
from ..names import counted, some
from ..recipes import FinetuneConfig
from ..schemas import check_scan, read_json
from ..weights import check_colours, open_model
from .machine import Machine

__all__ = ['build_model', 'check_classes', 'check_policy', 'prepare_named', 'prepare_split', 'preprocessing',
           'size_advice', 'split_name', 'training_set']

_logger = logging.getLogger(__name__)

_FAR_LARGER = 8  # photographs this many times larger than the input lose most of their detail
_FOR_PHOTOGRAPHS = 'wrn18_1.a1_in1k'


def prepare_split(
        config: FinetuneConfig,
        data: str | Path,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        run: Path | None = None,
) -> tuple[Split, dict[str, Any]]:
    """List and examine the files, log a summary, and split them.

    Args:
        config: Protocol of the split.
        data: As in `finetune`.
        machine: Whether to download, and how to handle unreadable files.
        run: Directory of a run to resume, whose split is reused.

    Returns:
        The split, and facts about the data for the report: `split`, `bad`, `leaks`, `summary`, `tested_on`, and `side`
        (median of the photographs' shorter sides in pixels; 0 if they were not examined).

    Raises:
        Any error of `check_classes`, `list_source`, `examine`, `make_split` and `read_split`.
    """
    data = str(data)
    if run and (run / 'scan.json').is_file():
        found = read_json(run / 'scan.json', check_scan)
        return read_split(run / 'split.csv', source_root(data)), found
    by_file = config.split.endswith('.csv')
    if by_file:
        given = read_split(config.split, source_root(data, machine.download))
        scan = FolderScan(given.train, given.test, given.holdout)
    else:
        scan = list_source(data, config.nested, machine.download)
    check_classes(scan.train.classes, data)
    scan = examine(scan, machine.on_bad, at_most=EXAMINED_AT_MOST)
    split = Split(scan.train, scan.val, scan.test) if by_file else make_split(
        scan, config.split, config.held_out, config.seed)
    if by_file or scan.val:
        _check_held_out(config, split, config.split if by_file else f'the part val of {data}')
    elif config.patience and not split.holdout:
        raise ValueError('patience needs held-out files, but no class has more than two training files')
    if scan.test and not by_file and config.split != FinetuneConfig.split:
        _logger.warning('--split has no effect: %s has a test part', data)
    leaks = split.leaks(scan.twins)
    summary = scan.summary()
    if leaks:
        summary.append(f"{counted(len(leaks), 'test file')} with the same content as training files: "
                       + some([f'{b} = {a}' for a, b in leaks], '; '))
    if config.holdout == 'auto' and not (split.holdout or config.cached or by_file):
        summary.append('no files are held out: a tenth of them is fewer than 100, too few to choose the best epoch, so '
                       'the last epoch is used (--holdout 0.1 holds out a tenth anyway)')
    for line in summary:
        _logger.info('%s', line)
    sides = [min(size) for size in scan.sizes.elements()]
    protocol = split_name(config.split) if by_file or not scan.test else 'given'
    return split, {'split': protocol, 'bad': list(scan.bad), 'leaks': leaks,
                   'summary': summary, 'tested_on': scan.tested, 'side': int(statistics.median(sides)) if sides else 0}


def check_classes(classes: Sequence[str], data: str) -> None:
    """Refuse data of one class only.

    Raises:
        ValueError: There is one class; the message names it.
    """
    if len(classes) < 2:
        raise ValueError(f'{data} holds one class only ({classes[0]}); at least two are needed')


def _check_held_out(config: FinetuneConfig, split: Split, given_by: str) -> None:
    """Refuse early stopping without held-out files, and warn that a given split overrides `holdout`."""
    if config.patience and not split.holdout:
        raise ValueError(f'patience needs held-out files, and {given_by} has none; add some there, or leave out '
                         f'patience')
    if config.holdout not in ('auto', 0):
        _logger.warning('--holdout has no effect: the held-out files are given by %s', given_by)


def prepare_named(config: FinetuneConfig, data: str, download: bool) -> tuple[Split, dict[str, Any]]:
    """Make a split of the parts of a timm data set; returns it with facts for the report, as `prepare_split` does.

    Raises:
        ValueError: The parts have different classes, or a setting needs what the data set does not provide.
        Any error of `NamedImages`.
    """
    if config.class_weights:
        raise ValueError('class_weights needs all labels before training, which a named data set does not provide')
    classes = tuple(map(str, range(config.num_classes))) or None
    train, *choose, test = (
        NamedImages(data, part, part == config.parts[0], download, classes, (config.input_key, config.target_key))
        for part in config.parts)
    if len({part.classes for part in (train, *choose, test)}) > 1:
        raise ValueError(f'{data}: the parts {", ".join(config.parts)} have different classes')
    split = Split(train, choose[0] if choose else None, test)
    _check_held_out(config, split, f'--parts {" ".join(config.parts)}')
    return split, {'split': ', '.join(config.parts)}


def split_name(split: str) -> str:
    """Name of a split: its protocol, or the file name of its `split.csv`."""
    return Path(split).name if split.endswith('.csv') else split


def check_policy(policy: str) -> None:
    """Refuse an `auto_augment` that timm does not know.

    Raises:
        ValueError: The policy is unknown; the message names some known ones.
    """
    try:
        create_transform(32, is_training=True, auto_augment=policy or None)
    except (AssertionError, ValueError, KeyError, IndexError) as e:
        raise ValueError(
            f'auto_augment {policy!r} is not a timm policy ({e}); try rand-m9-mstd0.5, augmix-m5 or original') from e


def build_model(config: FinetuneConfig) -> torch.nn.Module:
    """Build the network to start from, with its original classifier, in evaluation mode.

    Raises:
        ValueError: timm does not know the model; or the model does not support colour images, the stem or the input
            size, or has no linear classifier to fit to features.
        Any error of `open_model`.
    """
    kwargs = {'stem': config.stem} if config.stem else {}
    random_seed(config.seed)
    try:
        model = open_model(config.model, pretrained=config.pretrained, **kwargs)
    except TypeError as e:
        raise ValueError(f'{config.model} has no option {" nor ".join(kwargs)}') from e
    check_colours(model)
    own = model.pretrained_cfg.get('input_size', (0,))[-1]
    if model.pretrained_cfg.get('fixed_input_size') and config.input_size not in (0, own):
        raise ValueError(f'{config.model} takes only images of {own} px; leave out --input-size')
    if config.cached and not isinstance(model.get_classifier(), torch.nn.Linear):
        raise ValueError(f'the classifier of {config.model} is not a linear layer, so --train head cannot fit it to '
                         f'features; add --no-cache, or use --train all')
    return model


def preprocessing(
        config: FinetuneConfig,
        model: torch.nn.Module,
        name: str,
        classes: tuple[str, ...],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The transforms of the 'train' and 'test' files, and the `pretrained_cfg` fields of the new weights."""
    data_config = resolve_model_data_config(model)
    size = config.input_size or data_config['input_size'][-1]
    data_config |= {'input_size': (3, size, size), 'crop_pct': 1.0}
    test = create_transform(**data_config, is_training=False)
    train = create_transform(
        **{k: v for k, v in data_config.items() if k not in ('crop_pct', 'crop_mode')},
        is_training=True, scale=(config.min_scale, 1.), hflip=0.5 if config.flip else 0.,
        color_jitter=config.color_jitter, auto_augment=config.auto_augment or None,
        re_prob=config.random_erase) if config.augment else test
    tag = re.sub('[^A-Za-z0-9]+', '_', name).strip('_') or 'finetuned'  # it becomes part of a repository name
    cfg = {'input_size': (3, size, size), 'crop_pct': 1.0, 'tag': tag, 'label_names': classes,
           'license': None, 'origin_url': None}  # not those of the original weights: the owner decides
    return {'train': train, 'test': test}, cfg


def training_set(config: FinetuneConfig, split: Split, transform: Any, size: int, memory: float = 0) -> Dataset:
    """The data set of the training files for inputs of `size` pixels; `memory` as in `ImageFiles.as_dataset`.

    Large photographs are decoded at a reduced size, at which the smallest square crop still has twice the side of the
    input. The result of resizing is then much the same as from the full size, at which test photographs are decoded.
    """
    if not isinstance(split.train, ImageFiles):
        return split.train.as_dataset(transform)
    least = math.ceil(2 * size / math.sqrt(config.min_scale)) if config.augment else 0
    return split.train.as_dataset(transform, least, memory)


def size_advice(model: torch.nn.Module, size: int, side: int) -> str:
    """Advice for photographs of `side` pixels that lose most of their detail at `size`; '' if they do not.

    Costs are given relative to the current multiply-adds per photograph.
    """
    if side < _FAR_LARGER * size:
        return ''
    larger = min(4 * size, side)
    text = (f'half of the photographs have {side} px or more on their shorter side, and the network sees {size}. If '
            f'the classes differ in small details, try --input-size {larger}: it takes up to '
            f'{(larger / size) ** 2:.0f} times as long')
    if size >= 128:
        return text
    with torch.device('meta'):
        other = timm.create_model(_FOR_PHOTOGRAPHS)
    times = _multiply_adds(other, 224) / _multiply_adds(copy.deepcopy(model).to('meta'), size)
    return (f'{text}; weights trained on photographs usually work better: --model {_FOR_PHOTOGRAPHS} (ImageNet, 224 '
            f'px) takes {times:.0f} times as long, or little with --train head, which uses each photograph once')


def _multiply_adds(model: torch.nn.Module, size: int) -> int:
    """Multiply-adds of a model on the device 'meta' for one image of `size` pixels."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops() // 2
