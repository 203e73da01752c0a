"""The report on a fine-tuned classifier: figures, and a self-contained HTML file."""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..data.images import ImageFiles
from ..data.timm_sets import NamedImages
from ..names import duration
from ..recipes import finetune_command
from .measure import Predictions
from .report_parts import save_figure, set_title, short_name, table, whole_path, write_page

__all__ = ['draw_confusion', 'draw_predictions', 'draw_wrong', 'grad_cam', 'write_report']

_MOST_NAMES = 40


def grad_cam(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor | None:
    """Where a network looks for a class: Grad-CAM (arXiv:1610.02391) on its last feature map.

    Args:
        model: timm model in evaluation mode.
        images: Images (B, 3, H, W).
        classes: Index of a class for each image, (B,).

    Returns:
        Maps (B, H, W) from 0 to 1; None if the network's features are not a map, (B, C, h, w) or (B, h, w, C).
    """
    with torch.no_grad():
        features = model.forward_features(images)
    if features.ndim != 4:
        return None
    features = features.detach().requires_grad_()
    score = model.forward_head(features).gather(1, classes[:, None]).sum()
    gradient, = torch.autograd.grad(score, features)
    channels, sides = (3, (1, 2)) if getattr(model, 'output_fmt', 'NCHW') == 'NHWC' else (1, (2, 3))
    maps = (gradient.mean(sides, keepdim=True) * features.detach()).sum(channels)[:, None].relu()
    maps = F.interpolate(maps, images.shape[2:], mode='bilinear', align_corners=False)[:, 0]
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=1e-12)


def _grid(count: int, columns: int = 6) -> tuple[Figure, list]:
    columns = max(1, min(columns, count))
    rows = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(2 * columns, 2.5 * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.2 / rows, hspace=0.25, wspace=0.05)).flat)
    for axis in axes:
        axis.axis('off')
    return figure, axes


def _show(axis: Any, files: ImageFiles | NamedImages, i: int) -> None:
    try:
        image = files.read(i)
    except ValueError:  # it has become unreadable since it was measured
        return
    image.thumbnail((320, 320))
    axis.imshow(image)


def draw_predictions(files: ImageFiles | NamedImages, result: Predictions, path: Path, most: int = 24) -> None:
    """Draw test photographs, spread over the classes, with their predicted and true labels."""
    count = min(most, len(result.index))
    figure, axes = _grid(count)
    chosen = torch.linspace(0, len(result.index) - 1, count).round().int().tolist()
    for axis, row in zip(axes, chosen, strict=False):
        predicted, true = int(result.logits[row].argmax()), int(result.labels[row])
        _show(axis, files, int(result.index[row]))
        share = 100 * result.logits[row].softmax(0)[predicted].item()
        answer, truth = short_name(files.classes[predicted]), short_name(files.classes[true])
        if predicted == true:
            set_title(axis, f'{answer} {share:.0f} %', 'green')
        else:
            set_title(axis, f'{answer} {share:.0f} %\nis {truth}', 'firebrick')
    save_figure(figure, path)


def draw_wrong(
        model: torch.nn.Module,
        files: ImageFiles | NamedImages,
        result: Predictions,
        transform: Any,
        path: Path,
        most: int = 12,
) -> list[dict[str, Any]]:
    """Draw the most confident mistakes, each next to its Grad-CAM map.

    Returns:
        One row per photograph: `file`, `predicted`, `confidence` in %, `true`; the most confident first.
    """
    confidence, predicted = result.logits.softmax(1).max(1)
    wrong = (predicted != result.labels).nonzero()[:, 0]
    wrong = wrong[confidence[wrong].argsort(descending=True)][:most]
    rows, pictures, answers, places = [], [], [], []
    for i in wrong.tolist():
        place = int(result.index[i])
        try:
            pictures.append(transform(files.read(place)))
        except ValueError:  # as in `_show`
            continue
        answers.append(predicted[i])
        places.append(place)
        rows.append({'file': whole_path(files.name(place)), 'predicted': files.classes[predicted[i]],
                     'confidence': round(100 * confidence[i].item(), 1), 'true': files.classes[result.labels[i]]})
    figure, axes = _grid(2 * len(rows))
    if rows:
        device = next(model.parameters()).device
        images = torch.stack(pictures)
        maps = [grad_cam(model, image[None].to(device), answer[None].to(device))  # one at a time, to save memory
                for image, answer in zip(images, answers, strict=True)]
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        seen = ((images - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1)
        for k, row in enumerate(rows):
            _show(axes[2 * k], files, places[k])
            answer, truth = short_name(row['predicted']), short_name(row['true'])
            set_title(axes[2 * k], f"{answer} {row['confidence']:.0f} %\nis {truth}", 'firebrick')
            axes[2 * k + 1].imshow(seen[k].numpy(), interpolation='bicubic')
            if maps[k] is not None:
                axes[2 * k + 1].imshow(
                    maps[k][0].cpu().numpy(), cmap='jet', alpha=0.45, vmin=0, vmax=1, interpolation='bicubic')
                set_title(axes[2 * k + 1], f'Grad-CAM for\n{answer}', 'black')
    save_figure(figure, path)
    return rows


def draw_confusion(result: Predictions, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix, coloured by the share of the true class; with up to 40 classes, counts are shown."""
    n = len(classes)
    counts = multiclass_confusion_matrix(result.logits.argmax(1), result.labels, n)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(12., 3 + 0.35 * n)
    figure = Figure(figsize=(side + 1, side), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label='% of the true class')
    axes.set(xlabel='predicted', ylabel='true')
    if n <= _MOST_NAMES:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(n), [short_name(c) for c in classes], parse_math=False, fontsize=8)
        axes.tick_params('x', rotation=90)
        for i, j in counts.nonzero().tolist():
            axes.text(j, i, str(counts[i, j].item()), ha='center', va='center', fontsize=8 if n <= 25 else 6,
                      color='white' if share[i, j] > 60 else 'black')
    save_figure(figure, path)


def write_report(
        folder: Path,
        metrics: dict[str, Any],
        model: torch.nn.Module,
        files: ImageFiles | NamedImages,
        result: Predictions,
        transform: Any,
        found: dict[str, Any],
) -> None:
    """Write `confusion.png`, `wrong.png`, `predictions.png` and `report.html` into a run directory.

    Args:
        folder: Run directory with `curves.png` and `recipe.json`.
        metrics: Metrics, as in `metrics.json`.
        model: The measured model.
        files: The test files.
        result: The model's predictions for them.
        transform: The model's preprocessing.
        found: Facts about the data, from `prepare_split`, and its location as `data`.
    """
    draw_confusion(result, files.classes, folder / 'confusion.png')
    draw_predictions(files, result, folder / 'predictions.png')
    wrong = draw_wrong(model, files, result, transform, folder / 'wrong.png')
    counts = Counter(files.classes[i] for i in result.labels.tolist())
    _write_page(folder, metrics, wrong, _mistakes(result, files.classes), counts, found)


def _mistakes(result: Predictions, classes: tuple[str, ...], most: int = 10) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions: true class, predicted class, count, and % of the true class."""
    counts = multiclass_confusion_matrix(result.logits.argmax(1), result.labels, len(classes))
    size = counts.sum(1)
    count, place = counts.fill_diagonal_(0).flatten().topk(min(most, counts.numel()))
    return [(classes[i // len(classes)], classes[i % len(classes)], n, 100 * n / size[i // len(classes)].item())
            for n, i in zip(count.tolist(), place.tolist(), strict=True) if n]


def _outcome(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """Labels and values of the main results."""
    tried, chosen = ('penalties tried', 'number of the penalty') if 'penalty' in metrics else (
        'epochs trained', 'epoch of the weights')
    facts = [(label, metrics[key]) for key, label in (
        ('top1', 'accuracy, %'), ('top5', 'top-5 accuracy, %'),
        ('mean_per_class', 'mean per-class accuracy, %'), ('ece', 'expected calibration error, %'),
        ('split', 'split'), ('tested_on', 'tested on'), ('train_files', 'training files'),
        ('holdout_files', 'held-out files'), ('epochs', tried), ('best_epoch', chosen),
        ('chosen_by', 'chosen by'), ('stopped', 'stopped by')) if metrics[key] not in ('', None)]
    return [*facts, ('total time', duration(metrics['seconds']))]


def _write_page(
        folder: Path,
        metrics: dict[str, Any],
        wrong: list[dict[str, Any]],
        mistakes: list[tuple[str, str, int, float]],
        counts: Counter[str],
        found: dict[str, Any],
) -> None:
    tested = f"files of {metrics['tested_on']}" if metrics['tested_on'] else 'test files'
    title = f"{metrics['dataset']}: accuracy {metrics['top1']:.1f} % on {metrics['images']:,} {tested}"
    weakest = sorted(metrics['per_class'], key=lambda c: (metrics['per_class'][c] is None, metrics['per_class'][c]))
    classes = [(c, metrics['per_class'][c], metrics['precision'][c], counts[c]) for c in weakest]
    settings = json.loads((folder / 'recipe.json').read_text(encoding='utf-8'))['finetune']
    command = finetune_command(settings, whole_path(found['data']), os.path.abspath(folder))
    made_with = [*((name, str(value)) for name, value in metrics['used'].items()), *metrics['environment'].items()]
    curves = ('Loss, accuracy on held-out files, and penalty' if 'penalty' in metrics else
              'Loss, accuracy on held-out files, and learning rate')
    bad = [*metrics['skipped'], *(f'{b} has the same content as {a}, a training file' for a, b in metrics['leaks'])]
    write_page(
        folder, 'report.html', command, made_with, title=title, tested=tested, outcome=_outcome(metrics), curves=curves,
        all_correct=metrics['top1'] == 100,
        mistakes=table(('true', 'predicted', 'files', '% of the class'), mistakes),
        wrong=table(('predicted', 'true', 'confidence, %', 'file'),
                    [[row[k] for k in ('predicted', 'true', 'confidence', 'file')] for row in wrong]),
        classes=table(('class', 'recall, %', 'precision, %', 'files'), classes),
        notes=[*found.get('summary', ()), *bad[:50]])
