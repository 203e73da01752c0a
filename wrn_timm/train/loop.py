"""Training from scratch: one recipe, one data set on the device, one run directory."""
from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from tqdm import tqdm

from ..data.datasets import ImageArrays, load
from ..data.device import DeviceLoader
from .recipes import Recipe
from .rundir import RunDir, export_weights

__all__ = ['evaluate', 'train']

_logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
        model: torch.nn.Module,
        data: ImageArrays,
        device: torch.device,
        batch_size: int = 500,
) -> dict[str, float]:
    """Mean loss and accuracy in % of a model on images as they are, normalised by the data set's statistics."""
    model.eval()
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (data.mean, data.std))
    loss = correct = torch.zeros((), device=device)
    for images, labels in zip(data.images.split(batch_size), data.labels.split(batch_size), strict=True):
        labels = labels.to(device)
        logits = model((images.to(device).float() / 255 - mean) / std).float()
        loss = loss + F.cross_entropy(logits, labels, reduction='sum')
        correct = correct + (logits.argmax(1) == labels).sum()
    return {'loss': loss.item() / len(data), 'accuracy': 100 * correct.item() / len(data)}


def train(
        recipe: Recipe,
        data_dir: str,
        out: str | Path,
        device: str = 'cpu',
        seed: int = 0,
        time_budget: float = math.inf,
        resume: bool = False,
        download: bool = False,
    ) -> Path | None:
    """Train a network and leave a weights folder in the run directory.

    Args:
        recipe: How.
        data_dir: Folder of the data set's official files.
        out: Run directory.
        device: 'cpu' or 'cuda'. On CUDA the network is compiled and computes in bfloat16.
        seed: Of the weights, the order and the augmentation.
        time_budget: Seconds after which the run stops at the end of an epoch, to be resumed.
        resume: Go on with the run in `out`.
        download: Fetch the data set if it is missing.

    Returns:
        The weights folder, or None if the time budget ended the run before its last epoch.

    Raises:
        FloatingPointError: The loss is no longer finite; the checkpoint of the epoch before stands.
        What `load` and `RunDir` raise.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    device = torch.device(device)
    cuda = device.type == 'cuda'
    data = load(recipe.dataset, data_dir, train=True, download=download)
    held_out = None
    if recipe.holdout:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        data, held_out = data.subset(order[recipe.holdout:]), data.subset(order[:recipe.holdout])

    settings = {'recipe': dataclasses.asdict(recipe), 'seed': seed, 'device': str(device)}
    run = RunDir(out, settings, resume)
    kwargs = {'conv_drop_rate': recipe.conv_drop_rate} if recipe.conv_drop_rate else {}
    model = timm.create_model(recipe.model, num_classes=len(data.classes), **kwargs)
    model = model.to(device, memory_format=torch.channels_last)
    ema = ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True) if recipe.ema_decay else None
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, nesterov=True, weight_decay=recipe.weight_decay,
        fused=True if cuda else None, foreach=None if cuda else True)
    loader = DeviceLoader(data, recipe.batch_size, device, recipe.pad, recipe.flip, recipe.cutout, seed)
    steps = len(loader)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=recipe.epochs * steps, t_in_epochs=False, warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.lr / 100)

    first_epoch, seconds, history = 0, 0., []
    if resume and (checkpoint := run.load_checkpoint(device)):
        model.load_state_dict(checkpoint['model'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        if ema:
            ema.module.load_state_dict(checkpoint['ema'])
        first_epoch, seconds, history = checkpoint['epoch'], checkpoint['seconds'], checkpoint['history']
        torch.set_rng_state(checkpoint['rng'].cpu())

    forward = torch.compile(model) if cuda else model
    measured = ema.module if ema else model
    for epoch in range(first_epoch, recipe.epochs):
        epoch_started = time.monotonic()
        model.train()
        total = correct = torch.zeros((), device=device)
        lr = optimizer.param_groups[0]['lr']
        batches = tqdm(loader.epoch(epoch), total=steps, desc=f'epoch {epoch + 1}/{recipe.epochs}', unit='img',
                       unit_scale=recipe.batch_size, leave=False, disable=None)
        for step, (images, labels) in enumerate(batches, start=epoch * steps):
            scheduler.step_update(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                logits = forward(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ema:
                ema.update(model, step)
            total = total + loss.detach()
            correct = correct + (logits.detach().argmax(1) == labels).sum()

        train_loss = total.item() / steps
        if not math.isfinite(train_loss):
            raise FloatingPointError(
                f'loss is {train_loss} in epoch {epoch + 1}; {run.checkpoint_file} holds the epoch before')
        row: dict[str, Any] = {
            'epoch': epoch + 1, 'lr': lr, 'train_loss': train_loss,
            'train_accuracy': 100 * correct.item() / (steps * recipe.batch_size)}
        if held_out:
            row |= {f'holdout_{k}': v for k, v in evaluate(measured, held_out, device).items()}
        epoch_seconds = time.monotonic() - epoch_started
        seconds += epoch_seconds
        row |= {'seconds': round(seconds, 1), 'images_per_second': round(steps * recipe.batch_size / epoch_seconds)}
        history.append(row)
        run.write_history(history)
        run.save_checkpoint({
            'epoch': epoch + 1, 'seconds': seconds, 'history': history, 'model': model.state_dict(),
            'optimizer': optimizer.state_dict(), 'ema': ema.module.state_dict() if ema else None,
            'rng': torch.get_rng_state()})
        _logger.info('  '.join(f'{k} {v:.4g}' for k, v in row.items()))
        if time.monotonic() - started > time_budget and epoch + 1 < recipe.epochs:
            _logger.info('time budget reached after epoch %d; go on with --resume', epoch + 1)
            return None

    folder = run.path / 'weights'
    export_weights(measured, folder, {
        'tag': recipe.dataset, 'mean': data.mean, 'std': data.std, 'label_names': data.classes})
    for name in ('recipe.json', 'history.csv', 'curves.png'):
        shutil.copy(run.path / name, folder / name)
    return folder
