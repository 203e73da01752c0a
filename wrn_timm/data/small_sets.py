"""Small named data sets, read through torchvision as arrays for training or as a torch data set for validation."""
from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets as tv
from torchvision.transforms.v2 import functional as F

from ..wrn import CIFAR10_LABELS, CIFAR100_LABELS, TAGS

__all__ = ['NAMES', 'ImageArrays', 'load', 'normalise', 'parse_spec']

NAMES = ('cifar10', 'cifar100', 'svhn', 'synthetic')
_SVHN_STATS = ((0., 0., 0.), (1., 1., 1.))  # the paper only scales to 0..1 (section 3)


@dataclasses.dataclass(frozen=True)
class ImageArrays:
    """A split of a data set of small images, in memory.

    Attributes:
        images: Images, uint8 (N, 3, H, W).
        labels: Labels, int64 (N,).
        classes: Class names, in the order of the labels.
        mean: Channel means of the training split, for images scaled to 0..1.
        std: Channel standard deviations, likewise.
    """
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: torch.Tensor) -> ImageArrays:
        """Return the images at `index`, in that order."""
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def as_dataset(self, transform: Any) -> Dataset:
        """Return a data set of (transform(PIL image), label)."""
        return _ArrayDataset(self, transform)


class _ArrayDataset(Dataset):
    def __init__(self, arrays: ImageArrays, transform: Any):
        self.arrays, self.transform = arrays, transform

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = Image.fromarray(self.arrays.images[i].permute(1, 2, 0).numpy())
        return self.transform(image), int(self.arrays.labels[i])


def parse_spec(spec: str) -> tuple[str, str]:
    """Split `NAME:DIR` into name and folder.

    Raises:
        ValueError: The name is unknown, or no folder is given.
    """
    name, _, root = spec.partition(':')
    if name not in NAMES or not (root or name == 'synthetic'):
        raise ValueError(f"data {spec!r} is not NAME:DIR; NAME is one of {', '.join(NAMES)}")
    return name, root


def load(name: str, root: str | Path, train: bool, download: bool = False) -> ImageArrays:
    """Read a split of a named data set.

    Args:
        name: 'cifar10', 'cifar100', 'svhn' or 'synthetic' (random images for tests; `root` is ignored).
        root: Folder of the official files; missing files are downloaded to it.
        train: Read the training split instead of the test split.
        download: Download missing files with torchvision.

    Raises:
        ValueError: The name is unknown.
        FileNotFoundError: Files are missing or are not the official ones, and `download` is off.
    """
    if name == 'synthetic':
        return _synthetic(train)
    if name not in NAMES:
        raise ValueError(f"data set {name!r} is unknown; choose one of {', '.join(NAMES)}")
    try:
        if name == 'svhn':
            splits = [tv.SVHN(root, split=s, download=download) for s in (('train', 'extra') if train else ('test',))]
            images, labels = (np.concatenate([getattr(s, k) for s in splits]) for k in ('data', 'labels'))
            classes = tuple('0123456789')
            mean, std = _SVHN_STATS
        else:
            cls = tv.CIFAR10 if name == 'cifar10' else tv.CIFAR100
            data = cls(root, train=train, download=download)
            images, labels = data.data.transpose(0, 3, 1, 2), data.targets
            classes = CIFAR10_LABELS if name == 'cifar10' else CIFAR100_LABELS
            mean, std = TAGS[name]['mean'], TAGS[name]['std']
    except RuntimeError as e:
        raise FileNotFoundError(
            f'{name}: the official files under {Path(root).resolve()} are incomplete ({e}); '
            f'give the folder that holds them, or add --download') from e
    return ImageArrays(
        torch.from_numpy(np.ascontiguousarray(images)), torch.as_tensor(labels, dtype=torch.int64), classes, mean, std)


def _synthetic(train: bool) -> ImageArrays:
    """Generate ten classes of noisy colours, which a network learns in one epoch."""
    g = torch.Generator().manual_seed(0 if train else 1)
    n = 512 if train else 256
    labels = torch.arange(n) % 10
    hue = torch.stack([labels * 25, 225 - labels * 25, (labels * 75) % 250], 1)[:, :, None, None]
    noise = torch.randint(-25, 26, (n, 3, 32, 32), generator=g)
    images = (hue + noise).clamp(0, 255).to(torch.uint8)
    return ImageArrays(images, labels, CIFAR10_LABELS, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def normalise(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """Convert uint8 images (..., 3, H, W) to float32, scale them to 0..1, and normalise them by `mean` and `std`."""
    return F.normalize(F.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
