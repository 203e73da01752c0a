"""Rank pretrained backbones without training them, by nearest neighbours and a linear classifier on their features."""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import try_to_load_from_cache
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import Dataset

from ..data.folders import EXAMINED_AT_MOST, examine
from ..data.images import ImageFiles
from ..data.splits import Split, data_name, list_source, make_split
from ..data.timm_sets import is_named
from ..recipes import FinetuneConfig
from ..weights import WEIGHTS_FILE, list_weights, open_model, places
from .accelerator import RunAccelerator, kept_accumulation
from .linear import LinearFit
from .machine import Machine, kept_random_state
from .measure import Features, Predictions, predict
from .metrics import classification_metrics, summarise
from .prepare import check_classes

__all__ = ['extract_features', 'knn', 'probe']

_logger = logging.getLogger(__name__)

HUB = 'hf-hub:'
NEIGHBOURS = 20
TEMPERATURE = 0.07  # arXiv:1805.01978, section 3.4


class _Backbone(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.model.forward_features(x), pre_logits=True)


def extract_features(
        model: torch.nn.Module,
        dataset: Dataset,
        accelerator: Accelerator,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
) -> Predictions:
    """Run `predict` with a timm model's features before the classifier, (N, C), in place of the logits."""
    with accelerator.autocast():
        return predict(_Backbone(model), dataset, accelerator, machine.workers, 'features', machine.progress)


def knn(
        features: torch.Tensor,
        labels: torch.Tensor,
        queries: torch.Tensor,
        classes: int,
        neighbours: int = NEIGHBOURS,
) -> torch.Tensor:
    """Weighted k-nearest-neighbour classification by cosine similarity (arXiv:1805.01978).

    Args:
        features: Features (N, C).
        labels: Labels of the features, (N,).
        queries: Features to classify, (M, C).
        classes: Number of classes.
        neighbours: Number of neighbours that vote, each with weight exp(cosine / 0.07).

    Returns:
        Logits (M, classes): the log of the votes, or of the smallest normal number for a class without votes.
    """
    features = F.normalize(features, dim=1)
    votes = torch.zeros(len(queries), classes)
    for rows, chunk in zip(votes.split(1024), F.normalize(queries, dim=1).split(1024), strict=True):
        cosine, nearest = (chunk @ features.T).topk(min(neighbours, len(features)), dim=1)
        rows.scatter_add_(1, labels[nearest], (cosine / TEMPERATURE).exp())
    return votes.clamp_min(torch.finfo(votes.dtype).tiny).log()


def _at_hand() -> list[str]:
    """The weights on this machine, in folders or in the Hub cache; the log names the others."""
    listed = list_weights()
    here = [w.name for w in listed if Path(w.location).exists() or w.location.startswith(HUB) and isinstance(
        try_to_load_from_cache(w.location.removeprefix(HUB).partition('@')[0], WEIGHTS_FILE), str)]
    if absent := [w.name for w in listed if w.name not in here]:
        _logger.info('not on this machine, and left out: %s; name them to fetch them', ', '.join(absent))
    known = {w.name for w in listed}
    others = {folder.name: str(folder) for place in reversed(places()) if place.is_dir()
              for folder in sorted(place.iterdir()) if folder.name not in known and (folder / WEIGHTS_FILE).is_file()}
    return [*here, *others.values()]


class _Bank:
    """The features of files from a backbone, each computed once."""

    def __init__(self, name: str, input_size: int, accelerator: Accelerator, machine: Machine):
        self._accelerator, self._machine = accelerator, machine
        self._model = open_model(name).to(accelerator.device, memory_format=torch.channels_last)
        config = resolve_model_data_config(self._model)
        self.size = input_size or config['input_size'][-1]
        self._transform = create_transform(
            **config | {'input_size': (3, self.size, self.size), 'crop_pct': 1.0}, is_training=False)
        self._rows: dict[str, torch.Tensor] = {}
        self._asked: set[str] = set()
        self.bad: list[str] = []

    def of(self, files: ImageFiles) -> Features:
        """Features and labels of the readable files."""
        if missing := [i for i, path in enumerate(files.paths) if path not in self._asked]:
            wanted = files.subset(missing)
            found = extract_features(self._model, wanted.as_dataset(self._transform), self._accelerator, self._machine)
            self._rows |= {wanted.paths[i]: row for i, row in zip(found.index.tolist(), found.logits, strict=True)}
            self._asked.update(wanted.paths)
            self.bad += found.bad
        there = [(self._rows[path], label) for path, label in zip(files.paths, files.labels, strict=True)
                 if path in self._rows]
        return Features(torch.stack([row for row, _ in there]), torch.tensor([label for _, label in there]))


def _joined(*parts: Features) -> Features:
    return Features(torch.cat([p.features for p in parts]), torch.cat([p.labels for p in parts]))


def _measured_on_held_out(bank: _Bank, split: Split, seed: int) -> dict[str, tuple[dict[str, Any], float]]:
    """Metrics on held-out files and the penalty they chose, for each method; kNN has no penalty."""
    train, holdout = bank.of(split.train), bank.of(split.holdout) if split.holdout else None
    classes = split.train.classes
    linear = LinearFit(train, holdout, len(classes), seed=seed)
    row, logits = max(linear.path(), key=lambda step: step[0]['holdout_accuracy'])
    everything = _joined(train, holdout) if holdout else train
    voted = torch.cat([
        knn(everything.features[known], everything.labels[known], everything.features[asked], len(classes))
        for known, asked in linear.folds])
    return {'linear probe': (classification_metrics(logits, linear.labels, classes), row['penalty']),
            'kNN': (classification_metrics(voted, linear.labels, classes), 0.)}


def _measured_on_test(bank: _Bank, split: Split, way: str, penalty: float) -> dict[str, Any]:
    """Metrics on the test files, after fitting to all other files."""
    train, holdout = bank.of(split.train), bank.of(split.holdout) if split.holdout else None
    test, classes = bank.of(split.test), split.train.classes
    if way == 'kNN':
        known = _joined(train, holdout) if holdout else train
        logits = knn(known.features, known.labels, test.features, len(classes))
    else:
        weight, bias = LinearFit(train, holdout, len(classes)).weight(penalty)
        logits = F.linear(test.features, weight, bias)
    return classification_metrics(logits, test.labels, classes)


def _summary(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: summarise([m[key] for m in metrics]) for key in ('mean_per_class', 'top1')}


def _splits(data: str, config: FinetuneConfig, seeds: int, machine: Machine) -> tuple[dict[int, Split], dict[str, Any]]:
    """A split of the data for each seed, and the fields that all rows share."""
    if is_named(data):
        raise ValueError(f'weights are ranked on folders and CSV files, but {data} is a named data set')
    if config.split.endswith('.csv'):
        raise ValueError(f'weights are ranked on a new split for each seed: give a protocol (random30, 80-20...) in '
                         f'place of {config.split}')
    scan = list_source(data, config.nested, machine.download)
    check_classes(scan.train.classes, data)
    scan = examine(scan, machine.on_bad, at_most=EXAMINED_AT_MOST)
    for line in scan.summary():
        _logger.info('%s', line)
    numbers = range(config.seed, config.seed + seeds)
    splits = {seed: make_split(scan, config.split, config.holdout, seed) for seed in numbers}
    first = splits[config.seed]
    return splits, {
        'dataset': data_name(data), 'protocol': 'given' if scan.test else config.split, 'seeds': seeds,
        'train_files': len(first.train) + len(first.holdout or ())}


def _add_test(row: dict[str, Any], bank: _Bank, splits: dict[int, Split], penalties: list[float]) -> None:
    """Add the metrics on the test files to a row."""
    metrics = [_measured_on_test(bank, split, row['way'], penalty)
               for split, penalty in zip(splits.values(), penalties, strict=True)]
    row |= _summary(metrics) | {'test_files': metrics[0]['images'], 'skipped': bank.bad}


@kept_random_state()
@kept_accumulation()
def probe(
        names: Sequence[str],
        data: str,
        config: FinetuneConfig,
        seeds: int = 1,
        test_all: bool = False,
        machine: Machine = Machine(),  # noqa: B008  (it is frozen)
        on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Rank backbones for a data set by accuracy on held-out files; only the best is measured on the test files.

    With fewer than 1,000 held-out files, five-fold cross-validation over all training files is used (`LinearFit`).

    Args:
        names: timm names or weights folders; 'all' stands for all weights on this machine, including those of other
            networks in $WRN_TIMM_WEIGHTS and those in the Hub cache.
        data: As in `finetune`, but not a named data set.
        config: Only `split` (a protocol), `holdout`, `seed`, `input_size` (0 takes that of the weights) and `nested`
            are used.
        seeds: Number of seeds, starting with `config.seed`.
        test_all: Measure all backbones on the test files, for publication; the ranking does not change.
        machine: Device, workers, and whether to download the data.
        on_row: Called with each row when it is complete. Without `test_all`, it is called again with the best row and
            its test metrics.

    Returns:
        One row per backbone and method ('linear probe', 'kNN'), the most accurate on held-out files first: `weights`,
        `way` (the method), `dataset`, `protocol`, `input_size`, `seeds`, `train_files`, `skipped`, `seconds` (for both
        methods) and `holdout`, which has the `mean`, the sample standard deviation `std` and the `values` of
        `mean_per_class` and `top1`, in %. The first row, or every row with `test_all`, also has these for the test
        files, and `test_files`.

    Raises:
        Any error of `list_source`, `examine` and `make_split`.
    """
    names = [n for name in names for n in (_at_hand() if name == 'all' else [name])]
    if not names:
        raise ValueError('there are no weights on this machine to probe; name some to download them')
    splits, about = _splits(data, config, seeds, machine)
    accelerator = RunAccelerator(machine.device)  # float32, as for all test metrics
    rows: list[dict[str, Any]] = []
    best: tuple[dict[str, Any], _Bank, list[float]] | None = None

    for name in names:
        bank = _Bank(name, config.input_size, accelerator, machine)
        for row, penalties in _measured(bank, splits, about | {'weights': name}):
            rows.append(row)
            if test_all:
                _add_test(row, bank, splits, penalties)
            if best is None or _rank(row) > _rank(best[0]):
                best = row, bank, penalties
            if on_row:
                on_row(row)
    if not test_all:
        row, bank, penalties = best
        _add_test(row, bank, splits, penalties)
        if on_row:
            on_row(row)
    return sorted(rows, key=_rank, reverse=True)


def _measured(
        bank: _Bank,
        splits: dict[int, Split],
        about: dict[str, Any],
) -> Iterator[tuple[dict[str, Any], list[float]]]:
    """A row for each method with the metrics on held-out files, and the best penalty of each split."""
    began = time.monotonic()
    found = [_measured_on_held_out(bank, split, seed) for seed, split in splits.items()]
    seconds = round(time.monotonic() - began, 1)
    for way in found[0]:
        yield about | {'way': way, 'input_size': bank.size, 'skipped': bank.bad, 'seconds': seconds,
                       'holdout': _summary([f[way][0] for f in found])}, [f[way][1] for f in found]


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    return row['holdout']['top1']['mean'], row['holdout']['mean_per_class']['mean']
