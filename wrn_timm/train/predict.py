"""Predictions for image files, read a batch at a time."""
from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..data.folders import walk_files
from ..data.images import looks_like_image, read_rgb
from ..recipes import Precision
from ..weights import eval_transform, open_model
from .machine import Machine, autocast, resolve_precision

__all__ = ['Prediction', 'find_images', 'predict', 'predict_files']


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one file.

    Attributes:
        image: Path of the file.
        top: Labels and their probabilities (0 to 1), the likeliest first; empty if the file could not be read.
        error: Why the file could not be read; '' if it could.
    """
    image: str
    top: tuple[tuple[str, float], ...] = ()
    error: str = ''

    @property
    def label(self) -> str | None:
        """The likeliest label; None if the file could not be read."""
        return self.top[0][0] if self.top else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`, 0 to 1; None if the file could not be read."""
        return self.top[0][1] if self.top else None


def predict(
        model: str | os.PathLike[str],
        images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        top_k: int = 5,
        device: str | None = None,
        **kwargs: Any,
) -> list[Prediction]:
    """Predict the classes of image files.

        for photo in wrn_timm.predict('RUN', ['photo.jpg', 'FOLDER']):
            print(photo.image, photo.label, photo.probability)

    Args:
        model: timm name, weights folder or run directory.
        images: One or more files and folders; folders are searched for images recursively.
        top_k: Number of labels per file.
        device: Where the model runs; None for a GPU if there is one.
        kwargs: Other arguments of `predict_files`.

    Returns:
        One prediction per file, in the order of `images`. The `error` of a file that cannot be read says why.

    Raises:
        ValueError: `top_k` is below 1.
        Any error of `find_images` and `predict_files`.
    """
    if top_k < 1:
        raise ValueError(f'top_k is {top_k}; it must be at least 1')
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    device = device or Machine.device
    found = predict_files(os.fspath(model), find_images(map(os.fspath, names)), device=device, top_k=top_k, **kwargs)
    return [Prediction(row['image'], tuple((one['label'], one['probability']) for one in row.get('top', ())),
                       row.get('error', '')) for row in found]


def find_images(names: Iterable[str]) -> Iterator[str]:
    """The named files, and the images in the named folders, searched recursively; hidden ones in folders are skipped.

    Raises:
        ValueError: A folder holds no images.
    """
    for name in names:
        if os.path.isdir(name):
            paths = filter(looks_like_image, walk_files(name))
            first = next(paths, None)
            if first is None:
                raise ValueError(f'{name} holds no images')
            yield from itertools.chain([first], paths)
        else:
            yield name


def predict_files(
        name: str,
        paths: Iterable[str],
        device: str = 'cpu',
        batch_size: int = 32,
        top_k: int = 5,
        precision: Precision = 'auto',
) -> Iterator[dict[str, Any]]:
    """Predict the likeliest classes of each file, in order, reading one batch of files at a time.

    Args:
        name: timm name or weights folder.
        paths: Image files.
        device: Where the model runs.
        batch_size: Images per batch.
        top_k: Number of classes per file.
        precision: 'bf16', 'fp16', 'no' (float32), or 'auto' as in `resolve_precision`.

    Yields:
        A dictionary per file, with `image` (the path) and `top` (a list of `label` and `probability`) or `error`.

    Raises:
        FloatingPointError: The probabilities are not finite.
        ValueError: `batch_size` is below 1, or the model has no classifier.
        Any error of `open_model`.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}; it must be at least 1')
    precision = resolve_precision(precision, device)
    model = open_model(name).to(device, memory_format=torch.channels_last)
    if not model.num_classes:
        raise ValueError(f'{name} has no classifier')
    labels = _labels(model)
    transform = eval_transform(model)

    def read(path: str) -> torch.Tensor | str:
        try:
            return transform(read_rgb(path))
        except ValueError as e:
            return str(e)

    paths = iter(paths)
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(paths, batch_size)):
            read_in = list(pool.map(read, batch))
            images = [image for image in read_in if not isinstance(image, str)]
            with autocast(device, precision):
                answers = iter(_answers(model, torch.stack(images).to(device), labels, top_k) if images else ())
            for path, image in zip(batch, read_in, strict=True):
                yield {'image': path, **({'error': image} if isinstance(image, str) else {'top': next(answers)})}


def _labels(model: torch.nn.Module) -> Sequence[str]:
    """Class names of a model: its own, those of ImageNet for weights trained on it, or else numbers."""
    cfg = model.pretrained_cfg
    if names := cfg.get('label_names'):
        return names
    if re.search(r'in\d+k', cfg.get('tag') or '') and (subset := infer_imagenet_subset(model)):
        return ImageNetInfo(subset).label_descriptions()
    return [str(i) for i in range(model.num_classes)]


@torch.inference_mode()
def _answers(
        model: torch.nn.Module, images: torch.Tensor, labels: Sequence[str], top_k: int) -> list[list[dict[str, Any]]]:
    probabilities = model(images.contiguous(memory_format=torch.channels_last)).float().softmax(1)
    if not probabilities.isfinite().all():
        raise FloatingPointError('the network gives probabilities that are not finite: its weights are damaged, or '
                                 'their training diverged')
    top = probabilities.topk(min(top_k, probabilities.shape[1]))
    return [[{'label': labels[i], 'probability': round(p, 6)} for p, i in zip(ps, indices, strict=True)]
            for ps, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True)]
