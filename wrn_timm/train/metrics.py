"""Metrics of a classifier, and their summary over several runs."""
from __future__ import annotations

import statistics
from typing import Any

import torch
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_precision,
)

__all__ = ['classification_metrics', 'summarise']


def classification_metrics(logits: torch.Tensor, labels: torch.Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Accuracies, and expected calibration error with 15 bins (arXiv:1706.04599), in %.

    Args:
        logits: Logits (N, classes).
        labels: Labels (N,), int64.
        classes: Names of the classes.

    Returns:
        `images` (their number), `top1`, `top5` (None with fewer than six classes), `mean_per_class`, `per_class`
        (recall by class name; None for a class without images), `precision` (by class name; None for a class that is
        never predicted) and `ece`.

    Raises:
        FloatingPointError: A logit is not finite.
    """
    if bad := int((~logits.isfinite().all(1)).sum()):
        raise FloatingPointError(f'the network gives logits that are not finite for {bad} of {len(logits)} images; its '
                                 f'weights are damaged, or their training diverged')
    n = len(classes)
    precision = multiclass_precision(logits, labels, n, average='none')
    predicted = torch.bincount(logits.argmax(1), minlength=n) > 0
    per_class = multiclass_accuracy(logits, labels, n, average='none')
    present = torch.bincount(labels, minlength=n) > 0

    def percent(x: torch.Tensor) -> float:
        return round(100 * x.item(), 4)

    def by_name(values: torch.Tensor, known: torch.Tensor) -> dict[str, float | None]:
        return {c: percent(v) if k else None for c, v, k in zip(classes, values, known, strict=True)}

    return {
        'images': len(labels),
        'top1': percent(multiclass_accuracy(logits, labels, n, average='micro')),
        'top5': percent(multiclass_accuracy(logits, labels, n, average='micro', top_k=5)) if n > 5 else None,
        'mean_per_class': percent(per_class[present].mean()),
        'per_class': by_name(per_class, present),
        'precision': by_name(precision, predicted),
        'ece': percent(multiclass_calibration_error(logits.softmax(1), labels, n, n_bins=15)),
    }


def summarise(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (0 for a single value), and the values."""
    return {'mean': round(statistics.mean(values), 4),
            'std': round(statistics.stdev(values), 4) if len(values) > 1 else 0., 'values': values}
