"""Report on a trained detector: pictures and a self-contained HTML file."""
from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from torchvision.ops import box_iou

from ..data.boxes import BoxedImages
from ..data.images import read_rgb
from ..names import duration
from ..recipes import detect_command
from .measure_boxes import THRESHOLDS, Curve, Target
from .report_parts import save_figure, set_title, short_name, table, whole_path, write_page

__all__ = ['MatchedBoxes', 'draw_curves', 'draw_photographs', 'match_boxes', 'write_detector_report']

_MOST_COLOURS = 10  # classes with a colour of their own
_MOST_ROWS, _MOST_NOTES = 20, 50
_FALSE, _MISSED, _RIGHT, _TRUE = '#e3242b', '#ff8c00', '#1769e0', '#16c43a'
_SIDE = 800  # pixels of the longer side to which photographs are reduced for drawing


@dataclasses.dataclass(frozen=True)
class MatchedBoxes:
    """Predicted boxes above a score threshold in an image, matched with the ground-truth boxes.

    Attributes:
        index: Index of the image.
        found: `boxes` (N, 4), `scores` (N,) and `labels` (N,) of the predicted boxes, by descending score.
        right: Whether each predicted box is a true positive, bool (N,).
        missed: Whether each ground-truth box is missed, bool (M,).
    """
    index: int
    found: Target
    right: torch.Tensor
    missed: torch.Tensor

    @property
    def false(self) -> int:
        """Number of false positives."""
        return int((~self.right).sum())

    @property
    def f1(self) -> float:
        """F1 score, 0 to 1; 1 if there is no object and none is predicted."""
        boxes = len(self.right) + len(self.missed)
        return 2 * int(self.right.sum()) / boxes if boxes else 1.

    @property
    def rank(self) -> tuple[float, float, int]:
        """Sort key, higher for better images: F1, then how much higher true positives score than false ones."""
        scores = self.found['scores']
        right, false = (float(scores[of].mean()) if of.any() else 0. for of in (self.right, ~self.right))
        return self.f1, right - false, -int(self.missed.sum())

    def __str__(self) -> str:
        objects, missed = len(self.missed), int(self.missed.sum())
        wrong = ', '.join(f'{n} {what}' for n, what in ((missed, 'missed'), (self.false, 'false')) if n)
        if not objects:
            return f'no object: {wrong}' if wrong else 'no object, and none found'
        count = f'{objects:,} object{"s" * (objects > 1)}'
        return f'{count}: {wrong}' if wrong else f'{count}, {"all " * (objects > 1)}found'


def match_boxes(index: int, found: Target, boxes: torch.Tensor, labels: torch.Tensor, threshold: float) -> MatchedBoxes:
    """Match predicted boxes with ground-truth boxes as COCO does.

    By descending score, each predicted box takes the unmatched ground-truth box of its class with the highest IoU, if
    that is at least 0.5.

    Args:
        index: Index of the image.
        found: Predictions: `boxes` (N, 4), `scores` (N,), `labels` (N,).
        boxes: Ground-truth boxes (M, 4).
        labels: Ground-truth labels (M,).
        threshold: Lowest score of a predicted box that counts.
    """
    keep = found['scores'].double() >= threshold
    order = found['scores'][keep].argsort(descending=True, stable=True)
    found = {key: found[key][keep][order] for key in ('boxes', 'scores', 'labels')}
    overlap = box_iou(found['boxes'].double(), boxes.double()) * (found['labels'][:, None] == labels)
    right, missed = torch.zeros(len(overlap), dtype=torch.bool), torch.ones(len(labels), dtype=torch.bool)
    for i, row in enumerate(overlap if len(labels) else ()):
        most, best = (row * missed).max(0)
        if most >= 0.5:
            right[i], missed[best] = True, False
    return MatchedBoxes(index, found, right, missed)


def draw_curves(metrics: dict[str, Any], curves: dict[str, Curve], path: Path) -> None:
    """Plot precision against recall and F1 against the score threshold, for each class and their mean.

    Up to 10 classes have a colour each.

    Args:
        metrics: Metrics from `detection_metrics`.
        curves: Curves from `detection_metrics`.
        path: Image file to write.
    """
    figure = Figure(figsize=(12, 4.6), layout='constrained')
    left, right = figure.subplots(1, 2)
    by_colour, handles, labels = len(curves) <= _MOST_COLOURS, [], []
    f1 = {name: curve.f1() for name, curve in curves.items()}
    marks = dict(marker='o', markersize=7, markeredgecolor='white', linestyle='', clip_on=False, zorder=5)
    for i, (name, curve) in enumerate(curves.items()):
        style = dict(color=f'C{i}', linewidth=1.5) if by_colour else dict(color='0.5', linewidth=0.7, alpha=0.6)
        line, = left.plot([0, *100 * curve.recall], [100, *100 * curve.precision], **style)
        right.plot(THRESHOLDS, 100 * f1[name], **style)
        if by_colour:
            precision, recall = curve.at(metrics['threshold'])
            left.plot(100 * recall, 100 * precision, color=f'C{i}', **marks)
            handles.append(line)
            labels.append(f"{metrics['per_class'][name]['map_50']:.1f}  {short_name(name)}")
    if not by_colour:
        handles.append(line)
        labels.append(f'each of {len(curves)} classes')
    if len(curves) > 1:
        at = np.array([[curve.at(t) for t in THRESHOLDS] for curve in curves.values()])
        at = at[:, ~np.isnan(at[..., 0]).all(0)]  # thresholds at which any class has a box
        precision, recall = np.nanmean(at[..., 0], 0), at[..., 1].mean(0)
        mean, = left.plot(100 * recall, 100 * precision, color='black', linewidth=2)
        right.plot(THRESHOLDS, 100 * np.mean(list(f1.values()), axis=0), color='black', linewidth=2)
        if metrics['precision'] is not None:
            left.plot(metrics['recall'], metrics['precision'], color='black', **marks)
        handles.append(mean)
        labels.append(f"{metrics['map_50']:.1f}  mean")
    right.axvline(metrics['threshold'], color='0.3', linestyle='--', linewidth=1)
    handles.append(Line2D([], [], color='0.3', **marks | dict(linestyle='--')))
    labels.append(f"threshold {metrics['threshold']:g}")
    left.set(xlabel='recall, %', ylabel='precision, %', title='precision and recall at IoU 0.5', xlim=(-1, 101))
    right.set(xlabel='score threshold', ylabel='F1, %', title='F1 at IoU 0.5', xlim=(0, 1))
    for axes in (left, right):
        axes.set_ylim(-1, 101)
        axes.grid(alpha=0.3)
    legend = figure.legend(
        handles, labels, loc='outside right upper', frameon=False, title='AP@0.5, %', alignment='left')
    for text in legend.get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def _readable(
        test: BoxedImages,
        images: Sequence[MatchedBoxes],
) -> Iterator[tuple[MatchedBoxes, Image.Image, tuple[int, int]]]:
    """Yield the boxes, the reduced picture and its original size for each image that can be read."""
    for matched in images:
        try:
            picture = read_rgb(test.paths[matched.index])
        except ValueError:  # removed since it was measured
            continue
        size = picture.size
        picture.thumbnail((_SIDE, _SIDE))
        yield matched, picture, size


def draw_photographs(test: BoxedImages, images: Sequence[MatchedBoxes], path: Path, most: int = 6) -> None:
    """Draw the first `most` readable images with their ground-truth and predicted boxes.

    If there is none, an existing file is removed.

    Args:
        test: Test images with ground-truth boxes.
        images: Images to draw, with matched predictions.
        path: Image file to write.
        most: Maximum number of images.
    """
    shown = list(itertools.islice(_readable(test, images), most))
    if not shown:
        path.unlink(missing_ok=True)
        return
    columns = min(3, len(shown))
    width = 12 / columns if columns > 1 else 7  # inches
    rows = [shown[i:i + columns] for i in range(0, len(shown), columns)]
    heights = [0.45 + width * min(1.2, max(size[1] / size[0] for *_, size in row)) for row in rows]
    figure = Figure(figsize=(width * columns, 0.4 + sum(heights)), layout='constrained')
    axes = list(figure.subplots(len(rows), columns, squeeze=False, height_ratios=heights).flat)
    for axis in axes:
        axis.axis('off')
        axis.set_anchor('N')
    for axis, (matched, picture, size) in zip(axes, shown, strict=False):
        _draw_photograph(axis, picture, size, matched, test)
    handles = [Line2D([], [], color=colour, linestyle=style, linewidth=2) for colour, style in (
        (_TRUE, '--'), (_MISSED, '--'), (_RIGHT, '-'), (_FALSE, '-'))]
    figure.legend(handles, ['true, found', 'true, missed', 'predicted, right', 'predicted, false'],
                  loc='outside lower center', ncols=4, frameon=False)
    save_figure(figure, path)


def _draw_photograph(
        axis: Axes,
        picture: Image.Image,
        size: tuple[int, int],
        matched: MatchedBoxes,
        test: BoxedImages,
) -> None:
    axis.imshow(picture, extent=(0, size[0], size[1], 0))  # boxes are in pixels of the original
    name = short_name(os.path.basename(test.paths[matched.index]), 40)
    set_title(axis, f'{name}\n{matched}', 'firebrick' if matched.f1 < 1 else 'green')
    boxes, labels, missed = test.boxes[matched.index], test.labels[matched.index], matched.missed
    _draw_boxes(axis, boxes[~missed], _TRUE, '--')
    _draw_boxes(axis, boxes[missed], _MISSED, '--', [short_name(test.classes[i - 1], 16) for i in labels[missed]])
    for of, colour in ((~matched.right, _FALSE), (matched.right, _RIGHT)):
        found = {key: value[of] for key, value in matched.found.items()}
        _draw_boxes(axis, found['boxes'], colour, '-', [
            f'{short_name(test.classes[i - 1], 16)} {score:.2f}'
            for i, score in zip(found['labels'].tolist(), found['scores'].tolist(), strict=True)])


def _draw_boxes(axis: Axes, boxes: torch.Tensor, colour: str, style: str, texts: Sequence[str] = ()) -> None:
    """Draw boxes, each with its text at the upper corner from which the text runs into the photograph."""
    _, width, height, _ = axis.get_images()[0].get_extent()
    for x0, y0, x1, y1 in boxes.tolist():
        axis.add_patch(Rectangle(
            (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linestyle=style, linewidth=1.3))
    for (x0, y0, x1, _), text in zip(boxes.tolist(), texts, strict=bool(texts)):
        x, side = (x0, 'left') if x0 + x1 < width else (x1, 'right')
        axis.text(x, y0, text, parse_math=False, color='white', fontsize=6, clip_on=True, ha=side,
                  va='top' if y0 < 0.04 * height else 'bottom', bbox=dict(facecolor=colour, edgecolor='none', pad=0.6))


def write_detector_report(
        folder: Path,
        metrics: dict[str, Any],
        curves: dict[str, Curve],
        test: BoxedImages,
        predictions: list[Target],
        found: dict[str, Any],
) -> None:
    """Write `precision_recall.png`, `best.png`, `worst.png` and `report.html` into a run directory.

    Photographs are ranked by F1 at IoU 0.5 and the best threshold. No photograph is in both pictures, and none without
    a mistake is among the worst.

    Args:
        folder: Run directory with `curves.png` and `recipe.json`.
        metrics: Content of its `metrics.json`.
        curves: Curves from `detection_metrics`, of each class that occurs.
        test: Test images.
        predictions: Predictions of the detector on them.
        found: `data`, the source of the images, and `summary`, that of their scan.
    """
    draw_curves(metrics, curves, folder / 'precision_recall.png')
    ranked = sorted((match_boxes(i, *image, metrics['threshold']) for i, image in enumerate(zip(
        predictions, test.boxes, test.labels, strict=True))), key=lambda image: image.rank)
    wrong = [image for image in ranked if image.f1 < 1]
    worst = wrong[:(len(ranked) + 1) // 2]
    draw_photographs(test, worst, folder / 'worst.png')
    draw_photographs(test, ranked[len(worst):][::-1], folder / 'best.png')
    settings = json.loads((folder / 'recipe.json').read_text(encoding='utf-8'))['detect']
    classes = [(name, *(row[key] for key in ('objects', 'map', 'map_50', 'precision', 'recall')))
               for name, row in metrics['per_class'].items()]
    classes.sort(key=lambda row: (row[2] is None, row[2]))
    write_page(
        folder, 'detector_report.html', detect_command(settings, _whole_source(found['data']), os.path.abspath(folder)),
        [*((name, str(value)) for name, value in settings.items() if value != ''), *metrics['environment'].items()],
        title=f"{metrics['dataset']}: mAP@0.5 {metrics['map_50']:.1f} % on {metrics['images']:,} test "
              f"photograph{'s' * (metrics['images'] != 1)}",
        outcome=_outcome(metrics), curves='Loss and learning rate', threshold=f"{metrics['threshold']:g}",
        classes=table(('class', 'objects', 'AP@0.5:0.95, %', 'AP@0.5, %', 'precision, %', 'recall, %'), classes),
        wrong=table(('F1,\xa0%', 'objects', 'missed', 'false', 'file'), [
            (100 * image.f1, len(image.missed), int(image.missed.sum()), image.false,
             whole_path(test.paths[image.index])) for image in wrong[:_MOST_ROWS]]),
        mistaken=f'{len(wrong):,} of {len(ranked):,}', notes=_notes(metrics, found['summary']))


def _whole_source(data: str) -> str:
    """Make the path in a source of `read_boxes` absolute, keeping the format before it."""
    kind, colon, path = data.partition(':')
    return f'{kind}:{whole_path(path)}' if colon and not os.path.lexists(data) else whole_path(data)


def _outcome(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the results and costs of the run, each with its name."""
    return [
        ('mAP@0.5:0.95, %', metrics['map']), ('mAP@0.5, %', metrics['map_50']), ('mAP@0.75, %', metrics['map_75']),
        ('precision, %', metrics['precision']), ('recall, %', metrics['recall']),
        ('best threshold', f"{metrics['threshold']:g}"), ('split', metrics['split']),
        ('training photographs', metrics['train_images']), ('epochs', metrics['epochs']),
        ('image size, px', metrics['image_size']), ('training time', duration(metrics['train_seconds'])),
        ('total time', duration(metrics['seconds']))]


def _notes(metrics: dict[str, Any], summary: Sequence[str]) -> list[str]:
    """Return the summary of the scan, duplicates across the split, and what was left out, without repetition."""
    left_out = [f'left out: {reason}' for reason in metrics['left_out']]
    notes = [*(line for line in summary if line not in set(left_out)),
             *(f'{b} has the same content as {a}, a training file' for a, b in metrics['leaks']), *left_out]
    more = len(notes) - _MOST_NOTES
    return notes if more <= 0 else [*notes[:_MOST_NOTES], f'and {more:,} more, listed in metrics.json']
