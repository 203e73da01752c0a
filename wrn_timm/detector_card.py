"""Card (README.md), metrics and golden scores of a detector's weights folder."""
from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCardData
from torch import nn
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from .card import GOLDEN_FILE, TEMPLATES, first_photographs, owners_licence, read_history, training_line
from .data.images import read_rgb
from .detection import DETECTOR_FILE, open_detector, postprocessor
from .files import atomic_write, write_json
from .names import duration, printable, some
from .recipes import detect_command
from .schemas import check_detector, read_json

__all__ = ['check_golden_detector', 'detector_card', 'detector_name', 'finish_detector_folder']

_NAMES = {'faster_rcnn': ('Faster R-CNN', '1506.01497'), 'retinanet': ('RetinaNet', '1708.02002')}
_PHOTOGRAPHS, _SIDE, _SCORES = 2, 128, 10  # of the golden scores
_LONGEST = 96  # characters of a repository's name
_PRIVATE = ('leaks', 'left_out')  # metrics that name files on this machine


def detector_name(record: dict[str, Any]) -> str:
    """Return `<detector>_<arch>.<data>`, the name of a detector's repository on the Hub.

    Args:
        record: Content of `detector.json`.
    """
    arch = record['detect']['model'].rpartition('/')[2].partition('.')[0]
    data = re.sub('[^A-Za-z0-9]+', '_', record.get('data', '')).strip('_') or 'own'
    return f"{record['detect']['detector']}_{arch}.{data}"[:_LONGEST].rstrip('_')


def _accuracy(metrics: dict[str, Any]) -> str:
    """Describe the test metrics and how they were measured."""
    return (
        f"mAP@0.5:0.95 **{metrics['map']:.2f} %**, mAP@0.5 **{metrics['map_50']:.2f} %**, mAP@0.75 "
        f"{metrics['map_75']:.2f} %, as COCO defines them. Measured by `{metrics['measured_by']}` on "
        f"{metrics['images']:,} test photographs of {printable(metrics['dataset'])} (split: {metrics['split']}) "
        f"with these weights, reloaded from disk: one seed, weights of the last epoch.")


def _training(folder: Path, metrics: dict[str, Any], record: dict[str, Any]) -> str:
    """Describe the duration, speed, seed and hardware of the run."""
    history = read_history(folder)
    rate = statistics.harmonic_mean(float(row['images_per_second']) for row in history)
    took = f"{duration(metrics['train_seconds'])} at {rate:.1f} photographs/s"
    steps = f"{len(history)} epochs of {metrics['train_images']:,} photographs"
    return training_line(took, steps, record['detect']['seed'], record)


def detector_card(folder: str | Path, metrics: dict[str, Any] | None = None) -> str:
    """Create the card (README.md) of a detector from its `detector.json`, `metrics.json` and `history.csv`.

    It names no licence until the owner adds one to the first lines of the card, where it is kept.

    Args:
        folder: Weights folder of a `wrn-timm detect` run.
        metrics: Metrics to use instead of those in `metrics.json`.
    """
    folder = Path(folder)
    record = read_json(folder / DETECTOR_FILE, check_detector)
    metrics = metrics or json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    settings, name, licence = record['detect'], detector_name(record), owners_licence(folder / 'README.md')
    wide = settings['model'].startswith('wrn')
    measured = {'mAP@0.5:0.95': metrics['map'], 'mAP@0.5': metrics['map_50']}
    data = ModelCardData(
        library_name='torchvision', license=licence or None, pipeline_tag='object-detection',
        tags=['wrn_timm', *['wide-residual-network'] * wide, settings['detector'].replace('_', '-')], model_name=name,
        eval_results=[
            EvalResult(
                task_type='object-detection', dataset_type=metrics['dataset'], dataset_name=metrics['dataset'],
                dataset_split='test', metric_type='mean_average_precision', metric_name=metric, metric_value=value)
            for metric, value in measured.items()])
    title, paper = _NAMES[settings['detector']]
    return TEMPLATES.get_template('detector_card.md').render(
        header=data.to_yaml(), licence=licence, name=name, detector=title, paper=paper, wide=wide,
        network=settings['model'], pretrained=settings['pretrained'], classes=record['classes'],
        named=some([printable(c) for c in record['classes']]), dataset=printable(metrics['dataset']), metrics=metrics,
        per_class={printable(c): row for c, row in metrics['per_class'].items()},
        accuracy=_accuracy(metrics), golden=GOLDEN_FILE, training=_training(folder, metrics, record),
        command=detect_command(settings), size=settings['image_size'],
        settings={k: v for k, v in settings.items() if v or k in ('pretrained', 'seed')})


@torch.inference_mode()
def _highest_scores(detector: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the ten highest scores on each of the uint8 images (N, 3, H, W), padded with 0."""
    postprocessor(detector).score_thresh = 0.
    scores = [found['scores'].sort(descending=True).values[:_SCORES] for found in detector(list(images / 255))]
    return torch.stack([nn.functional.pad(s, (0, _SCORES - len(s))) for s in scores])


def finish_detector_folder(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Write the metrics, golden scores and card of a detector, and add the threshold to its `detector.json`.

    The golden scores are computed on photographs of Caltech 101, never on the user's own, because these photographs are
    published with the folder.

    Args:
        folder: Weights folder of a `wrn-timm detect` run.
        metrics: Metrics as measured by `train_detector`.
    """
    folder = Path(folder)
    metrics = {k: v for k, v in metrics.items() if k not in _PRIVATE}
    images = torch.stack([
        pil_to_tensor(center_crop(resize(read_rgb(p), _SIDE), [_SIDE, _SIDE]))
        for p in first_photographs()[:_PHOTOGRAPHS]])
    scores = _highest_scores(open_detector(folder), images)
    card = detector_card(folder, metrics)
    atomic_write(
        folder / GOLDEN_FILE, lambda p: np.savez_compressed(p, images=images.numpy(), scores=scores.numpy()))
    write_json(folder / 'metrics.json', metrics)
    atomic_write(folder / 'README.md', card)
    record = read_json(folder / DETECTOR_FILE, check_detector) | {'threshold': metrics['threshold']}
    write_json(folder / DETECTOR_FILE, record)


def check_golden_detector(folder: str | Path) -> float:
    """Return the largest relative difference between the golden scores of a folder and those of its detector now.

    The difference is relative to the golden score, or to 0.001 if that is lower.
    """
    with np.load(Path(folder) / GOLDEN_FILE) as golden:
        images, scores = (torch.from_numpy(golden[k]) for k in ('images', 'scores'))
    found = _highest_scores(open_detector(folder), images)
    return ((found - scores).abs() / scores.clamp(min=1e-3)).max().item()
