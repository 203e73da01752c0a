"""Photographs with boxes: check every file before training, and split them into training and test images."""
from __future__ import annotations

import csv
import dataclasses
import io
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..files import digest
from ..names import counted, some
from .box_formats import ALL, FORMATS, Annotated, Box, corners, recognised
from .images import read_rgb

__all__ = ['BoxScan', 'BoxedImages', 'data_folder', 'divide', 'read_boxes', 'read_box_split', 'read_reduced',
           'write_box_split']

_ROUNDING = 0.5  # pixels by which a box may extend beyond its image; it is clipped
_LARGE = 2000  # pixels of the longer side; only larger photographs are reduced. Published results used smaller ones


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """Image files and their ground-truth boxes.

    Attributes:
        paths: Image files.
        boxes: Boxes of each file, float32 (objects, 4): xmin, ymin, xmax, ymax in pixels.
        labels: Labels of each file, int64 (objects,): 1 + the index into `classes`. 0 is the background.
        classes: Class names.
    """
    paths: tuple[str, ...]
    boxes: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Sequence[int]) -> BoxedImages:
        """Return the images at `index`, in that order."""
        paths, boxes, labels = (tuple(column[i] for i in index) for column in (self.paths, self.boxes, self.labels))
        return dataclasses.replace(self, paths=paths, boxes=boxes, labels=labels)

    def as_dataset(self, transform: Any, side: int) -> Dataset:
        """Return a data set of `transform(RGB image, target)`.

        Large photographs are reduced by `read_reduced`. A target has `labels`, `boxes` (a `tv_tensors.BoundingBoxes` in
        pixels of the reduced image) and `scale`, float32 (4,). The boxes times `scale` are in pixels of the original.

        Args:
            transform: Transform applied to each image when it is requested. It must not zoom in.
            side: Longer side of the detector's input in pixels.
        """
        return _BoxDataset(self, transform, side)


class _BoxDataset(Dataset):
    def __init__(self, images: BoxedImages, transform: Any, side: int):
        self.paths, self.transform, self.side = images.paths, transform, side
        # as arrays, because each tensor that is sent to a spawned worker takes a file descriptor
        self.boxes, self.labels = ([t.numpy() for t in column] for column in (images.boxes, images.labels))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, dict[str, torch.Tensor]]:
        image, scale = read_reduced(self.paths[i], self.side)
        scale, boxes, labels = torch.tensor(scale * 2), torch.tensor(self.boxes[i]), torch.tensor(self.labels[i])
        boxes = tv_tensors.BoundingBoxes(boxes / scale, format='XYXY', canvas_size=image.size[::-1])
        return self.transform(image, {'boxes': boxes, 'labels': labels, 'scale': scale})


def read_reduced(path: str | Path, side: int) -> tuple[Image.Image, tuple[float, float]]:
    """Read a photograph with `read_rgb`, and reduce it if it is much larger than a detector needs.

    A photograph with a side of more than 2000 pixels is reduced by an integer factor that leaves at least `side` pixels
    on the longer side. Others keep their size.

    Returns:
        The image, and the factors by which the original is wider and higher (1 if it is not reduced).

    Raises:
        ValueError: As for `read_rgb`.
    """
    size = _stored_size(path)
    if max(size) <= _LARGE:
        return read_rgb(path), (1., 1.)
    image = read_rgb(path, side)
    if (by := max(image.size) // side) > 1:
        image = image.reduce(by)
    if (image.width < image.height) != (size[0] < size[1]):  # rotated by its EXIF data
        size = size[::-1]
    return image, (size[0] / image.width, size[1] / image.height)


def _stored_size(path: str | Path) -> tuple[int, int]:
    """Width and height before EXIF rotation; (0, 0) if the file cannot be opened."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # `read_rgb` reports what is wrong
        return 0, 0


@dataclasses.dataclass(frozen=True)
class BoxScan:
    """Contents of a data set, without bad files and boxes.

    Attributes:
        format: 'Pascal VOC', 'COCO' or 'YOLO'.
        parts: Images by part: 'train', 'val', 'test' or the name of a VOC list; 'all' if the data is not split.
        bad: Reasons why boxes and files were left out.
        sizes: Number of images by width and height.
        twins: Groups of files with the same content.
        notes: What else was left out, and what is missing.
    """
    format: str
    parts: dict[str, BoxedImages]
    bad: tuple[str, ...]
    sizes: Counter[tuple[int, int]]
    twins: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def summary(self) -> list[str]:
        """Describe the data set, one fact per line."""
        images = {path: labels for part in self.parts.values() for path, labels in zip(
            part.paths, part.labels, strict=True)}
        classes = next(iter(self.parts.values())).classes
        count = Counter(classes[i - 1] for labels in images.values() for i in labels.tolist())
        empty = sum(not len(labels) for labels in images.values())
        parts = ', '.join(f'{len(part)} {name}' for name, part in self.parts.items())
        widths, heights = zip(*self.sizes, strict=True)
        lines = [f'{self.format}: {len(images)} photographs ({parts}), {min(widths)} to {max(widths)} pixels wide, '
                 f'{min(heights)} to {max(heights)} high',
                 f'{sum(count.values())} boxes: ' + ', '.join(f'{name} {n}' for name, n in count.most_common())]
        if empty:
            lines.append(f"{counted(empty, 'photograph')} without a box, kept as background")
        return [*lines, *self.notes, *(f'left out: {reason}' for reason in self.bad)]


def read_boxes(source: str | Path, on_bad: str = 'skip') -> BoxScan:
    """Read a data set with boxes in any known format, and check every file.

    - Pascal VOC: XML files in `Annotations` (or `annotations`, or beside the images), images in `JPEGImages` (or
      `images`), and optionally lists in `ImageSets/Main`. Annotations in a subfolder belong to images in the subfolder
      of the same name. Images without an XML file are left out.
    - COCO: a JSON file beside its images (`coco:FILE.json`), or Roboflow's `train/_annotations.coco.json`.
    - YOLO: `data.yaml`, which names folders or lists of images, or `images/` and `labels/`, or Darknet's `obj.names`
      and `obj_train_data/`. Images without a label file are background. Outlines are converted to boxes; keypoints are
      ignored if `data.yaml` has a `kpt_shape`.

    A prefix (`voc:DIR`, `coco:FILE`, `yolo:DIR`) selects the format if several match.

    Boxes are taken as written and must lie within the image. VOC objects marked difficult are treated like all others.
    COCO's crowd regions are left out: they are not trained on, and detections in them count as false positives.

    Args:
        source: Folder or file.
        on_bad: What to do with a box that has no area or is not within its image, and with an image or annotation that
            cannot be read: 'skip' leaves it out, 'fail' raises.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: The format is not recognised, an annotation file is invalid, no box is left, or, with 'fail', boxes
            or files are bad. The message names them.
    """
    if on_bad not in ('skip', 'fail'):
        raise ValueError(f"on_bad is {on_bad!r}; choose 'skip' or 'fail'")
    kind, root = _parsed(source)
    if not root.exists():
        raise FileNotFoundError(f'{root} does not exist')
    title, (parts, declared, notes) = recognised(root, kind)
    examined = _examine([image for part in parts.values() for image in part])
    bad = tuple(dict.fromkeys(reason for found in examined.values() for reason in found.bad))
    if bad and on_bad == 'fail':
        raise ValueError(f'{len(bad)} boxes or files of {root} are bad: {some(bad, "; ")}')
    good = {path: found for path, found in examined.items() if found.size}
    named = {label for found in good.values() for label, _ in found.objects}
    if not named:
        why = '; '.join([*bad[:1], *notes])
        raise ValueError(f'{root} has {len(examined)} images, none with a usable box' + (f': {why}' if why else ''))
    classes = tuple(name for name in declared if name in named) if declared else tuple(sorted(named))
    content = defaultdict(list)
    for path, found in good.items():
        content[found.digest].append(str(path))
    return BoxScan(
        title, {name: _images([(a.image, good[a.image].objects) for a in part if a.image in good], classes)
                for name, part in parts.items()},
        bad, Counter(found.size for found in good.values()),
        tuple(tuple(paths) for paths in content.values() if len(paths) > 1), tuple(notes))


def _parsed(source: str | Path) -> tuple[str, Path]:
    """Split a source into its format ('' if it names none) and its path."""
    kind, _, rest = str(source).partition(':')
    return (kind, Path(rest)) if kind in FORMATS else ('', Path(source))


def data_folder(source: str | Path) -> Path:
    """Return the folder of a source of `read_boxes`."""
    _, root = _parsed(source)
    folder = root.parent if root.is_file() else root
    return folder.parent if folder.name == 'annotations' and root.is_file() else folder  # its parent has the images


def _images(found: Sequence[tuple[Path, list[tuple[str, Box]]]], classes: tuple[str, ...]) -> BoxedImages:
    number = {name: i for i, name in enumerate(classes, start=1)}
    return BoxedImages(
        tuple(str(path) for path, _ in found),
        tuple(torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4) for _, objects in found),
        tuple(torch.tensor([number[label] for label, _ in objects], dtype=torch.int64) for _, objects in found),
        classes)


@dataclasses.dataclass(frozen=True)
class _Found:
    size: tuple[int, int] | None  # None if the image is left out
    digest: str = ''
    objects: list[tuple[str, Box]] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)


def _examine(images: Iterable[Annotated]) -> dict[Path, _Found]:
    unique: dict[Path, Annotated] = {}
    for image in images:
        first = unique.setdefault(image.image, image)
        if _boxes_of(first) != _boxes_of(image):
            unique[image.image] = dataclasses.replace(first, fault=(
                f'{image.image} has other boxes in {image.file} than in {first.file}; keep one of them'))
    with ThreadPoolExecutor() as pool:
        return dict(zip(unique, pool.map(_examined, unique.values()), strict=True))


def _boxes_of(annotated: Annotated) -> list[str]:
    return sorted(f'{label} {box}' for _, label, box in annotated.objects)


def _examined(annotated: Annotated) -> _Found:
    """Check an image: it must be readable and of the annotated size. Keep the boxes that lie within it."""
    if annotated.fault:
        return _Found(None, bad=[annotated.fault])
    try:
        size = read_rgb(annotated.image).size
    except ValueError as e:
        return _Found(None, bad=[str(e)])
    if annotated.size and annotated.size != size:
        rotated = ' (rotated by its EXIF data)' * (annotated.size == size[::-1])
        return _Found(None, bad=[f'{annotated.image} is {size[0]} x {size[1]} pixels{rotated}, but its annotation says '
                                 f'{annotated.size[0]} x {annotated.size[1]}: the boxes belong to another image'])
    objects, bad = [], []
    for what, label, box in annotated.objects:
        if fault := _fault(label, box, size, annotated.fractions):
            bad.append(f'{what}: {fault}')
        else:
            box = tuple(v * side for v, side in zip(corners(box), (*size, *size), strict=True)
                        ) if annotated.fractions else box
            box = np.float32([min(max(v, 0.), side) for v, side in zip(box, (*size, *size), strict=True)]).tolist()
            if box[0] < box[2] and box[1] < box[3]:
                objects.append((label, tuple(box)))
            else:
                bad.append(f'{what}: the box has no area')
    return _Found(size, digest(annotated.image), objects, bad)


def _fault(label: str, box: Box | None, size: tuple[int, int], fractions: bool) -> str:
    """Describe what is wrong with a box; '' if nothing is."""
    if not label or box is None:
        return ('expected 4 numbers after the class, or the points of an outline' if fractions else
                'the name or a coordinate is missing')
    written = ', '.join(f'{v:g}' for v in box)
    if fractions:
        if not (box[2] > 0 and box[3] > 0):
            return f'box {written} has no area'
        if not (all(0 <= v <= 1 for v in box[:2]) and all(
                -_ROUNDING / side <= v <= 1 + _ROUNDING / side
                for v, side in zip(corners(box), (*size, *size), strict=True))):
            return f'box {written} is not within the image; YOLO has centre, width and height as fractions of its sides'
        return ''
    if not (box[0] < box[2] and box[1] < box[3]):
        return f'box {written} has no area'
    if max(box) <= 1 < min(size):
        return f'box {written} seems to be in fractions of the image; it must be in pixels'
    if min(box) < -_ROUNDING or box[2] > size[0] + _ROUNDING or box[3] > size[1] + _ROUNDING or not (
            box[0] < size[0] and box[1] < size[1] and box[2] > 0 and box[3] > 0):
        return f'box {written} is not within the image of {size[0]} x {size[1]}'
    return ''


def divide(
        scan: BoxScan,
        train: str = '',
        test: str = '',
        seed: int = 0,
) -> tuple[BoxedImages, BoxedImages, str]:
    """Split a data set into training and test images.

    If the data has several parts, 'test' (or 'val') is for testing, and 'trainval' or the remaining 'train' and 'val'
    are for training. An image listed in both is used only for testing. If there is only one part, a fifth of its images
    is drawn for testing by `seed`, stratified by class, and copies of an image stay on the same side.

    Args:
        scan: Scan from `read_boxes`.
        train: Name of the training part; '' chooses it automatically.
        test: Name of the test part; '' chooses it automatically.
        seed: Seed of the split, if the data has none.

    Returns:
        The training images, the test images, and a description of the split.

    Raises:
        FileNotFoundError: There is no such part.
        ValueError: The parts cannot be chosen automatically, a part has no images, or a class occurs only in the test
            images.
    """
    parts = scan.parts
    for name in filter(None, (train, test)):
        if name not in parts:
            raise FileNotFoundError(f'the data has no part {name}; its parts are {", ".join(parts)}')
    if len(parts) == 1 and not (train and test):
        only, = parts.values()
        chosen, how = tuple(map(only.subset, _drawn(only, seed, scan.twins))), f'80-20 by seed {seed}'
    else:
        test = test or next((name for name in ('test', 'val') if name in parts and name != train), '')
        trained_on = [train] if train else [name for name in _to_train_on(parts) if name != test]
        if not (trained_on and test):
            raise ValueError(f'the parts are {", ".join(parts)}; name the ones to train on and to test on')
        tested = set(parts[test].paths)
        joined = _joined([parts[name] for name in trained_on])
        if joined.paths and tested.issuperset(joined.paths):
            raise ValueError(f'all images of {" and ".join(trained_on)} are also in {test}, so none is left to train '
                             f'on; to hold out a random fifth, leave {test} out of the data')
        joined = joined.subset([i for i, path in enumerate(joined.paths) if path not in tested])
        chosen, how = (joined, parts[test]), f'given: {" and ".join(trained_on)}; tested on {test}'
    for name, part in zip(('train', 'test'), chosen, strict=True):
        if not len(part):
            raise ValueError(f'no image is left to {name} on')
    seen = {i for labels in chosen[0].labels for i in labels.tolist()}
    unseen = {i for labels in chosen[1].labels for i in labels.tolist()} - seen
    if unseen:
        raise ValueError(
            f'class {chosen[0].classes[min(unseen) - 1]!r} occurs in test images but in no training image')
    return *chosen, how


def _to_train_on(parts: dict[str, BoxedImages]) -> list[str]:
    if 'trainval' in parts and 'test' in parts:
        return ['trainval']
    return [name for name in ('train', 'val', ALL) if name in parts]


def _joined(parts: Sequence[BoxedImages]) -> BoxedImages:
    paths, boxes, labels = (tuple(v for part in parts for v in getattr(part, name)) for name in (
        'paths', 'boxes', 'labels'))
    return dataclasses.replace(parts[0], paths=paths, boxes=boxes, labels=labels)


def _drawn(
        images: BoxedImages,
        seed: int,
        twins: Iterable[Sequence[str]],
) -> tuple[list[int], list[int]]:
    """Draw the training and test indices, stratified by each image's rarest class. Copies stay on the same side."""
    place = {path: i for i, path in enumerate(images.paths)}
    copies = {same[0]: same for same in (sorted(place[p] for p in group if p in place) for group in twins) if same}
    drawn_with_another = {i for first, same in copies.items() for i in same if i != first}
    count = Counter(i for labels in images.labels for i in set(labels.tolist()))
    groups: dict[int, list[int]] = defaultdict(list)
    for i, labels in enumerate(images.labels):
        if i not in drawn_with_another:
            groups[min(labels.tolist(), key=lambda label: (count[label], label), default=0)].append(i)
    test: list[int] = []
    for _, members in sorted(groups.items()):
        random.Random(seed).shuffle(members)
        test += members[:round(len(members) / 5)]
    if not test and len(images) > 1:
        test = max(groups.values(), key=len)[:1]
    chosen = {i for first in test for i in copies.get(first, [first])}
    return [i for i in range(len(images)) if i not in chosen], sorted(chosen)


def write_box_split(train: BoxedImages, test: BoxedImages, root: Path) -> str:
    """Return a split as CSV text: part of each image, and its path relative to `root`."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['part', 'path'])
    for part, images in (('train', train), ('test', test)):
        writer.writerows((part, _from(root, path)) for path in images.paths)
    return text.getvalue()


def _from(root: Path, path: str) -> str:
    return os.path.relpath(os.path.abspath(path), os.path.abspath(root))


def read_box_split(file: Path, scan: BoxScan, root: Path) -> tuple[BoxedImages, BoxedImages]:
    """Read a split written by `write_box_split`, with the boxes of the scan.

    Raises:
        ValueError: The file is damaged, or one of its images is no longer in the scan.
    """
    whole = _joined(list(scan.parts.values()))
    place = {_from(root, path): i for i, path in enumerate(whole.paths)}
    chosen: dict[str, list[int]] = {'train': [], 'test': []}
    with open(file, encoding='utf-8', errors='surrogateescape', newline='') as f:
        for row in csv.DictReader(f):
            if row.get('part') not in chosen or row.get('path') not in place:
                raise ValueError(f'{file}, {row.get("part")} {row.get("path")}: there is no such image any more')
            chosen[row['part']].append(place[row['path']])
    return whole.subset(chosen['train']), whole.subset(chosen['test'])
