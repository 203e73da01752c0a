"""Read image files as RGB, one by one or as a data set that keeps decoded images in memory."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate

__all__ = ['FORMATS', 'Examined', 'ImageFiles', 'PathTable', 'ReadableOnly', 'check_shape', 'collate_readable',
           'examine_file', 'looks_like_image', 'read_rgb']

# Image formats by Pillow's names. Its other decoders are rarely used, and the one for EPS runs Ghostscript.
FORMATS = ('AVIF', 'BMP', 'GIF', 'HEIF', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')
_HEIF = ('.heic', '.heif')
_MOST_OBLONG = 100  # longer side over shorter; resizing a very thin image by its shorter side would take gigabytes
_BLOCK = 2 ** 25  # bytes of decoded images per tensor; workers share each tensor through one file


@functools.cache
def _decoders() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow can read. HEIF needs a plugin."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def looks_like_image(path: str | Path) -> bool:
    """Whether a file has the suffix of one of `FORMATS`. HEIF counts even if it cannot be read."""
    suffix = Path(path).suffix.lower()
    return suffix in _HEIF or Image.registered_extensions().get(suffix) in FORMATS


def check_shape(size: tuple[int, int]) -> None:
    """Refuse a very thin image before it is decoded or resized.

    Raises:
        ValueError: One side is more than 100 times as long as the other.
    """
    if max(size) > _MOST_OBLONG * min(size):
        raise ValueError(f'it is {size[0]:,} x {size[1]:,} pixels; one side may be at most {_MOST_OBLONG} times as '
                         f'long as the other')


def read_rgb(path: str | Path | io.BytesIO, least: int = 0, name: str = '') -> Image.Image:
    """Read an image file in one of `FORMATS` as RGB, rotated according to its EXIF data.

    Grey (8 and 16 bits), palette and CMYK images are converted. Transparent images are composited onto white.

    Args:
        path: Image file, or its content.
        least: Number of pixels that both sides keep if a larger JPEG is decoded at 1/2, 1/4 or 1/8 of its size, which
            is faster; 0 decodes it at full size.
        name: Name of the file in errors; '' for the path.

    Raises:
        ValueError: The file is not an image, is truncated, or is too large or too thin to decode safely. The message
            names the file and the reason.
    """
    try:
        with Image.open(path, formats=_decoders()) as image:
            image.filename = ''  # else Pillow maps an uncompressed TIFF from disk in its rotated shape
            check_shape(image.size)
            if least:
                image.draft(None, (least, least))
            return as_rgb(image)
    except Exception as e:  # decoders raise almost anything for damaged files
        raise ValueError(_reason(name or str(path), e)) from e


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB as `read_rgb` does."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ('F', 'I', 'I;16', 'I;16L', 'I;16B', 'I;16N'):
        return _from_deep_grey(np.asarray(image))
    if 'transparency' in image.info or image.mode in ('RGBA', 'LA', 'PA'):
        image = image.convert('RGBA')
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image)
    return image.convert('RGB')


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f'{name} does not exist'
    if not isinstance(error, Image.UnidentifiedImageError):
        return f'{name} cannot be read: {error}'
    suffix = Path(name).suffix.lower()
    if suffix in _HEIF and 'HEIF' not in _decoders():
        return f'{name} is an HEIF image, which needs the package pillow-heif'
    other = suffix in Image.registered_extensions() and not looks_like_image(name)
    return f'{name} is not an image' + (f' in a supported format ({", ".join(_decoders())})' if other else '')


def _from_deep_grey(pixels: np.ndarray) -> Image.Image:
    """Convert 16-bit grey levels to RGB."""
    if pixels.dtype.kind == 'f' or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError('its grey levels are not 16-bit; save it with 8 or 16 bits')
    return Image.fromarray((pixels.astype(np.int64) // 257).astype(np.uint8)).convert('RGB')


@dataclasses.dataclass(frozen=True)
class Examined:
    """Result of reading a whole file.

    Attributes:
        reason: Why the file cannot be read; None if it can.
        digest: Digest of the content.
        size: Width and height in pixels, before EXIF rotation.
    """
    reason: str | None = None
    digest: bytes = b''
    size: tuple[int, int] = (0, 0)


def examine_file(path: str) -> Examined:
    """Read and decode a whole file, as `read_rgb` would, but without keeping it."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=_decoders()) as image:
            check_shape(size := image.size)
            image.draft(None, (1, 1))  # an eighth of the size is enough to find truncated and damaged files
            as_rgb(image)
    except Exception as e:  # as in `read_rgb`
        return Examined(_reason(path, e))
    return Examined(None, hashlib.blake2b(content, digest_size=16).digest(), size)


class PathTable(Sequence):
    """Paths concatenated in one array, which takes a third of the memory of strings and is shared by the workers."""

    def __init__(self, paths: Iterable[str]):
        text, ends = bytearray(), [0]
        for path in paths:
            text += os.fsencode(path)
            ends.append(len(text))
        self._text, self._ends = np.frombuffer(bytes(text), np.uint8), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return os.fsdecode(self._text[self._ends[i]:self._ends[i + 1]].tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PathTable) and np.array_equal(self._ends, other._ends) and \
            np.array_equal(self._text, other._text)

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files and their labels.

    Attributes:
        paths: Image files; any sequence, stored as a `PathTable`.
        labels: Index into `classes`, one per file.
        classes: Names of the classes, sorted.
    """
    paths: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __post_init__(self):
        if not isinstance(self.paths, PathTable):
            object.__setattr__(self, 'paths', PathTable(self.paths))
        if not isinstance(self.labels, tuple):
            object.__setattr__(self, 'labels', tuple(self.labels))

    @classmethod
    def of(cls, named: Sequence[tuple[str, str]], classes: Sequence[str] | None = None) -> ImageFiles:
        """Create from pairs of path and class name. `classes` defaults to the sorted names."""
        classes = tuple(classes or sorted({name for _, name in named}))
        number = {name: i for i, name in enumerate(classes)}
        return cls((path for path, _ in named), [number[name] for _, name in named], classes)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Sequence[int]) -> ImageFiles:
        """Return the files at `index`, in that order."""
        return ImageFiles((self.paths[i] for i in index), [self.labels[i] for i in index], self.classes)

    def name(self, i: int) -> str:
        """Name of an image: its path."""
        return self.paths[i]

    def read(self, i: int) -> Image.Image:
        """Read an image with `read_rgb`."""
        return read_rgb(self.paths[i])

    def as_dataset(self, transform: Any, least: int = 0, memory: float = 0) -> Dataset:
        """Return a data set of (transform(RGB image), label).

        Args:
            transform: Transform applied to each image when it is requested.
            least: As in `read_rgb`.
            memory: Memory in bytes for images that are decoded now and kept. The others are decoded at each request.
        """
        return _FileDataset(self, transform, least, memory)


class _FileDataset(Dataset):
    def __init__(self, files: ImageFiles, transform: Any, least: int, memory: float):
        self.files, self.transform, self.least = files, transform, least
        self.kept = _Decoded(files.paths, least, memory)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image = self.kept.get(i)
        if image is None:
            image = read_rgb(self.files.paths[i], self.least)
        return self.transform(image), self.files.labels[i]


class _Decoded:
    """Cache of the first images that fit into `memory` bytes, decoded into a few tensors shared by the workers."""

    def __init__(self, paths: Sequence[str], least: int, memory: float):
        self._blocks: list[torch.Tensor] = []
        places, filling, filled, used = [], [], 0, 0

        def close_block() -> None:
            self._blocks.append(torch.from_numpy(np.concatenate(filling or [np.empty(0, np.uint8)])))
            filling.clear()

        with ThreadPoolExecutor() as pool:
            for pixels in _in_turn(pool, lambda path: _pixels(path, least), paths if memory > 0 else ()):
                used += pixels.nbytes
                if used > memory:
                    break
                places.append((len(self._blocks), filled, *pixels.shape[:2]))
                filling.append(pixels.ravel())
                filled += pixels.nbytes
                if filled >= _BLOCK:
                    close_block()
                    filled = 0
        close_block()
        self._places = np.array(places, np.int64).reshape(-1, 4)  # block, offset in the block, height, width

    def get(self, i: int) -> Image.Image | None:
        """Return an image; None if it did not fit or could not be read."""
        if i >= len(self._places):
            return None
        block, start, height, width = self._places[i].tolist()
        pixels = self._blocks[block][start:start + 3 * height * width]
        return Image.fromarray(pixels.view(height, width, 3).numpy()) if len(pixels) else None


def _in_turn(pool: ThreadPoolExecutor, function: Callable[[str], Any], items: Sequence[str]) -> Iterator[Any]:
    """Like `pool.map`, but only a few results are computed ahead."""
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > (os.cpu_count() or 1):
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pixels(path: str, least: int) -> np.ndarray:
    """Decode a file to uint8 (height, width, 3); empty if it cannot be read."""
    try:
        return np.asarray(read_rgb(path, least))
    except ValueError:  # reported when the image is requested
        return np.empty((0, 0, 3), np.uint8)


class ReadableOnly(Dataset):
    """Data set that returns the error of an unreadable image instead of raising it, for use with `collate_readable`.

    Args:
        dataset: Data set that raises ValueError for unreadable images.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Any, int, int] | str:
        try:
            return *self.dataset[i], i
        except ValueError as e:
            return str(e)


def collate_readable(batch: list[tuple[torch.Tensor, int, int] | str]) -> tuple:
    """Collate images, labels and indices of readable images (None if there are none), and the errors of the others."""
    readable = [item for item in batch if not isinstance(item, str)]
    reasons = [item for item in batch if isinstance(item, str)]
    return *(default_collate(readable) if readable else (None, None, None)), reasons
