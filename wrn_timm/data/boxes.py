"""Photographs with boxes in the format of Pascal VOC, checked before training; every bad box is reported."""
from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from .folders import read_rgb

__all__ = ['BoxedImages', 'read_voc']


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """Image files and the objects in them.

    Attributes:
        paths: Files.
        boxes: float32 (objects, 4) for each file, as xmin, ymin, xmax, ymax in pixels.
        labels: int64 (objects,) for each file: 1 + the index into `classes`; 0 is the background of a detector.
        classes: Names, sorted.
    """
    paths: tuple[str, ...]
    boxes: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def as_dataset(self, transform: Any) -> Dataset:
        """A data set of `transform(RGB image, target)`; the target's boxes know the image's size."""
        return _BoxDataset(self, transform)


class _BoxDataset(Dataset):
    def __init__(self, images: BoxedImages, transform: Any):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, dict[str, torch.Tensor]]:
        image = read_rgb(self.images.paths[i])
        boxes = tv_tensors.BoundingBoxes(self.images.boxes[i], format='XYXY', canvas_size=image.size[::-1])
        return self.transform(image, {'boxes': boxes, 'labels': self.images.labels[i]})


def read_voc(
        root: str | Path,
        split: str,
        classes: Sequence[str] | None = None,
        on_bad: str = 'skip',
) -> tuple[BoxedImages, tuple[str, ...]]:
    """Read the images that `root/ImageSets/Main/<split>.txt` lists, with the boxes of `root/Annotations`.

    Boxes must lie within the image itself; the size in the annotation is ignored. Objects marked as difficult count
    like any other.

    Args:
        root: Folder that holds `Annotations`, `ImageSets` and `JPEGImages`.
        split: 'train', 'val', 'trainval', 'test' or any other list.
        classes: Expected names, those of the training split; None takes the names that are found.
        on_bad: What to do with boxes that have no area or exceed their image, and with unreadable images and
            annotations: 'skip' leaves them out, 'fail' raises.

    Returns:
        The images, and the reason for everything that was left out.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: The list is empty, no box is left, a class is not in `classes`, or, with 'fail', something is bad.
            The message names it.
    """
    if on_bad not in ('skip', 'fail'):
        raise ValueError(f"on_bad is {on_bad!r}; choose 'skip' or 'fail'")
    root = Path(root)
    listed = root / 'ImageSets' / 'Main' / f'{split}.txt'
    if not listed.is_file():
        raise FileNotFoundError(f'no list of images at {listed}')
    # in the list of a single class, a flag follows the name
    names = [line.split()[0] for line in listed.read_text(
        encoding='utf-8', errors='surrogateescape').splitlines() if line.strip()]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda name: _read_one(root, name), names))
    bad = tuple(reason for *_, reasons in read for reason in reasons)
    if bad and on_bad == 'fail':
        raise ValueError(f'{len(bad)} boxes or files of {listed} are bad: ' + '; '.join(bad[:5]))
    good = [(path, objects) for path, objects, _ in read if path]
    found = sorted({label for _, objects in good for label, _ in objects})
    if not found:
        raise ValueError(f'{listed} lists {len(names)} images, none with a valid box' + (f': {bad[0]}' if bad else ''))
    classes = tuple(classes or found)
    if unknown := set(found) - set(classes):
        raise ValueError(f'{listed}: class {min(unknown)!r} is not one of {", ".join(classes)}')
    return BoxedImages(
        tuple(path for path, _ in good),
        tuple(torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4) for _, objects in good),
        tuple(torch.tensor([1 + classes.index(label) for label, _ in objects], dtype=torch.int64)
              for _, objects in good),
        classes), bad


def _read_one(root: Path, name: str) -> tuple[str | None, list[tuple[str, list[float]]], list[str]]:
    """The image's path (None if it cannot be used), its (class, box) pairs, and what is wrong with it."""
    path, annotation = root / 'JPEGImages' / f'{name}.jpg', root / 'Annotations' / f'{name}.xml'
    try:
        width, height = read_rgb(path).size
    except ValueError as e:
        return None, [], [str(e)]
    try:
        elements = ET.parse(annotation).getroot().findall('object')
    except FileNotFoundError:
        return None, [], [f'{annotation} does not exist']
    except (LookupError, ValueError, OSError, ET.ParseError) as e:  # LookupError: an encoding unknown to Python
        return None, [], [f'{annotation}: {e}']
    objects, bad = [], []
    for i, element in enumerate(elements, start=1):
        label = (element.findtext('name') or '').strip()
        try:
            box = [float(element.findtext(f'bndbox/{k}') or '') for k in ('xmin', 'ymin', 'xmax', 'ymax')]
        except ValueError:
            box = None
        what = f'{annotation}, object {i} ({label or "no name"})'
        if not label or box is None:
            bad.append(f'{what}: the name or a coordinate is missing')
        elif not (box[0] < box[2] and box[1] < box[3]):
            bad.append(f'{what}: box {_numbers(box)} has no area')
        elif min(box) < 0 or box[2] > width or box[3] > height:
            bad.append(f'{what}: box {_numbers(box)} exceeds the image of {width} x {height}')
        else:
            objects.append((label, box))
    return str(path), objects, bad


def _numbers(box: list[float]) -> str:
    return ', '.join(f'{v:g}' for v in box)
