"""What a backbone's features are worth before it is trained: nearest neighbours and a linear classifier on them."""
from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from huggingface_hub import try_to_load_from_cache
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import Dataset

from ..data.folders import EXAMINED_AT_MOST, ImageFiles, examine
from ..data.splits import data_name, list_source, make_split
from ..weights import WEIGHTS_FILE, list_weights, places
from .devices import accelerator_on
from .fit import Predictions, predict
from .metrics import classification_metrics
from .validate import open_model

__all__ = ['extract_features', 'knn', 'linear_probe', 'probe']

_logger = logging.getLogger(__name__)

HUB = 'hf-hub:'
NEIGHBOURS = 20
TEMPERATURE = 0.07  # arXiv:1805.01978, section 3.4
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


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
        workers: int = 0,
        progress: bool | None = None,
) -> Predictions:
    """What a timm model's classifier would be given, (N, C), in place of the logits of `predict`."""
    with accelerator.autocast():
        return predict(_Backbone(model), dataset, accelerator, workers=workers, title='features', progress=progress)


def knn(
        features: torch.Tensor,
        labels: torch.Tensor,
        queries: torch.Tensor,
        classes: int,
        neighbours: int = NEIGHBOURS,
) -> torch.Tensor:
    """Votes (M, classes) of the nearest neighbours by cosine, weighted by exp(cosine / 0.07) (arXiv:1805.01978).

    Args:
        features: (N, C), of `labels` (N,).
        queries: (M, C).
        classes: Number of classes.
        neighbours: Number that vote.
    """
    features = F.normalize(features, dim=1)
    votes = torch.zeros(len(queries), classes)
    for rows, chunk in zip(votes.split(1024), F.normalize(queries, dim=1).split(1024), strict=True):
        cosine, nearest = (chunk @ features.T).topk(min(neighbours, len(features)), dim=1)
        rows.scatter_add_(1, labels[nearest], (cosine / TEMPERATURE).exp())
    return votes


def linear_probe(
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int,
        penalty: float = 1e-3,
        start: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multinomial logistic regression by L-BFGS.

    Args:
        features: (N, C).
        labels: (N,).
        classes: Number of classes.
        penalty: Of half the squared weights, the bias left out, beside the mean cross-entropy.
        start: Where to begin.

    Returns:
        (classes, C + 1): weights and, last, the bias.
    """
    weight = torch.zeros(classes, features.shape[1] + 1) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=300, tolerance_change=1e-7, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_apply(weight, features), labels) + penalty / 2 * weight[:, :-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def _apply(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return F.linear(features, weight[:, :-1], weight[:, -1])


def _chosen_probe(parts: dict[str, tuple[torch.Tensor, torch.Tensor]], classes: int) -> torch.Tensor:
    """Logits of the test part, by the penalty that is best on the held-out part, fitted anew on both."""
    (train, labels), (test, _) = parts['train'], parts['test']
    std, mean = torch.std_mean(train, 0)
    std = std.clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    penalty, weight = PENALTIES[len(PENALTIES) // 2], None
    if 'holdout' in parts:
        held_out, truth = (parts['holdout'][0] - mean) / std, parts['holdout'][1]
        best = -1
        for candidate in PENALTIES:
            weight = linear_probe(train, labels, classes, candidate, weight)
            right = (_apply(weight, held_out).argmax(1) == truth).sum().item()
            if right > best:
                best, penalty = right, candidate
        train, labels = torch.cat([train, held_out]), torch.cat([labels, truth])
    return _apply(linear_probe(train, labels, classes, penalty), test)


def _at_hand() -> list[str]:
    """The weights on this machine, in folders or in the cache of the Hub's client; the others are named in the log."""
    listed = list_weights()
    here = [w.name for w in listed if Path(w.location).exists() or w.location.startswith(HUB) and isinstance(
        try_to_load_from_cache(w.location.removeprefix(HUB).partition('@')[0], WEIGHTS_FILE), str)]
    if absent := [w.name for w in listed if w.name not in here]:
        _logger.info('not on this machine, and left out: %s; name them to fetch them', ', '.join(absent))
    known = {w.name for w in listed}
    others = {folder.name: str(folder) for place in reversed(places()) if place.is_dir()
              for folder in sorted(place.iterdir()) if folder.name not in known and (folder / WEIGHTS_FILE).is_file()}
    return [*here, *others.values()]


def probe(
        names: Sequence[str],
        data: str,
        protocol: str = '70-30',
        seeds: Sequence[int] = (0,),
        input_size: int = 0,
        holdout: float = 0.1,
        nested: bool = False,
        device: str = 'cpu',
        workers: int = 0,
        on_bad: str = 'skip',
        download: bool = False,
        progress: bool | None = None,
        on_row: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Score backbones on a data set, each file going once through each.

    Args:
        names: timm names or weights folders; 'all' stands for every weight on this machine (other networks' in
            $WRN_TIMM_WEIGHTS too, and what the Hub's client has in its cache).
        data: As in `finetune`.
        protocol: As `split` of `FinetuneConfig`, but no file.
        seeds: Of the split.
        input_size: Side of the square input; 0 takes the weights' own.
        holdout: Share of the training files by which the penalty of the linear probe is chosen.
        nested: As in `list_source`.
        device: 'cpu' or 'cuda'.
        workers: Processes that read photographs.
        on_bad: As in `examine`.
        download: As in `list_source`.
        progress: False shows no bar; None shows it in a terminal.
        on_row: Called with each row as it is done.

    Returns:
        A row a backbone and way ('linear probe', 'kNN'): `weights`, `way`, `dataset`, `protocol`, `input_size`,
        `seeds`, `train_files`, `test_files`, `skipped`, `seconds` (for both ways), and of `mean_per_class` and `top1`,
        in %, the `mean`, the sample standard deviation `std` and the `values`.

    Raises:
        What `list_source`, `examine` and `make_split` raise.
    """
    names = [n for name in names for n in (_at_hand() if name == 'all' else [name])]
    scan = examine(list_source(data, nested, download), on_bad, at_most=EXAMINED_AT_MOST)
    for line in scan.summary():
        _logger.info('%s', line)
    classes = scan.train.classes
    paths = [p for part in scan.parts().values() for p in part.paths]
    files = ImageFiles(paths, [i for part in scan.parts().values() for i in part.labels], classes)
    place = {p: i for i, p in enumerate(paths)}
    splits = [make_split(scan, protocol, holdout, seed) for seed in seeds]
    accelerator = accelerator_on(device)
    rows = []
    for name in names:
        began = time.monotonic()
        model = open_model(name).to(accelerator.device, memory_format=torch.channels_last)
        config = resolve_model_data_config(model)
        size = input_size or config['input_size'][-1]
        transform = create_transform(**config | {'input_size': (3, size, size), 'crop_pct': 1.0}, is_training=False)
        found = extract_features(model, files.as_dataset(transform), accelerator, workers, progress)
        row_of = {i: row for row, i in enumerate(found.index.tolist())}  # unreadable files have none
        scores: dict[str, list[dict[str, Any]]] = {'linear probe': [], 'kNN': []}
        for split in splits:
            parts = {}
            for part in ('train', 'holdout', 'test'):
                if chosen := getattr(split, part):
                    index = [row_of[place[p]] for p in chosen.paths if place[p] in row_of]
                    parts[part] = found.logits[index], found.labels[index]
            known = [torch.cat(column) for column in zip(*(parts[p] for p in ('train', 'holdout') if p in parts),
                                                         strict=True)]
            test, truth = parts['test']
            for way, logits in (('linear probe', _chosen_probe(parts, len(classes))),
                                ('kNN', knn(*known, test, len(classes)).log())):
                scores[way].append(classification_metrics(logits, truth, classes))
        seconds = round(time.monotonic() - began, 1)
        for way, metrics in scores.items():
            rows.append({
                'weights': name, 'way': way, 'dataset': data_name(data),
                'protocol': 'given' if scan.test else protocol, 'input_size': size, 'seeds': len(seeds),
                'train_files': len(known[0]), 'test_files': len(truth), 'skipped': found.bad, 'seconds': seconds,
                **{key: summarise([m[key] for m in metrics]) for key in ('mean_per_class', 'top1')}})
            if on_row:
                on_row(rows[-1])
    return rows


def summarise(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 of one value), and the values."""
    return {'mean': round(statistics.mean(values), 4),
            'std': round(statistics.stdev(values), 4) if len(values) > 1 else 0., 'values': values}
