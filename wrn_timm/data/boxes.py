"""Photographs with boxes, as people have them: Pascal VOC, COCO and YOLO, scanned before training."""
from __future__ import annotations

import csv
import dataclasses
import io
import json
import random
import re
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..files import digest
from .folders import looks_like_image, read_rgb, some

__all__ = ['BoxScan', 'BoxedImages', 'data_folder', 'divide', 'read_boxes', 'read_box_split', 'read_reduced',
           'write_box_split']

_FORMATS = ('voc', 'coco', 'yolo', 'bccd')  # 'bccd' is VOC by the name of a data set
_IMAGES = ('JPEGImages', 'images', 'Images', 'imgs', '')
_ANNOTATIONS = ('Annotations', 'annotations', 'xmls', 'labels', '')
_PARTS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test', 'trainval': 'trainval'}
_ALL = 'all'
_ROUNDING = 0.5  # pixels by which a box may overhang its image, at which it is cut
_LARGE = 2000  # pixels of a side; only larger photographs are reduced: the published figures are of smaller ones
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class BoxedImages:
    """Image files and the objects on them.

    Attributes:
        paths: Files.
        boxes: Per file float32 (objects, 4): xmin, ymin, xmax, ymax in pixels.
        labels: Per file int64 (objects,): 1 + the index into `classes`, 0 being a detector's background.
        classes: Names.
    """
    paths: tuple[str, ...]
    boxes: tuple[torch.Tensor, ...]
    labels: tuple[torch.Tensor, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Sequence[int]) -> BoxedImages:
        """The images of `index`, in its order."""
        paths, boxes, labels = (tuple(column[i] for i in index) for column in (self.paths, self.boxes, self.labels))
        return dataclasses.replace(self, paths=paths, boxes=boxes, labels=labels)

    def as_dataset(self, transform: Any, side: int) -> Dataset:
        """A data set of `transform(RGB image, target)`.

        Large photographs are reduced by `read_reduced`. A target has `labels`; `boxes`, in pixels of the image, which
        know its size; and `scale`, float32 (4,), which times the boxes gives pixels of the whole photograph.

        Args:
            transform: Applied to each image when it is requested. It must not zoom in.
            side: Longer side at which the detector works.
        """
        return _BoxDataset(self, transform, side)


class _BoxDataset(Dataset):
    def __init__(self, images: BoxedImages, transform: Any, side: int):
        self.images, self.transform, self.side = images, transform, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, dict[str, torch.Tensor]]:
        image, scale = read_reduced(self.images.paths[i], self.side)
        scale = torch.tensor(scale * 2)
        boxes = tv_tensors.BoundingBoxes(self.images.boxes[i] / scale, format='XYXY', canvas_size=image.size[::-1])
        return self.transform(image, {'boxes': boxes, 'labels': self.images.labels[i], 'scale': scale})


def read_reduced(path: str | Path, side: int) -> tuple[Image.Image, tuple[float, float]]:
    """Read a photograph by `read_rgb`, and reduce it if it is much larger than a detector needs.

    A photograph with a side of more than 2000 pixels is reduced by a whole number, so that its longer side keeps
    `side` pixels or more. Others are returned as they are.

    Returns:
        The image, and by how much the whole photograph is wider and higher: 1 where it is not reduced.

    Raises:
        ValueError: As for `read_rgb`.
    """
    size = _stored_size(path)
    if max(size) <= _LARGE:
        return read_rgb(path), (1., 1.)
    image = read_rgb(path, side)
    if (by := max(image.size) // side) > 1:
        image = image.reduce(by)
    if (image.width < image.height) != (size[0] < size[1]):  # its EXIF data rotate it
        size = size[::-1]
    return image, (size[0] / image.width, size[1] / image.height)


def _stored_size(path: str | Path) -> tuple[int, int]:
    """Width and height before any rotation; (0, 0) of a file that `read_rgb` refuses."""
    try:
        with Image.open(path) as image:
            return image.size
    except Exception:  # as in `read_rgb`, which says what is wrong
        return 0, 0


@dataclasses.dataclass(frozen=True)
class BoxScan:
    """What a data set holds, bad things left out.

    Attributes:
        format: 'Pascal VOC', 'COCO' or 'YOLO'.
        parts: Images by the part they are given in ('train', 'val', 'test', or the name of a VOC list), or as 'all'.
        bad: Why boxes and files were left out.
        sizes: Width and height of the images, counted.
        twins: Files with the same content.
    """
    format: str
    parts: dict[str, BoxedImages]
    bad: tuple[str, ...]
    sizes: Counter[tuple[int, int]]
    twins: tuple[tuple[str, ...], ...]

    def summary(self) -> list[str]:
        """What was found, in lines."""
        images = {path: labels for part in self.parts.values() for path, labels in zip(
            part.paths, part.labels, strict=True)}
        classes = next(iter(self.parts.values())).classes
        count = Counter(classes[i - 1] for labels in images.values() for i in labels.tolist())
        empty = sum(not len(labels) for labels in images.values())
        parts = ', '.join(f'{len(part)} {name}' for name, part in self.parts.items())
        (least, _), (most, _) = min(self.sizes.items()), max(self.sizes.items())
        lines = [f'{self.format}: {len(images)} photographs ({parts}) of {least[0]} x {least[1]} to {most[0]} x '
                 f'{most[1]} pixels',
                 f'{sum(count.values())} boxes: ' + ', '.join(f'{name} {n}' for name, n in count.most_common())]
        if empty:
            lines.append(f'{empty} photographs have no box and are kept as background')
        return [*lines, *(f'left out: {reason}' for reason in self.bad)]


@dataclasses.dataclass
class _Annotated:
    """An image as its annotations tell of it: boxes in pixels, or, with `fractions`, in fractions of its sides.

    Attributes:
        image: The file.
        objects: What to call each in a message, its class, and its box; None where that cannot be read.
        size: Width and height as the annotations have them.
        fault: Why it cannot be used at all; '' if it can.
    """
    image: Path
    objects: list[tuple[str, str, Box | None]] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None
    fractions: bool = False
    fault: str = ''


_Parts = dict[str, list[_Annotated]]


def read_boxes(source: str | Path, on_bad: str = 'skip') -> BoxScan:
    """Recognise a data set with boxes, read it and examine every file.

    - Pascal VOC: XML files in `Annotations` (or `annotations`, or beside the images), images in `JPEGImages` (or
      `images`), and lists in `ImageSets/Main`, or none.
    - COCO: a JSON file beside its images (`coco:FILE.json`), or Roboflow's `train/_annotations.coco.json`.
    - YOLO: `data.yaml`, or `images/` and `labels/`.

    A prefix (`voc:DIR`, `coco:FILE`, `yolo:DIR`) names the format where several would do.

    Boxes are taken as they are written; they must lie in the image's own size. VOC objects marked difficult count as
    others do.

    Args:
        source: Folder or file.
        on_bad: What to do with a box that has no area or is not within its image, and with an image or annotation that
            cannot be read: 'skip' leaves it out, 'fail' raises.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: No format is recognised, annotations are damaged as a whole, no box is left, or, with 'fail',
            something is bad; each is named.
    """
    if on_bad not in ('skip', 'fail'):
        raise ValueError(f"on_bad is {on_bad!r}; choose 'skip' or 'fail'")
    kind, root = _parsed(source)
    if not root.exists():
        raise FileNotFoundError(f'{root} does not exist')
    title, parts, declared = _recognised(root, kind)
    examined = _examine([image for part in parts.values() for image in part])
    bad = tuple(dict.fromkeys(reason for found in examined.values() for reason in found.bad))
    if bad and on_bad == 'fail':
        raise ValueError(f'{len(bad)} boxes or files of {root} are bad: {some(bad, "; ")}')
    good = {path: found for path, found in examined.items() if found.size}
    named = {label for found in good.values() for label, _ in found.objects}
    if not named:
        raise ValueError(f'{root} has {len(examined)} images, none with a usable box' + (f': {bad[0]}' if bad else ''))
    classes = tuple(name for name in declared if name in named) if declared else tuple(sorted(named))
    content = defaultdict(list)
    for path, found in good.items():
        content[found.digest].append(str(path))
    return BoxScan(
        title, {name: _images([(a.image, good[a.image].objects) for a in part if a.image in good], classes)
                for name, part in parts.items()},
        bad, Counter(found.size for found in good.values()),
        tuple(tuple(paths) for paths in content.values() if len(paths) > 1))


def _parsed(source: str | Path) -> tuple[str, Path]:
    """The format that a source names ('' for none), and where it is."""
    kind, _, rest = str(source).partition(':')
    return (kind, Path(rest)) if kind in _FORMATS else ('', Path(source))


def data_folder(source: str | Path) -> Path:
    """The folder of what `read_boxes` reads."""
    _, root = _parsed(source)
    return root.parent if root.is_file() else root


def _images(found: Sequence[tuple[Path, list[tuple[str, Box]]]], classes: tuple[str, ...]) -> BoxedImages:
    number = {name: i for i, name in enumerate(classes, start=1)}
    return BoxedImages(
        tuple(str(path) for path, _ in found),
        tuple(torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4) for _, objects in found),
        tuple(torch.tensor([number[label] for label, _ in objects], dtype=torch.int64) for _, objects in found),
        classes)


def _recognised(root: Path, kind: str) -> tuple[str, _Parts, Sequence[str]]:
    """The format's name, the images of each part, and the names of the classes in their order, where that is given."""
    if kind == 'coco' or not kind and (root.suffix == '.json' or _coco_files(root)):
        return 'COCO', *_read_coco(root)
    if kind == 'yolo' or not kind and (_yaml_file(root) or any((root / 'labels').rglob('*.txt'))):
        return 'YOLO', *_read_yolo(root)
    if kind or any(next((root / name).glob('*.xml'), None) for name in _ANNOTATIONS) or any(root.glob('*/*.xml')):
        return 'Pascal VOC', _read_voc(root), ()
    raise ValueError(f'{root} holds no annotations of a known form: Pascal VOC (Annotations/*.xml), COCO '
                     f'(_annotations.coco.json, or coco:FILE.json) or YOLO (data.yaml, or images/ and labels/)')


@dataclasses.dataclass(frozen=True)
class _Found:
    size: tuple[int, int] | None  # None where it is left out
    digest: str = ''
    objects: list[tuple[str, Box]] = dataclasses.field(default_factory=list)
    bad: list[str] = dataclasses.field(default_factory=list)


def _examine(images: Iterable[_Annotated]) -> dict[Path, _Found]:
    unique = {image.image: image for image in images}
    with ThreadPoolExecutor() as pool:
        return dict(zip(unique, pool.map(_examined, unique.values()), strict=True))


def _examined(annotated: _Annotated) -> _Found:
    """What of an image is good: whole, of the size that its annotation says, with boxes within it."""
    try:
        size = read_rgb(annotated.image).size
    except ValueError as e:
        return _Found(None, bad=[str(e)])
    if annotated.fault:
        return _Found(None, bad=[annotated.fault])
    if annotated.size and annotated.size != size:
        rotated = ' (its EXIF data rotate it)' * (annotated.size == size[::-1])
        return _Found(None, bad=[f'{annotated.image} is {size[0]} x {size[1]} pixels{rotated}, but its annotation says '
                                 f'{annotated.size[0]} x {annotated.size[1]}: its boxes are of another image'])
    objects, bad = [], []
    for what, label, box in annotated.objects:
        if fault := _fault(label, box, size, annotated.fractions):
            bad.append(f'{what}: {fault}')
        else:
            box = tuple(v * side for v, side in zip(_corners(box), (*size, *size), strict=True)
                        ) if annotated.fractions else box
            objects.append((label, tuple(min(max(v, 0.), side) for v, side in zip(box, (*size, *size), strict=True))))
    return _Found(size, digest(annotated.image), objects, bad)


def _fault(label: str, box: Box | None, size: tuple[int, int], fractions: bool) -> str:
    """What is wrong with a box; '' if nothing is."""
    if not label or box is None:
        return 'the name or a coordinate is missing'
    written = ', '.join(f'{v:g}' for v in box)
    if fractions:
        if not (box[2] > 0 and box[3] > 0):
            return f'box {written} has no area'
        if not (all(0 <= v <= 1 for v in box[:2]) and all(
                -_ROUNDING / side <= v <= 1 + _ROUNDING / side
                for v, side in zip(_corners(box), (*size, *size), strict=True))):
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


def _corners(box: Box) -> Box:
    """xmin, ymin, xmax, ymax of centre, width and height."""
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def _folder(root: Path, names: Sequence[str], suffix: str = '') -> Path:
    """The first of the sub-folders that is there and holds such files; '' stands for the folder itself."""
    there = [root / name for name in names if (root / name).is_dir()]
    return next((f for f in there if any(p.suffix.lower() == suffix if suffix else looks_like_image(p)
                                         for p in f.iterdir())), there[0])


# Pascal VOC

def _read_voc(root: Path) -> _Parts:
    split = {_PARTS[f.name]: f for f in sorted(root.iterdir()) if f.is_dir() and f.name in _PARTS and any(
        f.glob('*.xml'))}  # as Roboflow exports it
    if split:
        return {name: [_read_xml(file, {}, folder) for file in sorted(folder.glob('*.xml'))]
                for name, folder in split.items()}
    annotations, images = _folder(root, _ANNOTATIONS, '.xml'), _folder(root, _IMAGES)
    by_stem = {path.stem: path for path in sorted(images.iterdir()) if looks_like_image(path)}
    lists = {file.stem: _listed(file) for file in sorted((root / 'ImageSets' / 'Main').glob('*.txt'))}
    lists = {name: stems for name, stems in lists.items() if stems is not None}
    if not lists:
        stems = [file.stem for file in sorted(annotations.glob('*.xml'))]
        without = [_Annotated(path) for stem, path in by_stem.items() if stem not in set(stems)]
        return {_ALL: [_read_xml(annotations / f'{stem}.xml', by_stem, images) for stem in stems] + without}
    return {name: [_read_xml(annotations / f'{stem}.xml', by_stem, images) for stem in stems]
            for name, stems in lists.items()}


def _listed(file: Path) -> list[str] | None:
    """The images of a list; None where it is of one class, whose lines have a flag that is not always 1."""
    rows = [line.split() for line in file.read_text(
        encoding='utf-8', errors='surrogateescape').splitlines() if line.strip()]
    flags = {row[1] for row in rows if len(row) > 1}
    return None if '-1' in flags else [row[0] for row in rows]


def _read_xml(file: Path, by_stem: dict[str, Path], images: Path) -> _Annotated:
    try:
        tree = ET.parse(file).getroot()
    except FileNotFoundError:
        return _Annotated(by_stem.get(file.stem, images / f'{file.stem}.jpg'), fault=f'{file} does not exist')
    except (LookupError, ValueError, OSError, ET.ParseError) as e:  # the first of an encoding that Python has not
        return _Annotated(by_stem.get(file.stem, images / f'{file.stem}.jpg'), fault=f'{file}: {e}')
    named = images / Path((tree.findtext('filename') or '').strip().replace('\\', '/')).name
    image = by_stem.get(file.stem) or (named if named.is_file() else next(
        (p for p in images.glob(f'{file.stem}.*') if looks_like_image(p)), images / f'{file.stem}.jpg'))
    objects = []
    for i, element in enumerate(tree.findall('object'), start=1):
        label = (element.findtext('name') or '').strip()
        try:
            box = tuple(float(element.findtext(f'bndbox/{k}') or '') for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        except ValueError:
            box = None
        objects.append((f'{file}, object {i} ({label or "no name"})', label, box))
    size = tuple(int(v) if (v := tree.findtext(f'size/{k}') or '').isdigit() else 0 for k in ('width', 'height'))
    return _Annotated(image, objects, size if all(size) else None)


# COCO

def _coco_files(root: Path) -> dict[str, Path]:
    """Annotation files by part, of Roboflow's folders, of COCO's own names, or of one file that is called so."""
    if not root.is_dir():
        return {}
    parts = {_PARTS[f.name]: f / '_annotations.coco.json' for f in sorted(root.iterdir()) if f.name in _PARTS}
    parts = {name: file for name, file in parts.items() if file.is_file()}
    for file in sorted((root / 'annotations').glob('instances_*.json')):
        parts.setdefault(_PARTS.get(re.sub(r'instances_|\d+', '', file.stem), file.stem), file)
    single = [f for f in (root / '_annotations.coco.json', root / 'annotations.json') if f.is_file()]
    return parts or ({_ALL: single[0]} if single else {})


def _read_coco(root: Path) -> tuple[_Parts, list[str]]:
    files = _coco_files(root) or {_ALL: root}
    parts, classes = {}, []
    for name, file in files.items():
        try:
            found = json.loads(file.read_text(encoding='utf-8'))
            parts[name], named = _coco_images(found, file)
        except (ValueError, RecursionError, OSError) as e:
            raise ValueError(f'{file} is not a COCO annotation file: {e}') from e
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f'{file} is not a COCO annotation file: a field is missing or of another kind '
                             f'({type(e).__name__}: {e})') from e
        classes = list(dict.fromkeys([*classes, *named]))
    return parts, classes


def _coco_images(found: dict[str, Any], file: Path) -> tuple[list[_Annotated], list[str]]:
    categories = {c['id']: str(c['name']) for c in found['categories']}
    images: dict[Any, _Annotated] = {}
    for row in found['images']:
        if row['id'] in images:
            raise ValueError(f"the image id {row['id']} occurs twice")
        size = row.get('width'), row.get('height')
        images[row['id']] = _Annotated(_coco_image(file, row['file_name']), size=size if all(size) else None)
    for row in found['annotations']:
        if row.get('iscrowd'):  # a region with many, which is no box to learn from
            continue
        if row['image_id'] not in images:
            raise ValueError(f"annotation {row.get('id')} is of image {row['image_id']}, which is not in its images")
        if row['category_id'] not in categories:
            raise ValueError(f"annotation {row.get('id')} is of category {row['category_id']}; its categories are "
                             f"{some([str(i) for i in categories])}")
        try:
            x, y, w, h = map(float, row['bbox'])
            box = x, y, x + w, y + h
        except (TypeError, ValueError):
            box = None
        label = categories[row['category_id']]
        images[row['image_id']].objects.append((f"{file}, annotation {row.get('id')} ({label})", label, box))
    merged: dict[Path, _Annotated] = {}
    for image in images.values():  # files that were joined list some images twice
        merged.setdefault(image.image, dataclasses.replace(image, objects=[])).objects.extend(image.objects)
    return list(merged.values()), [categories[i] for i in sorted(categories)]


def _coco_image(file: Path, name: str) -> Path:
    part = re.sub('instances_', '', file.stem)
    places = [file.parent, file.parent / 'images', file.parent.parent / part, file.parent.parent / 'images' / part,
              file.parent.parent / 'images']
    return next((place / name for place in places if (place / name).is_file()), file.parent / name)


# YOLO

def _yaml_file(root: Path) -> Path | None:
    files = [root] if root.is_file() else [root / name for name in ('data.yaml', 'data.yml', 'dataset.yaml')]
    return next((f for f in files if f.is_file() and f.suffix in ('.yaml', '.yml')), None)


def _read_yolo(root: Path) -> tuple[_Parts, list[str]]:
    settings, file = {}, _yaml_file(root)
    if file:
        import yaml  # of huggingface_hub
        try:
            settings = yaml.safe_load(file.read_text(encoding='utf-8'))
            names = settings['names']
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as e:
            raise ValueError(f'{file} is not a YOLO data.yaml: {e!r}; it must name its classes under "names"') from e
        classes = _yolo_names(names, file)
        root = file.parent
        if (root / str(settings.get('path') or '')).is_dir():
            root /= str(settings.get('path') or '')
        folders = {key: [_yolo_folder(root, entry) for entry in _as_list(settings[key])]
                   for key in ('train', 'val', 'test') if settings.get(key)}
        # Roboflow names a test folder where none was exported
        folders = {key: [f for f in there if f] for key, there in folders.items()}
        if not all(folders.get('train') or [None]):
            raise ValueError(f'{file} names {settings.get("train")} to train on, which is not a folder in {root}')
        folders = {key: there for key, there in folders.items() if there}
    else:
        own = root / 'classes.txt'
        classes = own.read_text(encoding='utf-8').split('\n') if own.is_file() else []
        classes = [name.strip() for name in classes if name.strip()]
        inner = [f for f in sorted((root / 'images').iterdir()) if f.is_dir() and f.name in _PARTS] if (
            root / 'images').is_dir() else []
        folders = {_PARTS[f.name]: [f] for f in inner} or {_ALL: [root / 'images']}
    parts = {name: [image for folder in there for image in _yolo_images(folder, classes)]
             for name, there in folders.items()}
    return parts, classes or [str(i) for i in range(1000)]


def _yolo_names(names: Any, file: Path) -> list[str]:
    if not isinstance(names, dict):
        return [str(name) for name in names]
    numbered = {str(key): str(name) for key, name in names.items()}
    if set(numbered) != set(map(str, range(len(numbered)))):
        raise ValueError(f'{file} numbers its classes {", ".join(numbered)}; they must be 0 to {len(numbered) - 1}')
    return [numbered[str(i)] for i in range(len(numbered))]


def _as_list(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else [str(value)]


def _yolo_folder(root: Path, entry: str) -> Path | None:
    """A folder of images that `data.yaml` names; Roboflow writes `../train/images` for `train/images`."""
    places = [root / entry, root / entry.removeprefix('../'), Path(entry)]
    found = next((place for place in places if place.is_dir()), None)
    return found / 'images' if found and (found / 'images').is_dir() else found


def _yolo_images(folder: Path, classes: Sequence[str]) -> Iterator[_Annotated]:
    for path in sorted(folder.rglob('*')):
        if not (path.is_file() and looks_like_image(path)):
            continue
        parts = list(path.parts)
        place = len(parts) - 1 - parts[::-1].index('images') if 'images' in parts else None
        labels = Path(*parts[:place], 'labels', *parts[place + 1:]) if place is not None else path
        yield _read_yolo_labels(path, labels.with_suffix('.txt'), classes)


def _read_yolo_labels(image: Path, file: Path, classes: Sequence[str]) -> _Annotated:
    if not file.is_file():
        return _Annotated(image)
    objects = []
    for i, line in enumerate(file.read_text(encoding='utf-8', errors='replace').splitlines(), start=1):
        if not line.strip():
            continue
        what, cells = f'{file}, line {i}', line.split()
        try:
            number, box = int(cells[0]), tuple(map(float, cells[1:]))
        except ValueError:
            number, box = -1, ()
        if number < 0 or classes and number >= len(classes):
            return _Annotated(image, fault=f'{what}: class {cells[0]} is not one of the {len(classes)} classes, 0 to '
                                           f'{len(classes) - 1}')
        if len(box) > 4 and len(box) % 2 == 0:  # an outline
            box = _around(box)
        objects.append((what, classes[number] if classes else str(number), box if len(box) == 4 else None))
    return _Annotated(image, objects, fractions=True)


def _around(outline: tuple[float, ...]) -> Box:
    """Centre, width and height of the box around an outline."""
    xs, ys = outline[::2], outline[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)


# The split

def divide(
        scan: BoxScan,
        train: str = '',
        test: str = '',
        seed: int = 0,
) -> tuple[BoxedImages, BoxedImages, str]:
    """The images to train on and to test on, and how they were told apart.

    Parts that the data gives are taken: 'test' (or 'val') to test on, and the others to train on. Where there is only
    one, a fifth of its images is for testing, drawn by `seed` so that each class has its share. No image is on both
    sides, nor are copies of it.

    Args:
        scan: From `read_boxes`.
        train: Name of the part to train on; '' finds it.
        test: Name of the part to test on; '' finds it.
        seed: Of the split, where there is none.

    Raises:
        FileNotFoundError: There is no such part.
        ValueError: A part has no images, or a class is on the test images alone.
    """
    parts = scan.parts
    for name in filter(None, (train, test)):
        if name not in parts:
            raise FileNotFoundError(f'there is no part {name}; there are {", ".join(parts)}')
    if len(parts) == 1 and not (train and test):
        only, = parts.values()
        chosen, how = tuple(map(only.subset, _drawn(only, seed, scan.twins))), f'80-20 by seed {seed}'
    else:
        test = test or next((name for name in ('test', 'val') if name in parts and name != train), '')
        trained_on = [train] if train else [name for name in _to_train_on(parts) if name != test]
        if not (trained_on and test):
            raise ValueError(f'there are only {", ".join(parts)}; name the parts to train on and to test on')
        tested = set(parts[test].paths)
        joined = _joined([parts[name] for name in trained_on])
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
    return [name for name in ('train', 'val', _ALL) if name in parts]


def _joined(parts: Sequence[BoxedImages]) -> BoxedImages:
    paths, boxes, labels = (tuple(v for part in parts for v in getattr(part, name)) for name in (
        'paths', 'boxes', 'labels'))
    return dataclasses.replace(parts[0], paths=paths, boxes=boxes, labels=labels)


def _drawn(
        images: BoxedImages,
        seed: int,
        twins: Iterable[Sequence[str]],
) -> tuple[list[int], list[int]]:
    """Indices to train on and to test on; each image is drawn among those that share its rarest class, and its copies
    with it."""
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
        test = [max(i for members in groups.values() for i in members)]
    chosen = {i for first in test for i in copies.get(first, [first])}
    return [i for i in range(len(images)) if i not in chosen], sorted(chosen)


def write_box_split(train: BoxedImages, test: BoxedImages, root: Path) -> str:
    """A CSV of part and path; paths within `root` are relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['part', 'path'])
    for part, images in (('train', train), ('test', test)):
        writer.writerows((part, _from(root, path)) for path in images.paths)
    return text.getvalue()


def _from(root: Path, path: str) -> str:
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path


def read_box_split(file: Path, scan: BoxScan, root: Path) -> tuple[BoxedImages, BoxedImages]:
    """The images that `write_box_split` wrote down, with what the scan says of them.

    Raises:
        ValueError: The file is damaged, or an image of it is not among those of the scan any more.
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
