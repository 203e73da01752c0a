"""Readers for box annotations in Pascal VOC, COCO and YOLO format. The boxes are returned as written, unchecked."""
from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..names import counted, some
from .folders import walk_files
from .images import looks_like_image

__all__ = ['ALL', 'FORMATS', 'Annotated', 'Box', 'corners', 'recognised']

FORMATS = ('voc', 'coco', 'yolo', 'bccd')  # 'bccd' is a data set in VOC format
ALL = 'all'  # the only part of a data set that is not split
_IMAGES = ('JPEGImages', 'images', 'Images', 'imgs', '')
_ANNOTATIONS = ('Annotations', 'annotations', 'xmls', 'labels', '')
_PARTS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test', 'trainval': 'trainval'}
Box = tuple[float, float, float, float]


@dataclasses.dataclass
class Annotated:
    """An image with its annotations as written.

    Attributes:
        image: Image file.
        objects: Description for messages, class, and box of each object. The box is None if it cannot be read.
        size: Width and height according to the annotations; None if not given.
        fractions: Whether boxes are centre, width and height in fractions of the image, instead of corners in pixels.
        fault: Why the image cannot be used; '' if it can.
        file: Annotation file; None if the image has none.
    """
    image: Path
    objects: list[tuple[str, str, Box | None]] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None
    fractions: bool = False
    fault: str = ''
    file: Path | None = None


class Found(NamedTuple):
    """Annotations of a data set.

    Attributes:
        parts: Images by part.
        classes: Class names in order; empty if the format does not list them.
        notes: What was left out, and what is missing.
    """
    parts: dict[str, list[Annotated]]
    classes: Sequence[str] = ()
    notes: Sequence[str] = ()


def _part(name: str) -> str:
    """Part that a name such as 'Train' or 'val2017' stands for; '' if it stands for none."""
    return _PARTS.get(re.sub(r'[\W\d_]+$', '', name.lower().removeprefix('instances_')), '')


def _by_part(paths: Iterable[Path]) -> dict[str, Path]:
    """Return paths by part. If none or several stand for a part, they keep their own names."""
    part = {path: _part(path.stem) for path in paths}
    count = Counter(part.values())
    return {name if name and count[name] == 1 else path.stem: path for path, name in part.items()}


def _part_folders(root: Path) -> dict[str, Path]:
    """Return the folders in `root` that are parts, by part."""
    return _by_part(f for f in sorted(root.iterdir()) if f.is_dir() and _part(f.stem)) if root.is_dir() else {}


def _under(folder: Path, wanted: Callable[[str], bool] = looks_like_image) -> list[Path]:
    """List the images (or other files) in a folder and below, without hidden ones; none if there is no folder."""
    return sorted(Path(path) for path in walk_files(folder) if wanted(path)) if folder.is_dir() else []


def _is_xml(path: str) -> bool:
    return path.endswith('.xml')


def _spellings(folder: Path, name: str) -> list[Path]:
    """Candidate paths of a name: as written, and with the backslashes of Windows as slashes."""
    return [folder / spelling for spelling in dict.fromkeys((name, name.replace('\\', '/')))]


def corners(box: Box) -> Box:
    """Convert a box from centre, width and height to xmin, ymin, xmax, ymax."""
    x, y, w, h = box
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def recognised(root: Path, kind: str) -> tuple[str, Found]:
    """Detect the format of a data set and read its annotations.

    Args:
        root: Folder or file.
        kind: One of `FORMATS`; '' detects the format.

    Returns:
        The name of the format, and the annotations.

    Raises:
        ValueError: The format is not recognised, or an annotation file is invalid.
    """
    if root.is_file() and (kind in ('voc', 'bccd') or kind == 'yolo' and not _yaml_file(root)):
        raise ValueError(f'{root} is a file; give the folder of the data set')
    if kind == 'coco' or not kind and (root.suffix == '.json' or _coco_files(root)):
        return 'COCO', _read_coco(root)
    if kind == 'yolo' or not kind and (
            _yaml_file(root) or (root / 'obj.names').is_file() or any((root / 'labels').rglob('*.txt'))):
        return 'YOLO', _read_yolo(root)
    if kind or any(next((root / name).rglob('*.xml'), None) for name in _ANNOTATIONS if name) or any(
            next(root.glob(beside), None) for beside in ('*.xml', '*/*.xml')):
        return 'Pascal VOC', _read_voc(root)
    raise ValueError(f'{root} holds no annotations in a known format: Pascal VOC (Annotations/*.xml), COCO '
                     f'(_annotations.coco.json, or coco:FILE.json) or YOLO (data.yaml, or images/ and labels/)')


# Pascal VOC

class _ByStem(dict[Path, dict[str, Path]]):
    """Images of a folder by stem. Each folder is listed only once."""

    def __missing__(self, folder: Path) -> dict[str, Path]:
        there = sorted(folder.iterdir()) if folder.is_dir() else ()
        return self.setdefault(folder, {
            path.stem: path for path in there if looks_like_image(path) and not path.name.startswith('.')})


def _read_voc(root: Path) -> Found:
    by_stem = _ByStem()
    split = {name: folder for name, folder in _part_folders(root).items() if any(folder.glob('*.xml'))}
    if split:  # Roboflow's layout
        return _voc({name: (_under(folder, _is_xml), folder, folder) for name, folder in split.items()}, by_stem)
    annotations = _folder(root, _ANNOTATIONS, _is_xml)
    images = _folder(root, _IMAGES, looks_like_image)
    files = _by_part(sorted((root / 'ImageSets' / 'Main').glob('*.txt')))
    lists = {name: entries for name, file in files.items() if (entries := _listed(file, annotations)) is not None}
    if not lists:
        return _voc({ALL: (_under(annotations, _is_xml), annotations, images)}, by_stem)
    return Found({name: [_read_xml(annotations / f'{entry}.xml', annotations, images, by_stem) for entry in entries]
                  for name, entries in lists.items()})


def _folder(root: Path, names: Sequence[str], wanted: Callable[[str], bool]) -> Path:
    """Return the first existing subfolder with a wanted file, else the first one; '' stands for `root` itself."""
    there = [root / name for name in names if (root / name).is_dir()]
    return next((folder for folder in there if any(map(wanted, walk_files(folder)))), there[0])


def _voc(parts: dict[str, tuple[list[Path], Path, Path]], by_stem: _ByStem) -> Found:
    """Read the images annotated by the XML files of each part, given with the folders of annotations and images."""
    found = {name: [_read_xml(file, annotations, images, by_stem) for file in files]
             for name, (files, annotations, images) in parts.items()}
    annotated = {a.image for part in found.values() for a in part}
    folders = {images for _, _, images in parts.values()} | {path.parent for path in annotated}
    without = {path for folder in folders for path in by_stem[folder].values()} - annotated
    return Found(found, notes=[
        f"{counted(len(without), 'photograph')} without an XML file: left out"] if without else [])


def _listed(file: Path, annotations: Path) -> list[str] | None:
    """Read an image list without duplicates; None if it is a per-class list, which flags other images by -1."""
    entries, flags = [], set()
    for line in file.read_text(encoding='utf-8-sig', errors='surrogateescape').splitlines():
        entry = line.strip()
        flagged = re.fullmatch(r'(.*\S)\s+(-1|0|1)', entry)
        if flagged and not (annotations / f'{entry}.xml').is_file():
            entry, flag = flagged.groups()
            flags.add(flag)
        if entry := entry.strip('"'):  # some programs quote names with spaces
            entries.append(entry)
    return None if '-1' in flags else list(dict.fromkeys(entries))


def _read_xml(file: Path, annotations: Path, images: Path, by_stem: _ByStem) -> Annotated:
    """Read an XML file below `annotations`. Its image is in `images`, or in the subfolder of the same name there."""
    folders = list(dict.fromkeys([images / file.relative_to(annotations).parent, images]))
    stemmed = next((by_stem[f][file.stem] for f in folders if file.stem in by_stem[f]), None)
    missing = folders[0] / f'{file.stem}.jpg'
    try:
        tree = ET.parse(file).getroot()
    except FileNotFoundError:
        return Annotated(stemmed or missing, fault=f'{file} does not exist', file=file)
    except (LookupError, ValueError, OSError, ET.ParseError) as e:  # LookupError: unknown encoding
        return Annotated(stemmed or missing, fault=f'{file}: {e}', file=file)
    if tree.tag != 'annotation' and tree.find('object') is None:  # such as "CVAT for images"
        return Annotated(stemmed or missing, file=file, fault=(
            f'{file} is not in Pascal VOC format; export the annotations as Pascal VOC, COCO or YOLO'))
    name = Path((tree.findtext('filename') or '').strip().replace('\\', '/')).name
    named = next((f / name for f in folders if (f / name).is_file()), None)
    if stemmed and not (named and named.stem == file.stem):  # renamed XML files still contain the old name
        named = stemmed
    objects = []
    for i, element in enumerate(tree.findall('object'), start=1):
        label = (element.findtext('name') or '').strip()
        try:
            box = tuple(float(element.findtext(f'bndbox/{k}') or '') for k in ('xmin', 'ymin', 'xmax', 'ymax'))
        except ValueError:
            box = None
        objects.append((f'{file}, object {i} ({label or "no name"})', label, box))
    size = tuple(int(v) if (v := tree.findtext(f'size/{k}') or '').isdigit() else 0 for k in ('width', 'height'))
    return Annotated(named or missing, objects, size if all(size) else None, file=file)


# COCO

def _coco_files(root: Path) -> dict[str, Path]:
    """Find the annotation files by part: in Roboflow's folders, by COCO's own names, or a single file."""
    if not root.is_dir():
        return {}
    parts = {name: folder / '_annotations.coco.json' for name, folder in _part_folders(root).items()}
    parts = _by_part(sorted((root / 'annotations').glob('instances_*.json'))) | {
        name: file for name, file in parts.items() if file.is_file()}
    single = [f for f in (root / '_annotations.coco.json', root / 'annotations.json') if f.is_file()]
    return parts or ({ALL: single[0]} if single else {})


def _read_coco(root: Path) -> Found:
    files = {ALL: root} if root.is_file() else _coco_files(root)
    if not files:
        raise ValueError(f'{root} holds no annotations.json and no _annotations.coco.json; name the annotation file: '
                         f'coco:FILE.json')
    parts, classes, crowds = {}, [], 0
    for name, file in files.items():
        try:
            found = json.loads(file.read_text(encoding='utf-8-sig'))
            parts[name], named = _coco_images(found, file)
            crowds += sum(bool(row.get('iscrowd')) for row in found['annotations'])
        except (ValueError, RecursionError, OSError) as e:
            raise ValueError(f'{file} is not a COCO annotation file: {e}') from e
        except (AttributeError, KeyError, TypeError) as e:
            raise ValueError(f'{file} is not a COCO annotation file: a field is missing or has the wrong type '
                             f'({type(e).__name__}: {e})') from e
        classes = list(dict.fromkeys([*classes, *named]))
    return Found(parts, classes, [f"{counted(crowds, 'crowd region')} (iscrowd): left out"] if crowds else [])


def _coco_images(found: dict[str, Any], file: Path) -> tuple[list[Annotated], list[str]]:
    categories = {c['id']: str(c['name']) for c in found['categories']}
    images: dict[Any, Annotated] = {}
    for row in found['images']:
        if row['id'] in images:
            raise ValueError(f"the image id {row['id']} occurs twice")
        size = row.get('width'), row.get('height')
        images[row['id']] = Annotated(_coco_image(file, row['file_name']), size=size if all(size) else None, file=file)
    for row in found['annotations']:
        if row.get('iscrowd'):  # a crowd region is not a box to train on
            continue
        if row['image_id'] not in images:
            raise ValueError(f"annotation {row.get('id')} refers to image {row['image_id']}, which is not listed")
        if row['category_id'] not in categories:
            raise ValueError(f"annotation {row.get('id')} refers to category {row['category_id']}; the categories are "
                             f"{some([str(i) for i in categories])}")
        try:
            x, y, w, h = map(float, row['bbox'])
            box = x, y, x + w, y + h
        except (TypeError, ValueError):
            box = None
        label = categories[row['category_id']]
        images[row['image_id']].objects.append((f"{file}, annotation {row.get('id')} ({label})", label, box))
    merged: dict[Path, Annotated] = {}
    for image in images.values():  # merged annotation files list some images twice
        merged.setdefault(image.image, dataclasses.replace(image, objects=[])).objects.extend(image.objects)
    return list(merged.values()), [categories[i] for i in sorted(categories)]


def _coco_image(file: Path, name: str) -> Path:
    part = re.sub('instances_', '', file.stem)
    places = [file.parent, file.parent / 'images', file.parent.parent / part, file.parent.parent / 'images' / part,
              file.parent.parent / 'images']
    return next((path for place in places for path in _spellings(place, name) if path.is_file()), file.parent / name)


# YOLO

def _yaml_file(root: Path) -> Path | None:
    files = [root] if root.is_file() else [root / name for name in ('data.yaml', 'data.yml', 'dataset.yaml')]
    return next((f for f in files if f.is_file() and f.suffix in ('.yaml', '.yml')), None)


def _read_yolo(root: Path) -> Found:
    file = _yaml_file(root)
    parts, classes, pose = _of_yaml(file) if file else (*_without_yaml(root), False)
    read = {name: [_read_yolo_labels(path, classes, pose) for path in dict.fromkeys(paths)]
            for name, paths in parts.items()}
    if classes:
        return Found(read, classes)
    numbers = {int(label) for part in read.values() for image in part for _, label, _ in image.objects}
    return Found(read, [str(number) for number in sorted(numbers)], [
        'the classes are called by their numbers; a file classes.txt, with one name per line, gives them names'])


def _without_yaml(root: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """List the images of each part, and the classes, of data without `data.yaml`."""
    names = next((f for f in (root / 'classes.txt', root / 'labels' / 'classes.txt', root / 'obj.names')
                  if f.is_file()), None)
    lines = names.read_text(encoding='utf-8-sig').splitlines() if names else []
    darknet = {_part(f.name[4:-5]) or f.name: f for f in sorted(root.glob('obj_*_data'))}
    folders = darknet or _part_folders(root / 'images') or {ALL: root / 'images'}
    return {name: _under(folder) for name, folder in folders.items()}, [line.strip() for line in lines if line.strip()]


def _of_yaml(file: Path) -> tuple[dict[str, list[Path]], list[str], bool]:
    """Read a `data.yaml`: the images of each part, the classes, and whether keypoints follow the boxes."""
    import yaml  # a dependency of huggingface_hub
    try:
        settings = yaml.safe_load(file.read_text(encoding='utf-8-sig'))
        names = settings['names']
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f'{file} is not a YOLO data.yaml: {e!r}; it must name its classes under "names"') from e
    classes, root = _yolo_names(names, file), file.parent
    if (root / str(settings.get('path') or '')).is_dir():
        root /= str(settings.get('path') or '')
    parts: dict[str, list[Path]] = {}
    for key, entries in settings.items():
        part = _part(str(key))
        for entry in map(str, entries if isinstance(entries, list) else [entries]) if part and entries else ():
            place = _yolo_place(root, entry)
            if place:
                parts.setdefault(part, []).extend(_under(place) if place.is_dir() else _images_listed(place, root))
            elif part != 'test':  # Roboflow names a test folder even if none was exported
                raise ValueError(f'{file} names {entry} under "{key}", which is neither a folder nor a list of images '
                                 f'in {root}; correct it, or leave "{key}" out')
    if 'train' not in parts:
        raise ValueError(f'{file} names no training images under "train"')
    return parts, classes, bool(settings.get('kpt_shape'))


def _yolo_names(names: Any, file: Path) -> list[str]:
    if isinstance(names, list):
        return [str(name) for name in names]
    if not isinstance(names, dict):
        raise ValueError(f'{file} has {names!r} under "names"; it must name its classes there')
    numbered = {str(key): str(name) for key, name in names.items()}
    if set(numbered) != set(map(str, range(len(numbered)))):
        raise ValueError(f'{file} numbers its classes {", ".join(numbered)}; they must be 0 to {len(numbered) - 1}')
    return [numbered[str(i)] for i in range(len(numbered))]


def _places(root: Path, entry: str) -> list[Path]:
    """Candidate paths of an entry in `data.yaml`. Roboflow writes `../train/images` for `train/images`."""
    return [path for spelling in dict.fromkeys((entry, entry.replace('\\', '/')))
            for path in (root / spelling, root / spelling.removeprefix('../'), Path(spelling))]


def _yolo_place(root: Path, entry: str) -> Path | None:
    """Find the folder of images, or the text file that lists images, of an entry; None if there is neither."""
    found = next((p for p in _places(root, entry) if p.is_dir() or p.is_file() and p.suffix == '.txt'), None)
    return found / 'images' if found and (found / 'images').is_dir() else found


def _images_listed(file: Path, root: Path) -> Iterator[Path]:
    """Yield the images in a list. Its lines are relative to the folder of the list or to that of the data set.

    CVAT writes `data/images/...` for `images/...`.
    """
    for line in file.read_text(encoding='utf-8-sig', errors='surrogateescape').splitlines():
        if entry := line.strip():
            places = [*_spellings(file.parent, entry), *_places(root, entry), root / entry.removeprefix('data/')]
            yield next((p for p in places if p.is_file()), places[0])


def _labels_of(image: Path) -> Path:
    """Label file of an image: under `labels` instead of `images`, or in the same folder."""
    parts, beside = list(image.parent.parts), image.with_suffix('.txt')
    if 'images' in parts:
        parts[len(parts) - 1 - parts[::-1].index('images')] = 'labels'
    return file if (file := Path(*parts, beside.name)).is_file() else beside


def _read_yolo_labels(image: Path, classes: Sequence[str], pose: bool) -> Annotated:
    file = _labels_of(image)
    if not file.is_file():
        return Annotated(image)
    objects = []
    for i, line in enumerate(file.read_text(encoding='utf-8-sig', errors='replace').splitlines(), start=1):
        if not line.strip():
            continue
        what, (cell, *cells) = f'{file}, line {i}', line.split()
        number = _whole(cell)
        if not 0 <= number < (len(classes) or number + 1):
            known = f'one of the {len(classes)} classes, 0 to {len(classes) - 1}' if classes else 'a number from 0'
            return Annotated(image, fault=f'{what}: class {cell} is not {known}', file=file)
        objects.append((what, classes[number] if classes else str(number), _yolo_box(cells, pose)))
    return Annotated(image, objects, fractions=True, file=file)


def _whole(text: str) -> int:
    """Parse a class number, which some programs write as 0.000000; -1 if it is not a whole number."""
    try:
        return int(number) if (number := float(text)).is_integer() else -1
    except ValueError:
        return -1


def _yolo_box(cells: Sequence[str], pose: bool) -> Box | None:
    """Parse the box of a line. An outline gives its bounding box.

    A fifth number (a track or a confidence) is ignored, and so are keypoints with `pose`.
    """
    try:
        box = tuple(map(float, cells[:4] if pose or len(cells) == 5 else cells))
    except ValueError:
        return None
    if len(box) > 4 and len(box) % 2 == 0:
        xs, ys = box[::2], box[1::2]
        return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
    return box if len(box) == 4 else None
