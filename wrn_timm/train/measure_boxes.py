"""Predict boxes on test images, and compute COCO's metrics with pycocotools."""
from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tqdm import tqdm

from .machine import hidden

__all__ = ['THRESHOLDS', 'Curve', 'Target', 'curves', 'detection_metrics', 'predict_boxes']

Target = dict[str, torch.Tensor]
THRESHOLDS = np.arange(5, 100) / 100  # score thresholds; torchvision's detectors leave out lower scores


@torch.inference_mode()
def predict_boxes(
        detector: nn.Module,
        loader: Iterable[tuple[list[torch.Tensor], list[Target]]],
        device: torch.device | str = 'cpu',
        progress: bool | None = False,
) -> tuple[list[Target], list[Target]]:
    """Return the predictions for each image of a loader on the CPU, and the targets.

    Args:
        detector: Detector, which is put into evaluation mode.
        loader: Batches of images (3, H, W) and their targets.
        device: Device of the detector.
        progress: As in `Machine.progress`.
    """
    detector.eval()
    found, there = [], []
    for images, targets in tqdm(loader, 'testing', leave=False, disable=hidden(progress)):
        found += [{k: v.cpu() for k, v in f.items()} for f in detector([image.to(device) for image in images])]
        there += targets
    return found, there


@dataclasses.dataclass(frozen=True)
class Curve:
    """Precision and recall of a class at IoU 0.5, by descending score.

    Attributes:
        objects: Number of ground-truth objects.
        scores: Scores (N,), descending.
        precision: Precision (N,) of the boxes with at least each score, 0 to 1.
        recall: Recall (N,), likewise.
    """
    objects: int
    scores: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def at(self, threshold: float) -> tuple[float, float]:
        """Return precision and recall of the boxes with at least this score. Without boxes, precision is NaN."""
        n = int((self.scores >= threshold).sum())
        return (float(self.precision[n - 1]), float(self.recall[n - 1])) if n else (math.nan, 0.)

    def f1(self) -> np.ndarray:
        """Return the F1 score at each of `THRESHOLDS`; 0 where there is no box."""
        precision, recall = np.array([self.at(t) for t in THRESHOLDS]).T
        return np.nan_to_num(2 * precision * recall / np.maximum(precision + recall, 1e-12))


def _coco(images: Sequence[Target], classes: Sequence[str], scored: bool = False) -> COCO:
    """Convert boxes for pycocotools: corner, width and height, with ids from 1."""
    annotations = []
    for number, image in enumerate(images):
        for i, (box, label) in enumerate(zip(image['boxes'].tolist(), image['labels'].tolist(), strict=True)):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append({
                'id': len(annotations) + 1, 'image_id': number, 'category_id': label, 'iscrowd': 0,
                'bbox': [box[0], box[1], width, height], 'area': width * height,
                **({'score': float(image['scores'][i])} if scored else {})})
    coco = COCO()
    coco.dataset = {
        'images': [{'id': n} for n in range(len(images))], 'annotations': annotations,
        'categories': [{'id': i, 'name': name} for i, name in enumerate(classes, start=1)]}
    coco.createIndex()
    return coco


def _evaluated(found: Sequence[Target], there: Sequence[Target], classes: Sequence[str]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        evaluation = COCOeval(_coco(there, classes), _coco(found, classes, scored=True), 'bbox')
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


def curves(evaluation: COCOeval) -> dict[int, Curve]:
    """Return the curve of each class that has objects, by label."""
    params, found = evaluation.params, {}
    per_class = len(params.areaRng) * len(params.imgIds)
    for k, label in enumerate(params.catIds):
        # evalImgs is ordered by class, area range and image; the first range is all sizes
        rows = [row for row in evaluation.evalImgs[k * per_class:k * per_class + len(params.imgIds)] if row]
        objects = sum(len(row['gtIds']) for row in rows)
        if not objects:
            continue
        scores = np.concatenate([np.asarray(row['dtScores'], dtype=float) for row in rows])
        order = np.argsort(-scores, kind='stable')
        right = np.concatenate([row['dtMatches'][0] > 0 for row in rows])[order].cumsum()
        found[label] = Curve(objects, scores[order], right / np.arange(1, len(right) + 1), right / objects)
    return found


def _percent(value: float) -> float | None:
    return None if math.isnan(value) else round(100 * float(value), 2)


def _average(precision: np.ndarray) -> float | None:
    """Return the mean in %, without the undefined values that pycocotools marks by -1."""
    known = precision[precision > -1]
    return _percent(known.mean()) if known.size else None


def _middle_of_the_best(f1: np.ndarray) -> int:
    """Return the index of the highest F1, or that of 0.5 if nothing is found.

    Of several equal values in a row it is the middle one, farthest from both false positives and missed objects.
    """
    if not f1.max() > 0:
        return int(np.searchsorted(THRESHOLDS, 0.5))
    first = int(f1.argmax())
    lower = np.flatnonzero(f1[first:] < f1.max() - 1e-9)
    return first + (int(lower[0]) - 1 if len(lower) else len(f1) - 1 - first) // 2


def detection_metrics(
        found: Sequence[Target],
        there: Sequence[Target],
        classes: Sequence[str],
) -> tuple[dict[str, Any], dict[str, Curve]]:
    """Compute COCO's metrics in %, and the precision-recall curve of each class that occurs, by name.

    Args:
        found: Predictions per image as returned by torchvision's detectors: `boxes` (N, 4), `scores` (N,) and `labels`
            (N,).
        there: Ground truth per image: `boxes` and `labels`.
        classes: Class names; label 1 is the first.

    Returns:
        The metrics and the curves. The metrics are `images`; `map`, the mean average precision over IoU 0.5 to 0.95 and
        the classes, as COCO defines it, with the 100 best boxes per class and image; `map_50`; `map_75`; `threshold`,
        the score threshold with the highest mean F1 over the classes at IoU 0.5 (0.5 if nothing is found); `f1`,
        `precision` and `recall` at this threshold, as means over the classes; and `per_class` by name, with `objects`,
        `map`, `map_50`, `precision` and `recall`. Undefined values are None: all of a class that does not occur (except
        `objects`, which is 0), and the precision of a class without predictions above the threshold, which the mean
        leaves out.

    Raises:
        ValueError: There is no object in any image.
    """
    if not any(len(target['labels']) for target in there):
        raise ValueError('there is no object in the test images, so there is nothing to measure')
    evaluation = _evaluated(found, there, classes)
    precision = evaluation.eval['precision'][:, :, :, 0, -1]  # overlaps, recalls, classes; all sizes, 100 boxes
    by_label = curves(evaluation)
    f1 = np.mean([curve.f1() for curve in by_label.values()], axis=0)
    best = _middle_of_the_best(f1)
    threshold = float(THRESHOLDS[best])
    at = {label: curve.at(threshold) for label, curve in by_label.items()}
    per_class = {
        name: {
            'objects': by_label[i].objects if i in by_label else 0,
            'map': _average(precision[:, :, i - 1]), 'map_50': _average(precision[0, :, i - 1]),
            **dict(zip(('precision', 'recall'), map(_percent, at.get(i, (math.nan, math.nan))), strict=True))}
        for i, name in enumerate(classes, start=1)}
    known = [p for p, _ in at.values() if not math.isnan(p)]
    metrics = {
        'images': len(there), 'map': _average(precision), 'map_50': _average(precision[0]),
        'map_75': _average(precision[5]), 'threshold': threshold, 'f1': _percent(f1[best]),
        'precision': _percent(np.mean(known) if known else math.nan),
        'recall': _percent(np.mean([r for _, r in at.values()])), 'per_class': per_class}
    return metrics, {classes[label - 1]: curve for label, curve in by_label.items()}
