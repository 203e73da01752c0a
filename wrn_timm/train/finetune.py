"""Fine-tuning pretrained weights on class folders of photographs."""
from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform, resolve_model_data_config
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.folders import ImageFiles, read_rgb, scan_folder
from ..data.splits import split_files
from .metrics import classification_metrics, predict_logits
from .rundir import RunDir, atomic_write, environment, export_weights
from .validate import open_model

__all__ = ['FinetuneConfig', 'finetune']

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """How weights are fine-tuned: all layers, SGD with Nesterov momentum, a cosine with a short warm-up.

    Attributes:
        model: timm name with tag, or a weights folder.
        input_size: Side of the square input, in pixels; 0 takes the weights' own, but 64 where that is less.
        epochs: Passes over the training files.
        batch_size: Files a step.
        lr: Peak learning rate of the last layers.
        layer_decay: Factor of the learning rate from each block to the one below it.
        weight_decay: L2 penalty on weights; biases and BatchNorm are left out.
        label_smoothing: Mass moved from the label to all classes.
        min_scale: Least share of a photograph's area in a training crop.
        test_fraction: Share held out of each class where the folder is not split already.
        seed: Of the split, the order, the crops and the new classifier.
    """
    model: str = 'wrn16_1.cifar10'
    input_size: int = 0
    epochs: int = 30
    batch_size: int = 16
    lr: float = 0.05
    layer_decay: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1
    min_scale: float = 0.5
    test_fraction: float = 0.3
    seed: int = 0

    def __post_init__(self):
        for field, low, high in (('epochs', 1, math.inf), ('batch_size', 1, math.inf), ('label_smoothing', 0, 0.999),
                                 ('test_fraction', 0.001, 0.999), ('min_scale', 0.001, 1), ('input_size', 0, 4096)):
            if not low <= getattr(self, field) <= high:
                raise ValueError(f'{field} is {getattr(self, field)}; it must be from {low} to {high}')


def finetune(
        config: FinetuneConfig,
        data: str | Path,
        out: str | Path,
        device: str = 'cpu',
        workers: int = 0,
        on_bad: str = 'skip',
) -> dict[str, Any]:
    """Fine-tune on `data` and leave a run directory with weights, metrics and pictures.

    Args:
        config: How.
        data: Folder of class folders, with or without `train/` and `test/` (or `val/`).
        out: Run directory.
        device: 'cpu' or 'cuda'.
        workers: Processes that read photographs.
        on_bad: 'skip' leaves unreadable files out and names them, 'fail' stops.

    Returns:
        The metrics on the held-out files after the last epoch, as written to `metrics.json`.

    Raises:
        FloatingPointError: The loss is no longer finite.
        What `scan_folder`, `split_files` and `RunDir` raise.
    """
    random_seed(config.seed)  # timm's transforms draw from Python's and NumPy's generators too
    scan = scan_folder(data, on_bad)
    for reason in scan.bad:
        _logger.warning('left out: %s', reason)
    train, test = (scan.train, scan.test) if scan.test else split_files(scan.train, config.test_fraction, config.seed)
    batch_size = min(config.batch_size, len(train))
    model = open_model(config.model, num_classes=len(train.classes)).to(device, memory_format=torch.channels_last)
    data_config = resolve_model_data_config(model)
    size = config.input_size or max(64, data_config['input_size'][-1])
    data_config['input_size'] = (3, size, size)
    data_config['crop_pct'] = 1.0
    test_transform = create_transform(**data_config, is_training=False)
    train_transform = create_transform(
        **{k: v for k, v in data_config.items() if k not in ('crop_pct', 'crop_mode')},
        is_training=True, scale=(config.min_scale, 1.), color_jitter=0.2)
    generator = torch.Generator().manual_seed(config.seed)
    train_loader = DataLoader(train.as_dataset(train_transform), batch_size, shuffle=True, drop_last=True,
                              num_workers=workers, generator=generator, persistent_workers=workers > 0)
    test_loader = DataLoader(test.as_dataset(test_transform), 64, num_workers=workers)

    optimizer = create_optimizer_v2(
        model, 'nesterov', lr=config.lr, weight_decay=config.weight_decay, momentum=0.9,
        layer_decay=config.layer_decay)
    steps = len(train_loader)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=config.epochs * steps, t_in_epochs=False, warmup_t=steps, warmup_lr_init=config.lr / 100,
        warmup_prefix=False)
    criterion = LabelSmoothingCrossEntropy(config.label_smoothing)
    _logger.info('%d classes, %d files to train on, %d held out; %s at %d px on %s', len(train.classes), len(train),
                 len(test), config.model, data_config['input_size'][-1], device)

    name = Path(data).resolve().name
    run = RunDir(out, {'finetune': dataclasses.asdict(config), 'data': name}, resume=None)
    history, started = [], time.monotonic()
    for epoch in range(config.epochs):
        model.train()
        total = 0.
        batches = tqdm(train_loader, desc=f'epoch {epoch + 1}/{config.epochs}', unit='batch', leave=False, disable=None)
        for step, (images, labels) in enumerate(batches, start=epoch * steps):
            scheduler.step_update(step)
            logits = model(images.to(device, memory_format=torch.channels_last))
            loss = criterion(logits, labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
            batches.set_postfix(loss=f'{total / (step - epoch * steps + 1):.3f}')
        if not math.isfinite(total):
            raise FloatingPointError(f'loss is {total / steps} in epoch {epoch + 1}; try a smaller learning rate')
        logits, labels = predict_logits(model, test_loader, device)
        metrics = classification_metrics(logits, labels, train.classes)
        history.append({
            'epoch': epoch + 1, 'lr': optimizer.param_groups[-1]['lr'], 'train_loss': total / steps,
            'held_out_accuracy': metrics['top1'], 'seconds': round(time.monotonic() - started, 1)})
        run.write_history(history)
        _logger.info('epoch %2d/%d  loss %.3f  held-out accuracy %5.1f %%  %4.0f s', epoch + 1, config.epochs,
                     total / steps, metrics['top1'], history[-1]['seconds'])

    metrics |= {'dataset': name, 'split': 'test' if scan.test else f'{config.test_fraction:g} held out',
                'skipped': list(scan.bad), 'environment': environment()}
    atomic_write(run.path / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    folder = run.path / 'weights'
    export_weights(model, folder, {
        **{k: data_config[k] for k in ('input_size', 'crop_pct')}, 'tag': name,
        'pool_size': _pool_size(model, data_config['input_size']), 'label_names': train.classes})
    for file in ('recipe.json', 'history.csv', 'curves.png', 'metrics.json'):
        shutil.copy(run.path / file, folder / file)
    draw_predictions(test, logits, run.path / 'predictions.png')
    return metrics


def _pool_size(model: torch.nn.Module, input_size: tuple[int, int, int]) -> tuple[int, int]:
    reduction = model.feature_info[-1]['reduction']
    return tuple(math.ceil(s / reduction) for s in input_size[1:])


def draw_predictions(files: ImageFiles, logits: torch.Tensor, path: Path, most: int = 24) -> None:
    """Draw held-out photographs, spread over the classes, with predicted and true label."""
    from matplotlib.figure import Figure
    index = torch.linspace(0, len(files) - 1, min(most, len(files))).round().int().tolist()
    columns = min(6, len(index))
    rows = math.ceil(len(index) / columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis in axes:
        axis.axis('off')
    for axis, i in zip(figure.axes, index, strict=False):
        predicted, true = int(logits[i].argmax()), files.labels[i]
        axis.imshow(read_rgb(files.paths[i]))
        share = 100 * logits[i].softmax(0)[predicted].item()
        axis.set_title(f'{files.classes[predicted]} {share:.0f} %' + (
            '' if predicted == true else f'\nis {files.classes[true]}'),
            parse_math=False, fontsize=9, color='green' if predicted == true else 'firebrick')
    atomic_write(path, lambda p: figure.savefig(p, dpi=80))
