"""List image files from folders or a CSV file, and check them before training."""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import operator
import os
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..names import counted, some
from .images import ImageFiles, PathTable, examine_file, looks_like_image

__all__ = ['EXAMINED_AT_MOST', 'FolderScan', 'examine', 'found_in', 'list_csv', 'list_folder', 'open_csv', 'walk_files']

_PARTS = {'train': ('train', 'training'), 'test': ('test', 'testing'), 'val': ('val', 'valid', 'validation')}
_PART_WORDS = {word: part for part, words in (_PARTS | {'eval': ('eval', 'evaluation')}).items() for word in words}

# Decoding a photograph takes about a millisecond per core, so larger data sets are not examined before training.
EXAMINED_AT_MOST = 50_000


@dataclasses.dataclass(frozen=True)
class FolderScan:
    """Contents of a folder or CSV file.

    Attributes:
        train: All files, or those of the training part if the data is already split.
        test: Files of `test/`, or of `val/` if there is no `test/`; None if the data is not split.
        val: Files of `val/` if there is also a `test/`, else None.
        bad: Reasons why unreadable files and looping links were left out.
        twins: Groups of files with the same content.
        sizes: Number of files by width and height in pixels.
        examined: Whether the files were read, not only listed.
        notes: Notes on what else was left out, and why.
        tested: Name of the test part in the data if it is not `test`, such as `val/`.
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
        """Return the existing parts by name."""
        return {n: p for n in ('train', 'val', 'test') if (p := getattr(self, n)) is not None}

    def summary(self) -> list[str]:
        """Describe the files, one fact per line."""
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


def list_folder(root: str | Path, nested: bool = False) -> FolderScan:
    """List `root/<class>/**` or `root/{train,test,val}/<class>/**`, without reading any file.

    Args:
        root: Folder of class folders. Hidden files and folders are ignored. Folders without images beside `train/` are
            ignored with a note. Links are followed unless they loop.
        nested: Whether every folder that holds images is a class, named by its path ('animals/cat').

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: There are no class folders, a class without files, or a test class without training
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
            _check_classes(children, given['train'])
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


def _check_classes(children: dict[str, Path], train: Path | None) -> None:
    """Reject class folders that look like the parts of a split."""
    parts = {p: {_PART_WORDS[word] for word in re.split(r'[\W\d_]+', name) if word in _PART_WORDS}
             for name, p in children.items()}
    for a, b in itertools.combinations([p for p in parts if parts[p]], 2):
        shared = sorted({p.name for p in _folders(a)} & {p.name for p in _folders(b)})
        if shared or parts[a].isdisjoint(parts[b]):
            reason = f', since both hold {some(shared)}' if shared else ''
            raise ValueError(f'{a} and {b} look like parts of a split{reason}: if they are, rename them to train and '
                             f'test (or val), each with one folder per class; if they are not, --nested makes each '
                             f'folder a class')
    if train and sum(map(_holds_images, _folders(train))) > 1:
        others = [p.name for p in children.values() if p != train and _holds_images(p)]
        raise ValueError(f'{train} looks like the training part of a split, but {some(others)} beside it holds images '
                         f'too; move these elsewhere, or rename the part to test on to test (or val)')


def _holds_images(folder: Path) -> bool:
    return any(map(looks_like_image, walk_files(folder)))


def _same_classes(parts: dict[str, ImageFiles], where: str) -> dict[str, ImageFiles]:
    """Renumber the labels of all parts as in the training part."""
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
    """Yield (folder, path) of every file below `top`, in order of names, skipping and reporting links that loop."""
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
    """Iterate over the files in a folder and below, in order of names, without hidden files and looping links."""
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
            for folder, entries in itertools.groupby(_walk(str(root), bad), operator.itemgetter(0)):
                inside = [path for _, path in entries]
                if folder != str(root) and any(looks_like_image(path) or not Path(path).suffix for path in inside):
                    number[os.path.relpath(folder, root)] = len(number)
                    labels.extend([len(number) - 1] * len(inside))
                    yield from inside
        else:
            for folder in _folders(root):
                if os.path.realpath(folder) not in above:  # else `_walk` reports it
                    number[folder.name] = len(number)
                for _, path in _walk(str(folder), bad, above):
                    labels.append(number[folder.name])
                    yield path

    table = PathTable(paths())
    classes = tuple(sorted(number))
    place = {number[c]: i for i, c in enumerate(classes)}
    return _checked(ImageFiles(table, [place[i] for i in labels], classes), root)


def _checked(files: ImageFiles, where: str | Path, bad: Sequence[str] = ()) -> ImageFiles:
    """Return the files after checking that there are classes and that each has files."""
    if not files.classes:
        raise ValueError(f'{where} holds no class folders; put the images of each class into a folder of its own, or '
                         f'list them in a CSV file with the columns path and label')
    filled = set(files.labels)
    if empty := [c for i, c in enumerate(files.classes) if i not in filled]:
        unreadable = f" ({counted(len(bad), 'file')} cannot be read: {some(bad, '; ')})" if bad else ''
        raise ValueError(
            f'classes without images in {where}: {some(empty)}; remove the folders or fill them{unreadable}')
    return files


def found_in(row: dict[str | None, Any]) -> str:
    """Describe a row of a CSV file. Values beyond its columns have no name."""
    return ', '.join(f'{k}={v!r}' if k else f'and {v!r}' for k, v in row.items())


@contextlib.contextmanager
def open_csv(file: str | Path) -> Iterator[csv.DictReader]:
    """Open a UTF-8 CSV file with a header for reading. Bytes that are not UTF-8 are kept.

    Raises:
        ValueError: The file is not valid CSV. The message names the line.
    """
    with open(file, newline='', encoding='utf-8-sig', errors='surrogateescape') as f:
        reader = csv.DictReader(f)
        try:
            yield reader
        except csv.Error as e:
            raise ValueError(f'{file}, line {reader.line_num + 1}: {e}; look there and in the lines above for an '
                             f'unclosed quotation mark') from e


def list_csv(file: str | Path) -> FolderScan:
    """List the files named in a CSV file.

    Args:
        file: CSV file in UTF-8 with the columns `path` and `label`, and `split` ('train', 'val' or 'test') if the data
            is already split. Paths are relative to its folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column or a value is missing, or a file has two labels (the message names the line), or as for
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
            part = next((p for p, names in _PARTS.items() if (row['split'] or '').lower() in names), None
                        ) if split else 'train'
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
    notes = (f"{counted(again, 'line')} with a photograph that is listed already: left out",) if again else ()
    return FolderScan(**_same_classes(listed, str(file)), notes=notes, tested=tested)


def examine(
        scan: FolderScan,
        on_bad: str = 'skip',
        at_most: int | None = None,
        only: str = '',
) -> FolderScan:
    """Read every listed file once, to find unreadable files and files with the same content.

    Args:
        scan: Scan from `list_folder` or `list_csv`.
        on_bad: What to do with unreadable files: 'skip' leaves them out, 'fail' raises.
        at_most: Number of files above which none is read; None for no limit.
        only: Name of the only part to read; '' reads all parts.

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
            results = list(pool.map(examine_file, files.paths))
        unread = [r.reason for r in results if r.reason]
        bad += unread
        if unread and on_bad == 'fail':
            raise ValueError(f"{counted(len(unread), 'file')} cannot be read: {some(unread, '; ')}")
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
    """Leave out files without the suffix of an image from a scan whose files were not read."""
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
