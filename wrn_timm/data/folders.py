"""Folders of photographs, one folder a class: scanned before training, read as RGB."""
from __future__ import annotations

import dataclasses
import os
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

__all__ = ['FolderScan', 'ImageFiles', 'read_rgb', 'scan_folder', 'split_files']

_TRAIN, _TEST = ('train',), ('test', 'val', 'valid', 'validation')


def read_rgb(path: str | Path) -> Image.Image:
    """Read an image file as RGB, turned as its EXIF says.

    Grey (8 and 16 bits), palette and CMYK are converted; transparency is laid on white.

    Raises:
        ValueError: The file is no image, is cut off, or is too large to decode safely; the path and reason are named.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ('F', 'I', 'I;16', 'I;16L', 'I;16B', 'I;16N'):
                return _from_deep_grey(np.asarray(image))
            if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA'):
                image = image.convert('RGBA')
                white = Image.new('RGBA', image.size, 'white')
                image = Image.alpha_composite(white, image)
            return image.convert('RGB')
    except Exception as e:  # the decoders of damaged files raise nearly anything
        reason = 'is not an image' if isinstance(e, Image.UnidentifiedImageError) else f'cannot be read: {e}'
        raise ValueError(f'{path} {reason}') from e


def _from_deep_grey(pixels: np.ndarray) -> Image.Image:
    """16-bit grey levels as RGB."""
    if pixels.dtype.kind == 'f' or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError('its grey levels are not 16-bit; save it with 8 or 16 bits')
    return Image.fromarray((pixels.astype(np.int64) // 257).astype(np.uint8)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files and their labels.

    Attributes:
        paths: Files.
        labels: Index into `classes`, one a file.
        classes: Names of the class folders, sorted.
    """
    paths: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def as_dataset(self, transform: Any) -> Dataset:
        """A data set of (transform(RGB image), label)."""
        return _FileDataset(self, transform)


class _FileDataset(Dataset):
    def __init__(self, files: ImageFiles, transform: Any):
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(read_rgb(self.files.paths[i])), self.files.labels[i]


@dataclasses.dataclass(frozen=True)
class FolderScan:
    """What a folder holds.

    Attributes:
        train: All files, or those of `train/` where the folder is split already.
        test: Those of `test/` or `val/`; None where the folder is not split.
        bad: Why each unreadable file was left out.
    """
    train: ImageFiles
    test: ImageFiles | None
    bad: tuple[str, ...]


def scan_folder(root: str | Path, on_bad: str = 'skip') -> FolderScan:
    """List `root/<class>/**`, or `root/train/<class>/**` and `root/test/<class>/**`, and read every file once.

    Args:
        root: Folder of class folders. Hidden files and folders are passed by.
        on_bad: What to do with a file that is no whole image: 'skip' leaves it out, 'fail' raises.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: No class folders, one class only, a class without images, classes that differ between the parts,
            or, with 'fail', unreadable files; each is named.
    """
    if on_bad not in ('skip', 'fail'):
        raise ValueError(f"on_bad is {on_bad!r}; choose 'skip' or 'fail'")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f'no folder at {root}')
    children = {p.name.lower(): p for p in _folders(root)}
    train_dir = next((children[n] for n in _TRAIN if n in children), None)
    test_dir = next((children[n] for n in _TEST if n in children), None)
    if not (train_dir and test_dir):
        train, bad = _scan_part(root if len(children) > 1 else train_dir or root, on_bad)
        return FolderScan(train, None, bad)
    if others := sorted(set(children) - set(_TRAIN) - set(_TEST)):
        raise ValueError(f'{root} holds {train_dir.name}/ and {test_dir.name}/, and beside them {_some(others)}; '
                         f'move these elsewhere')
    (train, bad), (test, bad_test) = _scan_part(train_dir, on_bad), _scan_part(test_dir, on_bad)
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f'{train_dir.name}/ and {test_dir.name}/ of {root} have different classes: {_some(differ)}')
    return FolderScan(train, test, bad + bad_test)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _some(names: list[str]) -> str:
    return ', '.join(names[:5]) + (f' and {len(names) - 5} more' if len(names) > 5 else '')


def _files(folder: Path) -> list[str]:
    return sorted(
        os.path.join(base, name) for base, _, names in os.walk(folder) for name in names if not name.startswith('.'))


def _why_bad(path: str) -> str | None:
    try:
        read_rgb(path)
    except ValueError as e:
        return str(e)
    return None


def _scan_part(root: Path, on_bad: str) -> tuple[ImageFiles, tuple[str, ...]]:
    folders = _folders(root)
    classes = tuple(p.name for p in folders)
    if not classes:
        raise ValueError(f'{root} holds no class folders; one folder of images a class is expected')
    if len(classes) == 1:
        raise ValueError(f'{root} holds one class only ({classes[0]}); at least two are needed')
    found = [(path, label) for label, folder in enumerate(folders) for path in _files(folder)]
    with ThreadPoolExecutor() as pool:
        reasons = list(pool.map(_why_bad, (path for path, _ in found)))
    bad = tuple(r for r in reasons if r)
    if bad and on_bad == 'fail':
        raise ValueError(f'{len(bad)} files are not whole images: ' + '; '.join(bad[:5]))
    good = [pair for pair, reason in zip(found, reasons, strict=True) if not reason]
    filled = {label for _, label in good}
    empty = [c for label, c in enumerate(classes) if label not in filled]
    if empty:
        unreadable = f' ({len(bad)} files are not whole images: {"; ".join(bad[:3])})' if bad else ''
        raise ValueError(
            f'classes without images in {root}: {_some(empty)}; remove the folders or fill them{unreadable}')
    paths, labels = zip(*good, strict=True)
    return ImageFiles(paths, labels, classes), bad


def split_files(files: ImageFiles, test_fraction: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """Split at random within each class, at least one image of each on either side.

    Raises:
        ValueError: A class has one image only; it is named.
    """
    members = defaultdict(list)
    for i, label in enumerate(files.labels):
        members[label].append(i)
    lonely = [files.classes[label] for label, index in sorted(members.items()) if len(index) < 2]
    if lonely:
        raise ValueError(f'classes with a single image cannot be split: {_some(lonely)}')
    rng = random.Random(seed)
    test_index = set()
    for _, index in sorted(members.items()):
        n = len(index)
        test_index.update(rng.sample(index, min(n - 1, max(1, round(n * test_fraction)))))

    def part(keep: bool) -> ImageFiles:
        index = [i for i in range(len(files)) if (i in test_index) == keep]
        return dataclasses.replace(
            files, paths=tuple(files.paths[i] for i in index), labels=tuple(files.labels[i] for i in index))

    return part(False), part(True)
