"""Photographs in files: list them from folders or a CSV, examine them before training, read them as RGB."""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import re
import statistics
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, default_collate

__all__ = [
    'EXAMINED_AT_MOST', 'FORMATS', 'FolderScan', 'ImageFiles', 'ReadableOnly', 'check_shape', 'collate_readable',
    'examine', 'list_csv', 'list_folder', 'looks_like_image', 'open_csv', 'read_rgb', 'walk_files']

_PARTS = {'train': ('train', 'training'), 'test': ('test', 'testing'), 'val': ('val', 'valid', 'validation')}
_PART_WORDS = {*itertools.chain(*_PARTS.values()), 'eval', 'evaluation'}

# Formats of photographs, by Pillow's names. Its other decoders are rarely used, and that of EPS runs Ghostscript.
FORMATS = ('AVIF', 'BMP', 'GIF', 'HEIF', 'JPEG', 'JPEG2000', 'MPO', 'PNG', 'PPM', 'TIFF', 'WEBP')
_HEIF = ('.heic', '.heif')
_MOST_OBLONG = 100  # longer side over shorter: a very thin image, resized by its shorter side, takes gigabytes

# Decoding a photograph takes about a millisecond per core, so more files than this are not examined beforehand.
EXAMINED_AT_MOST = 50_000
_BLOCK = 2 ** 25  # bytes of decoded images per tensor: processes share each tensor through one file


@functools.cache
def _decoders() -> tuple[str, ...]:
    """Those of `FORMATS` that the installed Pillow reads, HEIF with its plugin."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener
        register_heif_opener()
    Image.init()
    return tuple(f for f in FORMATS if f in Image.OPEN)


def looks_like_image(path: str | Path) -> bool:
    """Whether the suffix of a file is one of `FORMATS`, or of HEIF, which may not be readable."""
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
    """Read an image file in one of `FORMATS` as RGB, rotated as its EXIF says.

    Grey (8 and 16 bits), palette and CMYK images are converted; transparency is put on white.

    Args:
        path: The file, or its content.
        least: A larger JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which is faster, as long as both sides keep
            this many pixels; 0 decodes it at full size.
        name: Name of the file in errors; '' for the path.

    Raises:
        ValueError: The file is not an image, is truncated, or is too large or too thin to decode safely. The message
            names the file and the reason.
    """
    try:
        with Image.open(path, formats=_decoders()) as image:
            check_shape(image.size)
            if least:
                image.draft(None, (least, least))
            return _as_rgb(image)
    except Exception as e:  # decoders raise almost anything for damaged files
        raise ValueError(_reason(name or str(path), e)) from e


def _as_rgb(image: Image.Image) -> Image.Image:
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
    """16-bit grey levels as RGB."""
    if pixels.dtype.kind == 'f' or pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError('its grey levels are not 16-bit; save it with 8 or 16 bits')
    return Image.fromarray((pixels.astype(np.int64) // 257).astype(np.uint8)).convert('RGB')


class _PathTable(Sequence):
    """Paths end to end in one array: a third of the memory of strings, and shared between the reading processes."""

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
        return isinstance(other, _PathTable) and np.array_equal(self._ends, other._ends) and \
            np.array_equal(self._text, other._text)

    __hash__ = None


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Image files and their labels.

    Attributes:
        paths: Files; any sequence, kept in one array.
        labels: Index into `classes`, one per file.
        classes: Names of the classes, sorted.
    """
    paths: Sequence[str]
    labels: Sequence[int]
    classes: tuple[str, ...]

    def __post_init__(self):
        if not isinstance(self.paths, _PathTable):
            object.__setattr__(self, 'paths', _PathTable(self.paths))
        if not isinstance(self.labels, tuple):
            object.__setattr__(self, 'labels', tuple(self.labels))

    @classmethod
    def of(cls, named: Sequence[tuple[str, str]], classes: Sequence[str] | None = None) -> ImageFiles:
        """From pairs of path and class name; `classes` defaults to the sorted names."""
        classes = tuple(classes or sorted({name for _, name in named}))
        number = {name: i for i, name in enumerate(classes)}
        return cls((path for path, _ in named), [number[name] for _, name in named], classes)

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Sequence[int]) -> ImageFiles:
        """The files of `index`, in its order."""
        return ImageFiles((self.paths[i] for i in index), [self.labels[i] for i in index], self.classes)

    def name(self, i: int) -> str:
        """Name of an image: its path."""
        return self.paths[i]

    def read(self, i: int) -> Image.Image:
        """An image, read by `read_rgb`."""
        return read_rgb(self.paths[i])

    def as_dataset(self, transform: Any, least: int = 0, memory: float = 0) -> Dataset:
        """A data set of (transform(RGB image), label).

        Args:
            transform: Applied to each image when it is requested.
            least: As in `read_rgb`.
            memory: Bytes for images that are decoded now and kept; the others are decoded at each request.
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
    """The first images of a list that fit into `memory` bytes, in a few tensors shared by the reading processes."""

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
        self._places = np.array(places, np.int64).reshape(-1, 4)  # block, start in it, height, width

    def get(self, i: int) -> Image.Image | None:
        """An image; None if it did not fit or could not be read."""
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
    """uint8 (height, width, 3); empty if the file cannot be read."""
    try:
        return np.asarray(read_rgb(path, least))
    except ValueError:  # reported when it is requested
        return np.empty((0, 0, 3), np.uint8)


class ReadableOnly(Dataset):
    """A data set that returns the error of an unreadable image instead of raising it; use it with `collate_readable`.

    Args:
        dataset: A data set that raises ValueError for unreadable images.
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
    """Images, labels and indices of the readable images (each None if there are none), and the errors of the others."""
    readable = [item for item in batch if not isinstance(item, str)]
    reasons = [item for item in batch if isinstance(item, str)]
    return *(default_collate(readable) if readable else (None, None, None)), reasons


@dataclasses.dataclass(frozen=True)
class FolderScan:
    """What a folder or a CSV contains.

    Attributes:
        train: All files, or those of the training part if the data is already split.
        test: Those of `test/`, or of `val/` if there is no `test/`; None if the data is not split.
        val: Those of `val/` if there is also a `test/`, else None.
        bad: Why each unreadable file or looping link was left out.
        twins: Groups of files with the same content.
        sizes: Number of files by width and height in pixels.
        examined: Whether the files were read, not only listed.
        notes: What else was left out, and why.
        tested: Name of the test part in the data if it is not `test`: `val/`.
    """
    train: ImageFiles
    test: ImageFiles | None = None
    val: ImageFiles | None = None
    bad: tuple[str, ...] = ()
    twins: tuple[tuple[str, ...], ...] = ()
    sizes: Counter[tuple[int, int]] = dataclasses.field(default_factory=Counter)
    examined: bool = False
    notes: tuple[str, ...] = ()
    tested: str = ''

    def parts(self) -> dict[str, ImageFiles]:
        """The existing parts by name."""
        return {n: p for n in ('train', 'val', 'test') if (p := getattr(self, n)) is not None}

    def summary(self) -> list[str]:
        """What is worth knowing before training, one fact per line."""
        lines = list(self.notes)
        for name, part in self.parts().items():
            counts = Counter(part.labels)
            few, many = min(counts, key=counts.get), max(counts, key=counts.get)
            each = f'{counts[few]} per class' if counts[few] == counts[many] else (
                f'{counts[few]} ({part.classes[few]}) to {counts[many]} ({part.classes[many]}) per class, '
                f'median {statistics.median(counts.values()):g}')
            if name == 'test' and self.tested:
                name = f'{self.tested}, used as the test part'
            lines.append(f'{name if self.test else "found"}: {len(part):,} files of {len(counts)} classes; {each}')
        if self.test and (absent := set(self.train.labels) - set(self.test.labels)):
            lines.append(f'not in the test part: {some(sorted(self.train.classes[i] for i in absent))}')
        if not self.examined:
            lines.append(f'more than {EXAMINED_AT_MOST:,} files: they were not checked for damage and '
                         f'duplicates')
        elif self.sizes:
            widths, heights = zip(*self.sizes, strict=True)
            lines.append(f'sizes: {min(widths)} to {max(widths)} pixels wide, {min(heights)} to {max(heights)} high')
        if self.bad:
            lines.append(f'left out, {len(self.bad)}: {some(self.bad, "; ")}')
        label = {path: part.classes[i] for part in self.parts().values()
                 for path, i in zip(part.paths, part.labels, strict=True)} if self.twins else {}
        if torn := [group for group in self.twins if len({label[p] for p in group}) > 1]:
            lines.append(f'same content in several classes, {len(torn)}: {some([" = ".join(g) for g in torn], "; ")}')
        return lines


def some(names: Sequence[str], separator: str = ', ') -> str:
    """The first five names, and the number of further ones."""
    more = f'{separator if separator == "; " else " "}and {len(names) - 5} more' if len(names) > 5 else ''
    return separator.join(names[:5]) + more


def list_folder(root: str | Path, nested: bool = False) -> FolderScan:
    """List `root/<class>/**`, or `root/train/<class>/**` and `root/test/<class>/**` (and `val/`), reading no file.

    Args:
        root: Folder of class folders. Hidden files and folders are ignored. Folders without images beside `train/` are
            ignored with a note. Links are followed unless they loop.
        nested: Every folder that holds files is a class, named by its path ('animals/cat').

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are no class folders, only one class, a class without files, or a test class without training
            files. The message names it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f'no folder at {root}')
    children = {p.name.lower(): p for p in _folders(root)}
    given = {part: next((children[n] for n in names if n in children), None) for part, names in _PARTS.items()}
    test_name = 'test' if given['test'] else 'val'
    others = sorted(set(children) - set(itertools.chain(*_PARTS.values())))
    strays = [n for n in others if not _holds_images(children[n])] if given['train'] else []
    notes = (f'no images in {some(strays)} beside {given["train"].name}/: left out',) if strays else ()
    bad: list[str] = []
    if not (given['train'] and given[test_name]):
        whole = root if len(children) - len(strays) > 1 else given['train'] or root
        if whole == root and not nested:
            _check_classes(children)
        return FolderScan(_list_part(whole, nested, bad), bad=tuple(bad), notes=notes if whole != root else ())
    if images := [n for n in others if n not in strays]:
        raise ValueError(f'{root} holds {given["train"].name}/ and {given[test_name].name}/, but also '
                         f'{some(images)} with images; move these elsewhere')
    parts = {'train': given['train'], 'test': given[test_name]}
    if test_name == 'test' and given['val']:
        parts['val'] = given['val']
    listed = {part: _list_part(folder, nested, bad) for part, folder in parts.items()}
    tested = '' if test_name == 'test' else f'{given[test_name].name}/'
    return FolderScan(**_same_classes(listed, str(root)), bad=tuple(bad), notes=notes, tested=tested)


def _check_classes(children: dict[str, Path]) -> None:
    """Refuse the parts of a split, by other names than ours, that would be taken for classes."""
    parts = [p for name, p in children.items() if _PART_WORDS & set(re.split(r'[\W_]+', name))]
    for a, b in itertools.combinations(parts, 2):
        if shared := sorted({p.name for p in _folders(a)} & {p.name for p in _folders(b)}):
            raise ValueError(f'{a} and {b} both hold {some(shared)}: if these are the classes, rename the folders to '
                             f'train and test (or val); if they are not, --nested makes each folder a class')


def _holds_images(folder: Path) -> bool:
    return any(map(looks_like_image, walk_files(folder)))


def _same_classes(parts: dict[str, ImageFiles], where: str) -> dict[str, ImageFiles]:
    """The parts, with labels numbered as in the training part."""
    classes = parts['train'].classes
    number = {c: i for i, c in enumerate(classes)}
    out = {}
    for name, part in parts.items():
        if unknown := sorted(set(part.classes) - set(classes)):
            raise ValueError(f'{where}: classes in {name} but not in train: {some(unknown)}; '
                             f'add images of them to train or remove them from {name}')
        out[name] = ImageFiles(part.paths, [number[part.classes[i]] for i in part.labels], classes)
    return out


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))


def _walk(top: str, bad: list[str], above: frozenset[str] = frozenset()) -> Iterator[tuple[str, str]]:
    """(folder, path) of every file below, in the order of names; links to a folder above are reported and skipped."""
    stack = [(top, above)]
    while stack:
        folder, ancestors = stack.pop()
        key = os.path.realpath(folder)
        if key in ancestors:
            bad.append(f'{folder} links to a folder that contains it')
            continue
        below = []
        with os.scandir(folder) as entries:
            entries = sorted((e for e in entries if not e.name.startswith('.')), key=lambda e: e.name)
        for entry in entries:
            if _is_folder(entry):
                below.append((entry.path, ancestors | {key}))
            else:
                yield folder, entry.path
        stack += reversed(below)


def walk_files(folder: str | Path) -> Iterator[str]:
    """Every file in a folder and below, in the order of names, without hidden ones and links that loop."""
    return (path for _, path in _walk(str(folder), []))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _list_part(root: Path, nested: bool, bad: list[str]) -> ImageFiles:
    above = frozenset([os.path.realpath(root)])
    labels: list[int] = []
    number: dict[str, int] = {}

    def paths() -> Iterator[str]:
        if nested:
            for folder, path in _walk(str(root), bad):
                if folder != str(root):
                    labels.append(number.setdefault(os.path.relpath(folder, root), len(number)))
                    yield path
        else:
            for folder in _folders(root):
                if os.path.realpath(folder) not in above:  # the walk names it
                    number[folder.name] = len(number)
                for _, path in _walk(str(folder), bad, above):
                    labels.append(number[folder.name])
                    yield path

    table = _PathTable(paths())
    classes = tuple(sorted(number))
    place = {number[c]: i for i, c in enumerate(classes)}
    return _checked(ImageFiles(table, [place[i] for i in labels], classes), root)


def _checked(files: ImageFiles, where: str | Path, bad: Sequence[str] = ()) -> ImageFiles:
    """The files, if there are at least two classes and each has a file."""
    if not files.classes:
        raise ValueError(f'{where} holds no class folders; put the images of each class into a folder of its own, or '
                         f'list them in a CSV file with the columns path and label')
    if len(files.classes) == 1:
        raise ValueError(f'{where} holds one class only ({files.classes[0]}); at least two are needed')
    filled = set(files.labels)
    if empty := [c for i, c in enumerate(files.classes) if i not in filled]:
        unreadable = f' ({len(bad)} files cannot be read: {some(bad, "; ")})' if bad else ''
        raise ValueError(
            f'classes without images in {where}: {some(empty)}; remove the folders or fill them{unreadable}')
    return files


def found_in(row: dict[str | None, Any]) -> str:
    """A row of a CSV file in words; values beyond its columns have no name."""
    return ', '.join(f'{k}={v!r}' if k else f'and {v!r}' for k, v in row.items())


@contextlib.contextmanager
def open_csv(file: str | Path) -> Iterator[csv.DictReader]:
    """Rows of a UTF-8 CSV file by the names in its first line; bytes that are not UTF-8 are kept.

    Raises:
        ValueError: The file is not valid CSV; the line is named.
    """
    with open(file, newline='', encoding='utf-8-sig', errors='surrogateescape') as f:
        reader = csv.DictReader(f)
        try:
            yield reader
        except csv.Error as e:
            raise ValueError(f'{file}, line {reader.line_num + 1}: {e}; look there and in the lines above for an '
                             f'unclosed quotation mark') from e


def list_csv(file: str | Path) -> FolderScan:
    """List the files that a CSV names.

    Args:
        file: UTF-8, with the columns `path` and `label`, and `split` ('train', 'val', 'test') if it is
            already split. Paths are relative to the CSV's folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column or a value is missing, or a file has two labels (the line is named), or as for
            `list_folder`.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f'no file at {file}')
    rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
    labels: dict[str, str] = {}
    with open_csv(file) as reader:
        if missing := {'path', 'label'} - set(reader.fieldnames or ()):
            raise ValueError(f'{file} has no column {" nor ".join(sorted(missing))}; its first line must name the '
                             f'columns path and label (and split, if it is split)')
        split = 'split' in reader.fieldnames
        for row in reader:
            part = next((p for p, names in _PARTS.items() if row['split'] in names), None) if split else 'train'
            if not (row['path'] and row['label'] and part) or any(row.get(None, ())):
                raise ValueError(f'{file}, line {reader.line_num}: expected path, label and split (train, val or '
                                 f'test); found {found_in(row)}')
            path, label = os.path.join(file.parent, row['path']), row['label']
            if labels.setdefault(path, label) != label:
                raise ValueError(f"{file}, line {reader.line_num}: {row['path']} is labelled {label}, but "
                                 f"{labels[path]} further up; a photograph has one label")
            rows[part].append((path, label))
    tested = 'val' if split and 'test' not in rows and 'val' in rows else ''
    if tested:
        rows['test'] = rows.pop('val')
    if 'train' not in rows or (split and 'test' not in rows):
        raise ValueError(f'{file} names no {"training files or no test " if split else ""}files')
    once = {part: list(dict.fromkeys(pairs)) for part, pairs in rows.items()}
    again = sum(map(len, rows.values())) - sum(map(len, once.values()))
    listed = {part: ImageFiles.of(pairs) for part, pairs in once.items()}
    _checked(listed['train'], file)
    notes = (f'{again} lines name a photograph again: left out',) if again else ()
    return FolderScan(**_same_classes(listed, str(file)), notes=notes, tested=tested)


@dataclasses.dataclass(frozen=True)
class _Examined:
    reason: str | None = None
    digest: bytes = b''
    size: tuple[int, int] = (0, 0)


def _examine_file(path: str) -> _Examined:
    """Decode a whole file."""
    try:
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=_decoders()) as image:
            check_shape(size := image.size)
            image.draft(None, (1, 1))  # truncated and damaged files are found at an eighth of the size too
            _as_rgb(image)
    except Exception as e:  # as in `read_rgb`
        return _Examined(_reason(path, e))
    return _Examined(None, hashlib.blake2b(content, digest_size=16).digest(), size)


def examine(
        scan: FolderScan,
        on_bad: str = 'skip',
        at_most: int | None = None,
        only: str = '',
) -> FolderScan:
    """Read every listed file once, to find unreadable files and files with the same content.

    Args:
        scan: From `list_folder` or `list_csv`.
        on_bad: 'skip' leaves unreadable files out, 'fail' raises.
        at_most: With more files than this, none is read.
        only: The only part to read; '' reads all.

    Raises:
        ValueError: A class has no readable images, or, with 'fail', files are unreadable. The message names them.
    """
    if on_bad not in ('skip', 'fail'):
        raise ValueError(f"on_bad is {on_bad!r}; choose 'skip' or 'fail'")
    if at_most is not None and sum(map(len, scan.parts().values())) > at_most:
        return _images_only(scan)
    bad, sizes, parts = list(scan.bad), Counter(), {}
    content: dict[bytes, list[str]] = defaultdict(list)
    for name, files in scan.parts().items():
        if only not in ('', name):
            continue
        with ThreadPoolExecutor() as pool:
            results = list(pool.map(_examine_file, files.paths))
        unread = [r.reason for r in results if r.reason]
        bad += unread
        if unread and on_bad == 'fail':
            raise ValueError(f'{len(bad)} files cannot be read: {some(bad, "; ")}')
        for path, result in zip(files.paths, results, strict=True):
            if not result.reason:
                sizes[result.size] += 1
                content[result.digest].append(path)
        parts[name] = files
        if unread:
            parts[name] = files.subset([i for i, r in enumerate(results) if not r.reason])
        if name == 'train' or not len(parts[name]):
            _checked(parts[name], _common(files), bad)
    twins = tuple(tuple(paths) for paths in content.values() if len(paths) > 1)
    return dataclasses.replace(scan, **parts, bad=tuple(bad), twins=twins, sizes=sizes, examined=True)


def _images_only(scan: FolderScan) -> FolderScan:
    """The scan without the files whose suffix is not that of an image, which nobody has read."""
    parts = {name: files.subset([i for i, path in enumerate(files.paths) if looks_like_image(path)])
             for name, files in scan.parts().items()}
    other = sum(map(len, scan.parts().values())) - sum(map(len, parts.values()))
    for name, part in parts.items():
        if name == 'train' or not len(part):
            _checked(part, _common(getattr(scan, name)))
    notes = (*scan.notes, f'{other:,} files do not have the suffix of an image: left out') if other else scan.notes
    return dataclasses.replace(scan, **parts, notes=notes)


def _common(files: ImageFiles) -> str:
    ends = [os.path.dirname(os.path.abspath(files.paths[i])) for i in (0, len(files) - 1)]
    return os.path.commonpath(ends)
