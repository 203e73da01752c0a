"""What a fine-tuned classifier does, to be looked at: pictures and one HTML file that needs nothing beside it."""
from __future__ import annotations

import base64
import json
import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
import torch.nn.functional as F
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..data.folders import ImageFiles
from ..data.timm_sets import NamedImages
from ..files import atomic_write
from ..names import duration, printable
from ..recipes import finetune_command
from .measure import Predictions

__all__ = ['draw_confusion', 'draw_predictions', 'draw_wrong', 'grad_cam', 'write_report']

_MOST_NAMES = 40


def grad_cam(model: torch.nn.Module, images: torch.Tensor, classes: torch.Tensor) -> torch.Tensor | None:
    """Where a network looks for a class: Grad-CAM (arXiv:1610.02391) of its last feature map.

    Args:
        model: timm model in evaluation mode.
        images: (B, 3, H, W).
        classes: (B,).

    Returns:
        (B, H, W), 0 to 1; None where the network's features are no map (B, C, h, w).
    """
    with torch.no_grad():
        features = model.forward_features(images)
    if features.ndim != 4:
        return None
    features = features.detach().requires_grad_()
    score = model.forward_head(features).gather(1, classes[:, None]).sum()
    gradient, = torch.autograd.grad(score, features)
    maps = (gradient.mean((2, 3), keepdim=True) * features.detach()).sum(1, keepdim=True).relu()
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


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # a class name in another script
        atomic_write(path, lambda p: figure.savefig(p, dpi=100))


def _show(axis: Any, files: ImageFiles | NamedImages, i: int) -> None:
    try:
        image = files.read(i)
    except ValueError:  # it went away since it was measured
        return
    image.thumbnail((320, 320))
    axis.imshow(image)


def _short(name: str, most: int = 24) -> str:
    """A class name that leaves room in a picture for the picture."""
    name = printable(' '.join(name.split()))
    return name if len(name) <= most else f'{name[:most - 1]}…'


def _title(axis: Any, text: str, colour: str) -> None:
    axis.set_title(text, parse_math=False, fontsize=9, color=colour)


def draw_predictions(files: ImageFiles | NamedImages, result: Predictions, path: Path, most: int = 24) -> None:
    """Draw test photographs, spread over the classes, with predicted and true label."""
    count = min(most, len(result.index))
    figure, axes = _grid(count)
    chosen = torch.linspace(0, len(result.index) - 1, count).round().int().tolist()
    for axis, row in zip(axes, chosen, strict=False):
        predicted, true = int(result.logits[row].argmax()), int(result.labels[row])
        _show(axis, files, int(result.index[row]))
        share = 100 * result.logits[row].softmax(0)[predicted].item()
        right = predicted == true
        answer, truth = _short(files.classes[predicted]), _short(files.classes[true])
        _title(axis, f'{answer} {share:.0f} %' + ('' if right else f'\nis {truth}'), 'green' if right else 'firebrick')
    _save(figure, path)


def draw_wrong(
        model: torch.nn.Module,
        files: ImageFiles | NamedImages,
        result: Predictions,
        transform: Any,
        path: Path,
        most: int = 12,
) -> list[dict[str, Any]]:
    """Draw the wrong answers given with most confidence, each beside where the network looked for them.

    Returns:
        A row per photograph: `file`, `predicted`, `confidence` in %, `true`; the most confident first.
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
        rows.append({'file': _whole(files.name(place)), 'predicted': files.classes[predicted[i]],
                     'confidence': round(100 * confidence[i].item(), 1), 'true': files.classes[result.labels[i]]})
    figure, axes = _grid(2 * len(rows))
    if rows:
        device = next(model.parameters()).device
        images = torch.stack(pictures)
        maps = [grad_cam(model, image[None].to(device), answer[None].to(device))  # one at a time: memory
                for image, answer in zip(images, answers, strict=True)]
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        seen = ((images - low) / (high - low).clamp(min=1e-6)).permute(0, 2, 3, 1)
        for k, row in enumerate(rows):
            _show(axes[2 * k], files, places[k])
            answer, truth = _short(row['predicted']), _short(row['true'])
            _title(axes[2 * k], f"{answer} {row['confidence']:.0f} %\nis {truth}", 'firebrick')
            axes[2 * k + 1].imshow(seen[k].numpy(), interpolation='bicubic')
            if maps[k] is not None:
                axes[2 * k + 1].imshow(
                    maps[k][0].cpu().numpy(), cmap='jet', alpha=0.45, vmin=0, vmax=1, interpolation='bicubic')
                _title(axes[2 * k + 1], f'where it saw\n{answer}', 'black')
    _save(figure, path)
    return rows


def _whole(name: str) -> str:
    """A path that opens from any folder; the image of a named data set has none."""
    return os.path.abspath(name) if os.path.lexists(name) else name


def draw_confusion(result: Predictions, classes: tuple[str, ...], path: Path) -> None:
    """Draw the confusion matrix: the colour is the share of the true class; up to 40 classes, the number the count."""
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
            axis.set_ticks(range(n), [_short(c) for c in classes], parse_math=False, fontsize=8)
        axes.tick_params('x', rotation=90)
        for i, j in counts.nonzero().tolist():
            axes.text(j, i, str(counts[i, j].item()), ha='center', va='center', fontsize=8 if n <= 25 else 6,
                      color='white' if share[i, j] > 60 else 'black')
    _save(figure, path)


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
        folder: Holds `curves.png` and `history.csv`.
        metrics: As in its `metrics.json`.
        model: The measured weights.
        files: The test files.
        result: What the model says of them.
        transform: The model's preprocessing.
        found: What the scan of the data found, as of `prepare_split`, and as `data` where they are.
    """
    draw_confusion(result, files.classes, folder / 'confusion.png')
    draw_predictions(files, result, folder / 'predictions.png')
    wrong = draw_wrong(model, files, result, transform, folder / 'wrong.png')
    counts = Counter(files.classes[i] for i in result.labels.tolist())
    page = _page(folder, metrics, wrong, _mistakes(result, files.classes), counts, found)
    atomic_write(folder / 'report.html', page.encode(errors='replace').decode())  # names of files can be any bytes


_NARROWEST = 640  # pixels of a picture, below which its text is too small: it is scrolled
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('wrn_timm'), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined)
_TEMPLATES.filters['shown'] = lambda cell: (
    '-' if cell is None else f'{cell:.1f}' if isinstance(cell, float) else str(cell))


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[tuple[str, Markup, tuple[Any, ...]]]:
    """Name, attributes and cells of each column: numbers are set to the right, and a `file` is not broken."""
    columns = []
    for name, cells in zip(header, zip(*rows, strict=True), strict=bool(rows)):
        number = all(cell is None or isinstance(cell, (int, float)) for cell in cells)
        kind = 'path' if name == 'file' else 'number' if number else ''
        columns.append((name, Markup(f' class="{kind}"' if kind else ''), cells))
    return columns


def _picture(file: Path) -> dict[str, Any]:
    """The width in pixels that a picture has at least on a page, and its bytes in base64."""
    with Image.open(file) as image:
        width = min(image.width, _NARROWEST)
    return {'width': width, 'data': base64.b64encode(file.read_bytes()).decode()}


def _mistakes(result: Predictions, classes: tuple[str, ...], most: int = 10) -> list[tuple[str, str, int, float]]:
    """Class, what it was taken for, how often, and in % of the class; the most frequent first."""
    counts = multiclass_confusion_matrix(result.logits.argmax(1), result.labels, len(classes))
    size = counts.sum(1)
    count, place = counts.fill_diagonal_(0).flatten().topk(min(most, counts.numel()))
    return [(classes[i // len(classes)], classes[i % len(classes)], n, 100 * n / size[i // len(classes)].item())
            for n, i in zip(count.tolist(), place.tolist(), strict=True) if n]


def _outcome(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """What came out and what it took, with what to call it."""
    tried, chosen = ('penalties tried', 'number of the penalty') if 'penalty' in metrics else (
        'epochs trained', 'epoch of the weights')
    facts = [(label, metrics[key]) for key, label in (
        ('top1', 'accuracy, %'), ('top5', 'top-5 accuracy, %'),
        ('mean_per_class', 'mean per-class accuracy, %'), ('ece', 'expected calibration error, %'),
        ('split', 'split'), ('tested_on', 'tested on'), ('train_files', 'training files'),
        ('holdout_files', 'held-out files'), ('epochs', tried), ('best_epoch', chosen),
        ('chosen_by', 'chosen by'), ('stopped', 'stopped by')) if metrics[key] not in ('', None)]
    return [*facts, ('total time', duration(metrics['seconds']))]


def _page(
        folder: Path,
        metrics: dict[str, Any],
        wrong: list[dict[str, Any]],
        mistakes: list[tuple[str, str, int, float]],
        counts: Counter[str],
        found: dict[str, Any],
) -> str:
    tested = f"files of {metrics['tested_on']}" if metrics['tested_on'] else 'test files'
    title = f"{metrics['dataset']}: {metrics['top1']:.1f} % of {metrics['images']:,} {tested}"
    weakest = sorted(metrics['per_class'], key=lambda c: (metrics['per_class'][c] is None, metrics['per_class'][c]))
    classes = [(c, metrics['per_class'][c], metrics['precision'][c], counts[c]) for c in weakest]
    settings = json.loads((folder / 'recipe.json').read_text(encoding='utf-8'))['finetune']
    command = finetune_command(settings, _whole(found['data']), os.path.abspath(folder))
    made_with = [*metrics['used'].items(), *metrics['environment'].items(), ('date', time.strftime('%Y-%m-%d %H:%M'))]
    curves = ('Loss, accuracy on held-out files, and penalty' if 'penalty' in metrics else
              'Loss, accuracy on held-out files, and learning rate')
    bad = [*metrics['skipped'], *(f'{b} has the content of {a}, which was trained on' for a, b in metrics['leaks'])]
    return _TEMPLATES.get_template('report.html').render(
        title=title, tested=tested, outcome=_outcome(metrics), curves=curves,
        pictures={file.stem: _picture(file) for file in folder.glob('*.png')},
        mistakes=_table(('true', 'predicted', 'files', '% of the class'), mistakes),
        wrong=_table(('predicted', 'true', 'confidence, %', 'file'),
                     [[row[k] for k in ('predicted', 'true', 'confidence', 'file')] for row in wrong]),
        classes=_table(('class', 'recall, %', 'precision, %', 'files'), classes),
        notes=[*found.get('summary', ()), *bad[:50]], command=printable(command), made_with=made_with)
