"""Linear classifiers on features, fitted to convergence, with a penalty chosen on files they were not fitted to."""
from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

from .measure import Features

__all__ = ['LinearFit', 'Loss', 'fit_linear', 'temperature']

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PENALTIES = tuple(10 ** (1 - i / 2) for i in range(13))  # from the strongest, 10, to 1e-5
_FOLDS = 5
_ENOUGH = 1000  # held-out files; with fewer, cross-validation over all files chooses better
_PATIENCE = 3  # penalties in a row without a better accuracy or loss, after which the search stops


def fit_linear(
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int,
        penalty: float,
        start: torch.Tensor | None = None,
        loss: Loss = F.cross_entropy,
) -> torch.Tensor:
    """Fit a multinomial logistic regression by L-BFGS. The loss never rises; without `start` it begins at chance level.

    Args:
        features: Features (N, C).
        labels: Labels (N,).
        classes: Number of classes.
        penalty: L2 penalty: coefficient of half the squared weights, without the bias.
        start: Initial weights and bias, as returned; None for zeros.
        loss: Convex loss of (logits, labels).

    Returns:
        Weights (classes, C + 1), with the bias in the last column.
    """
    weight = features.new_zeros(classes, features.shape[1] + 1) if start is None else start.clone()
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=300, tolerance_change=1e-7, history_size=20, line_search_fn='strong_wolfe')

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = loss(_apply(weight, features), labels) + penalty / 2 * weight[:, :-1].square().sum()
        total.backward()
        return total

    optimizer.step(closure)
    return weight.detach()


def _apply(weight: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return F.linear(features, weight[:, :-1], weight[:, -1])


def temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Temperature that makes a classifier as confident as it is accurate, without changing its predictions.

    The penalty that gives the best accuracy often gives far too little confidence. At the temperature, the mean
    confidence is the accuracy. The accuracy is (correct + 1) / (n + 2), since files of which every one is classified
    correctly do not tell how confident to be, and minimising their loss (arXiv:1706.04599) would give a temperature of
    0.

    Args:
        logits: Logits (N, classes) of files that the classifier was not fitted to.
        labels: Labels (N,).

    Returns:
        The number to divide the logits by, from 0.001 to 1000.
    """
    accuracy = ((logits.argmax(1) == labels).sum().item() + 1) / (len(labels) + 2)
    low, high = -3., 3.
    for _ in range(40):
        middle = (low + high) / 2
        confident = (logits / 10 ** middle).softmax(1).amax(1).mean().item() > accuracy
        low, high = (middle, high) if confident else (low, middle)
    return 10 ** low


class LinearFit:
    """A linear classifier whose penalty is chosen on files that it was not fitted to, before it is fitted to all files.

    The penalty is chosen on the held-out files if there are at least 1,000, else by five-fold cross-validation over the
    training and held-out files. Features are centred and divided by a single scale; the final classifier takes unscaled
    features.

    Args:
        train: Features (N, C) and labels of the training files.
        holdout: Features and labels of the held-out files; None if there are none.
        classes: Number of classes.
        loss: As in `fit_linear`.
        seed: Seed of the folds.
        device: Device to compute on.

    Raises:
        FloatingPointError: Features are not finite.

    Attributes:
        folds: Pairs of indices, to fit and to evaluate, into the training files followed by the held-out files.
        labels: Labels of the evaluated files, in the order of the folds.
    """

    def __init__(
            self,
            train: Features,
            holdout: Features | None,
            classes: int,
            loss: Loss = F.cross_entropy,
            seed: int = 0,
            device: torch.device | str = 'cpu',
    ):
        parts = [train, holdout] if holdout is not None else [train]
        features, self._labels = (
            torch.cat([getattr(p, name) for p in parts]).to(device) for name in ('features', 'labels'))
        if not features.isfinite().all():
            raise FloatingPointError('the features are not finite; the weights they come from are damaged')
        self._mean = features.mean(0)
        self._scale = (features - self._mean).square().mean().sqrt().clamp(min=1e-6)
        self._features = (features - self._mean) / self._scale
        self._classes, self._loss = classes, loss
        given = len(features) - len(train) >= _ENOUGH
        self.folds = [tuple(torch.arange(len(features)).split([len(train), len(features) - len(train)]))] if given \
            else _folds(self._labels.tolist(), seed)
        self.labels = self._labels.cpu()[torch.cat([asked for _, asked in self.folds])]

    def path(self) -> Iterator[tuple[dict[str, float], torch.Tensor]]:
        """Try the penalties, the strongest first, until three in a row improve neither accuracy nor loss.

        Yields:
            A row with `penalty`, `train_loss` (on the files fitted to, without the penalty), `holdout_loss` and
            `holdout_accuracy` in % (on the evaluated files); and the logits of the evaluated files.
        """
        weights: list[torch.Tensor | None] = [None] * len(self.folds)
        best, least, since = -1., math.inf, 0
        for penalty in PENALTIES:
            losses, logits = [], []
            for i, (known, asked) in enumerate(self.folds):
                features, labels = self._features[known], self._labels[known]
                weights[i] = self._fit(features, labels, penalty, weights[i])
                losses.append(self._loss(_apply(weights[i], features), labels).item())
                logits.append(_apply(weights[i], self._features[asked]).cpu())
            logits = torch.cat(logits)
            accuracy = 100 * (logits.argmax(1) == self.labels).float().mean().item()
            loss = F.cross_entropy(logits, self.labels).item()
            yield {'penalty': penalty, 'train_loss': sum(losses) / len(losses), 'holdout_loss': loss,
                   'holdout_accuracy': accuracy}, logits
            # with rare classes, only the loss falls at first
            since = 0 if accuracy > best or loss < least else since + 1
            best, least = max(best, accuracy), min(least, loss)
            if since == _PATIENCE:
                return

    def weight(self, penalty: float, temperature: float = 1.) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (classes, C) and bias (classes,) for unscaled features, fitted to all files."""
        found = self._fit(self._features, self._labels, penalty) / temperature
        weight, bias = found[:, :-1] / self._scale, found[:, -1]
        return weight, bias - weight @ self._mean

    def _fit(self, features, labels, penalty, start=None) -> torch.Tensor:
        return fit_linear(features, labels, self._classes, penalty, start, self._loss)


def _folds(labels: list[int], seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Indices to fit and to evaluate, for each of five stratified folds."""
    members = defaultdict(list)
    for i, label in enumerate(labels):
        members[label].append(i)
    rng, turn = random.Random(seed), []
    for label in sorted(members):
        turn += rng.sample(members[label], len(members[label]))
    fold = torch.empty(len(turn), dtype=torch.int64)
    fold[turn] = torch.arange(len(turn)) % _FOLDS
    return [((fold != i).nonzero()[:, 0], (fold == i).nonzero()[:, 0]) for i in range(min(_FOLDS, len(turn)))]
