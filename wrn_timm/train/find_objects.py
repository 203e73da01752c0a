"""Find objects in photographs with a trained detector, convert them to COCO's format, and draw them."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.font_manager import findfont
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from ..data.boxes import read_reduced
from ..data.images import read_rgb
from ..detection import open_detector, postprocessor
from ..files import atomic_write
from .machine import Machine
from .predict import find_images

__all__ = ['AS_TENSOR', 'FoundObject', 'ImageObjects', 'coco_image_id', 'coco_results', 'draw_objects', 'find_in_files',
           'find_objects']

AS_TENSOR = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
_DRAWN_BY = 'wrn-timm detect'  # mark in the PNG file
_COLOURS = ('red', 'blue', 'green', 'purple', 'orange', 'teal', 'brown', 'magenta')


@dataclasses.dataclass(frozen=True)
class FoundObject:
    """An object in a photograph.

    Attributes:
        label: Class name.
        score: Score, 0 to 1.
        box: xmin, ymin, xmax, ymax in pixels of the photograph, after EXIF rotation.
    """
    label: str
    score: float
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class ImageObjects:
    """The objects in one photograph.

    Attributes:
        image: Path of the file.
        objects: Objects by descending score; empty if there are none or the file could not be read.
        error: Why the file could not be read; '' if it could.
    """
    image: str
    objects: tuple[FoundObject, ...] = ()
    error: str = ''

    def as_json(self) -> dict[str, Any]:
        """Return the dict that `wrn-timm detect --json` prints."""
        if self.error:
            return {'image': self.image, 'error': self.error}
        return {'image': self.image, 'objects': [
            {'label': o.label, 'score': o.score, 'box': list(o.box)} for o in self.objects]}


def find_objects(
        model: str | os.PathLike[str],
        images: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        threshold: float | None = None,
        device: str | None = None,
) -> list[ImageObjects]:
    """Find objects in photographs with a trained detector.

        for photo in wrn_timm.find_objects('RUN', ['photo.jpg', 'FOLDER']):
            print(photo.image, [(o.label, o.score, o.box) for o in photo.objects])

    Args:
        model: Run directory of `wrn-timm detect`, its weights folder, or `hf-hub:ACCOUNT/NAME`.
        images: One or more files and folders; folders are searched for images recursively.
        threshold: Lowest score of an object, 0 to 1; None for the detector's own, which has the highest F1 on the
            test photographs of its run.
        device: Device of the detector; None for a GPU if there is one.

    Returns:
        One `ImageObjects` per file, in the order of `images`. The `error` of a file that cannot be read says why.

    Raises:
        Any error of `find_images` and `open_detector`.
    """
    names = [images] if isinstance(images, (str, os.PathLike)) else images
    detector = open_detector(os.fspath(model), device or Machine.device)
    return list(find_in_files(detector, find_images(map(os.fspath, names)), threshold))


@contextlib.contextmanager
def _finding_from(detector: nn.Module, score: float) -> Iterator[None]:
    """Temporarily lower the score threshold of a detector to `score`, if it is higher."""
    own = postprocessor(detector)
    before = own.score_thresh
    own.score_thresh = min(before, score)
    try:
        yield
    finally:
        own.score_thresh = before


@torch.inference_mode()
def find_in_files(
        detector: nn.Module,
        paths: Iterable[str],
        threshold: float | None = None,
) -> Iterator[ImageObjects]:
    """Yield the objects in each file, in order, with one photograph in memory at a time.

    Args:
        detector: Detector from `open_detector`.
        paths: Image files.
        threshold: Lowest score of an object, 0 to 1; None for the detector's own.
    """
    threshold = detector.threshold if threshold is None else threshold
    device = next(detector.parameters()).device
    for path in paths:
        try:
            image, scale = read_reduced(path, detector.transform.max_size)
        except ValueError as e:
            yield ImageObjects(path, error=str(e))
            continue
        image = AS_TENSOR(image).as_subclass(torch.Tensor)
        with _finding_from(detector, threshold):
            found = {k: v.cpu() for k, v in detector([image.to(device)])[0].items()}
        boxes = found['boxes'] * torch.tensor(scale * 2)
        keep = found['scores'] >= threshold
        rows = zip(found['labels'][keep].tolist(), found['scores'][keep].tolist(), boxes[keep].tolist(), strict=True)
        yield ImageObjects(path, tuple(
            FoundObject(detector.classes[i - 1], round(score, 4), tuple(round(v, 1) for v in box))
            for i, score, box in rows))


def coco_image_id(path: str) -> int | str:
    """Return the name of a file without suffix, as an integer if it is a number (as in COCO)."""
    stem = Path(path).stem
    return int(stem) if stem.isdecimal() else stem


def coco_results(found: ImageObjects, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Convert the objects of a photograph to COCO's results format, where `bbox` is corner, width and height.

    `image_id` is that of `coco_image_id`. `category_id` is the position in `classes`, counted from 1.
    """
    number = {name: i for i, name in enumerate(classes, start=1)}
    return [{'image_id': coco_image_id(found.image), 'category_id': number[o.label],
             'bbox': [o.box[0], o.box[1], round(o.box[2] - o.box[0], 1), round(o.box[3] - o.box[1], 1)],
             'score': o.score} for o in found.objects]


def draw_objects(found: ImageObjects, classes: Sequence[str], folder: Path, taken: set[str]) -> Path:
    """Write a photograph with its objects drawn on it to `folder` as a PNG file.

    Drawings of earlier runs are replaced, other files are not.

    Args:
        found: Objects in a readable file.
        classes: Class names, which determine the colours.
        folder: Output folder; created if missing.
        taken: Names (without suffix) already used in this run; the new one is added.

    Returns:
        The file written. It is named after the photograph, with a number if that name is taken or belongs to a file
        that is not a drawing.

    Raises:
        ValueError: `folder` holds the photograph itself.
    """
    if folder.resolve() == Path(found.image).resolve().parent:
        raise ValueError(f'{folder} is the folder of {found.image}; choose another for the drawings, so that they '
                         f'are not mixed with photographs')
    image = pil_to_tensor(read_rgb(found.image))
    if found.objects:
        width = max(2, round(max(image.shape[1:]) / 400))
        image = draw_bounding_boxes(
            image, torch.tensor([o.box for o in found.objects]),
            [f'{o.label} {100 * o.score:.0f}' for o in found.objects],
            [_COLOURS[list(classes).index(o.label) % len(_COLOURS)] for o in found.objects], width=width,
            font=findfont('DejaVu Sans'), font_size=6 * width)
    stem = Path(found.image).stem
    names = itertools.chain([stem], (f'{stem}_{i}' for i in itertools.count(2)))
    name = next(n for n in names if n not in taken and _is_free(folder / f'{n}.png'))
    taken.add(name)
    folder.mkdir(parents=True, exist_ok=True)
    target, mark = folder / f'{name}.png', PngInfo()
    mark.add_text('Software', _DRAWN_BY)
    atomic_write(target, lambda p: to_pil_image(image).save(p, pnginfo=mark))
    return target


def _is_free(file: Path) -> bool:
    """Whether a drawing can be written to a file: it does not exist, or `draw_objects` wrote it."""
    if not os.path.lexists(file):
        return True
    try:
        with Image.open(file) as image:
            return image.info.get('Software') == _DRAWN_BY
    except Exception:  # decoders raise almost anything for damaged files
        return False
