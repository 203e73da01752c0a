"""Sources of photographs, and their split into training, held-out and test files."""
from __future__ import annotations

import csv
import dataclasses
import io
import os
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from ..names import as_cell, from_cell, printable, some
from .folders import FolderScan, found_in, list_csv, list_folder, open_csv
from .images import ImageFiles

__all__ = ['ENOUGH_TO_CHOOSE', 'Split', 'check_protocol', 'data_name', 'list_source', 'make_split', 'read_split',
           'source_root', 'split_files', 'write_split']

ENOUGH_TO_CHOOSE = 100  # held-out files needed to choose the epoch; with fewer, epochs differ by less than one file
CALTECH101 = 'caltech101:'
CALTECH101_BACKGROUND = 'BACKGROUND_Google'  # usually left out: 101 classes, 8,677 files
_CALTECH101_ARCHIVE = 'https://data.caltech.edu/records/mzrjq-6wc02/files/caltech-101.zip'
_CALTECH101_FILES = 8677
_COLUMNS = ['part', 'label', 'path']
_PROTOCOL = re.compile(r'(?P<which>first|random)(?P<count>[1-9]\d*)|(?P<train>\d+)-(?P<test>\d+)')


def data_name(source: str) -> str:
    """Name of a source: 'caltech101', or the printable name of the folder or CSV file."""
    if source.startswith(CALTECH101):
        return CALTECH101.rstrip(':')
    path = Path(source).resolve()
    return printable(path.stem if path.suffix.lower() == '.csv' else path.name)


def source_root(source: str, download: bool = False) -> Path:
    """The folder that the paths of a source are relative to.

    Raises:
        FileNotFoundError: Caltech 101 is not in `caltech101:DIR`, or could not be downloaded.
    """
    if not source.startswith(CALTECH101):
        return Path(source).parent if Path(source).suffix.lower() == '.csv' else Path(source)
    root, name = Path(source.removeprefix(CALTECH101)), '101_ObjectCategories'
    places = root, root / name, root / 'caltech101' / name
    folder = next((p for p in places if (p / 'accordion').is_dir()), None)
    if not folder and download:
        from torchvision.datasets import Caltech101
        try:
            Caltech101(str(root), download=True)
        except (OSError, RuntimeError, ValueError, ImportError) as e:
            raise FileNotFoundError(
                f'caltech101: the download into {root} failed: {e}; without a network, get {_CALTECH101_ARCHIVE} '
                f'elsewhere, unpack it and the 101_ObjectCategories.tar.gz in it, and give the folder that holds {name}'
            ) from e
        return places[-1]
    if not folder:
        raise FileNotFoundError(f'caltech101: no {name} with the class folders in {root.resolve()}; give the folder '
                                f'that holds it, or add --download')
    return folder


def list_source(source: str, nested: bool = False, download: bool = False) -> FolderScan:
    """List `caltech101:DIR`, a CSV file or a folder, without reading any image.

    Args:
        source: `caltech101:DIR` (101 classes: the background class is left out), `FILE.csv` (`list_csv`), or a folder
            (`list_folder`).
        nested: As in `list_folder`.
        download: Download Caltech 101 with torchvision if it is missing.

    Raises:
        Any error of `source_root`, `list_csv` and `list_folder`.
    """
    if not source.startswith(CALTECH101):
        return list_csv(source) if Path(source).suffix.lower() == '.csv' else list_folder(source, nested)
    scan = list_folder(source_root(source, download))
    files = scan.train
    classes = tuple(c for c in files.classes if c != CALTECH101_BACKGROUND)
    number = {files.classes.index(c): i for i, c in enumerate(classes)}
    kept = [i for i, label in enumerate(files.labels) if label in number]
    notes = []
    if len(classes) < len(files.classes):
        notes.append(f'{CALTECH101_BACKGROUND} is left out ({len(files) - len(kept)} files): it is not an object')
    if (len(kept), len(classes)) != (_CALTECH101_FILES, 101):
        notes.append(f'Caltech 101 has {_CALTECH101_FILES:,} files in 101 classes, but this folder has {len(kept):,} '
                     f'in {len(classes)}: results are not comparable with published ones')
    return dataclasses.replace(scan, notes=tuple(notes), train=ImageFiles(
        (files.paths[i] for i in kept), [number[files.labels[i]] for i in kept], classes))


@dataclasses.dataclass(frozen=True)
class Split:
    """The files of each part.

    Attributes:
        train: Training files.
        holdout: Files kept out of training to choose the epoch or the penalty; None if there are none.
        test: Test files, measured once at the end.
    """
    train: ImageFiles
    holdout: ImageFiles | None
    test: ImageFiles

    def leaks(self, twins: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
        """Return pairs of files with the same content, one in the training or held-out part, one in the test part."""
        test = set(self.test.paths) if twins else set()
        known = {*self.train.paths, *(self.holdout.paths if self.holdout else ())} if twins else set()
        return [(next(p for p in group if p in known), path)
                for group in twins if known.intersection(group) for path in group if path in test]


def check_protocol(protocol: str) -> None:
    """Check that `make_split` knows a protocol.

    Raises:
        ValueError: The protocol is unknown.
    """
    found = _PROTOCOL.fullmatch(protocol)
    shares = [int(found[part]) for part in ('train', 'test')] if found and found['train'] else [1, 99]
    if not found or min(shares) < 1 or sum(shares) != 100:
        raise ValueError(f'split {protocol!r} is unknown; choose first30 or random30 (30 training files per class, or '
                         f'another number; the rest for testing), 80-20 (per cent of each class), or the '
                         f'split.csv of another run')


def make_split(
        scan: FolderScan,
        protocol: str = '70-30',
        holdout: float | Literal['auto'] = 0.,
        seed: int = 0,
) -> Split:
    """Split by a protocol, unless the files are already split.

    Args:
        scan: The files. `protocol` is ignored if they have a test part, and `holdout` if they have a validation part.
        protocol: `first30`: the first 30 files of each class by name for training, the rest for testing; `random30`:
            30 random files of each class; `80-20`: 80 % of the files of each class, at random.
        holdout: Share of the training files of each class to hold out; 'auto' is a tenth if that is at least 100 files,
            else none. Nothing is held out of classes with one or two files.
        seed: Seed of the random protocols.

    Raises:
        ValueError: The protocol is unknown, or classes have too few files for it. The message names them.
    """
    train, test = scan.train, scan.test
    if not test:
        check_protocol(protocol)
        found = _PROTOCOL.fullmatch(protocol)
        if found['which']:
            train, test = _split_by_count(train, int(found['count']), found['which'] == 'random', seed)
        else:
            train, test = split_files(train, int(found['test']) / 100, seed)
    chosen_by = scan.val
    if holdout and not chosen_by:
        share, least = (0.1, ENOUGH_TO_CHOOSE) if holdout == 'auto' else (holdout, 0)
        # not the seed of the split, which would draw the same positions again
        chosen = {i for index in _members(train).values() if len(index) > 2
                  for i in _sample(index, share, random.Random(f'{seed} {index[0]}'))}
        if chosen and min(len(chosen), share * len(train)) >= least:  # small classes give more than their share
            train, chosen_by = _divided(train, chosen)
    return Split(train, chosen_by, test)


def _members(files: ImageFiles) -> dict[int, list[int]]:
    """Indices of the files by label."""
    members = defaultdict(list)
    for i, label in enumerate(files.labels):
        members[label].append(i)
    return dict(sorted(members.items()))


def _sample(index: list[int], share: float, rng: random.Random) -> list[int]:
    """Draw a share of the indices, at least one and not all."""
    return rng.sample(index, min(len(index) - 1, max(1, round(len(index) * share))))


def _divided(files: ImageFiles, second: set[int]) -> tuple[ImageFiles, ImageFiles]:
    return tuple(files.subset([i for i in range(len(files)) if (i in second) == part]) for part in (False, True))


def _split_by_count(files: ImageFiles, count: int, at_random: bool, seed: int) -> tuple[ImageFiles, ImageFiles]:
    members = _members(files)
    if short := [f'{files.classes[label]} ({len(i)})' for label, i in members.items() if len(i) <= count]:
        raise ValueError(f'{count} training files per class and at least one for testing need {count + 1}; '
                         f'these classes have fewer: {some(short)}')
    rng = random.Random(seed)
    train = {i for index in members.values() for i in (
        rng.sample(index, count) if at_random else sorted(index, key=files.name)[:count])}
    return _divided(files, set(range(len(files))) - train)


def split_files(files: ImageFiles, test_fraction: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """Split at random within each class, with at least one image of each class on either side.

    Raises:
        ValueError: A class has only one image. The message names it.
    """
    members = _members(files)
    if lonely := [files.classes[label] for label, index in members.items() if len(index) < 2]:
        raise ValueError(f'classes with a single image cannot be split: {some(lonely)}')
    rng = random.Random(seed)
    test_index = set()
    for index in members.values():
        test_index.update(_sample(index, test_fraction, rng))
    return _divided(files, test_index)


def write_split(split: Split, root: Path) -> str:
    """Return the text of a `split.csv`: part, label and path of each file. Paths below `root` are relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(_COLUMNS)
    above = f'{root}{os.sep}'
    for field in dataclasses.fields(Split):
        if files := getattr(split, field.name):
            writer.writerows((field.name, as_cell(files.classes[label]),
                              as_cell(path.removeprefix(above).replace(os.sep, '/')))
                             for label, path in zip(files.labels, files.paths, strict=True))
    return text.getvalue()


def read_split(file: str | Path, root: Path) -> Split:
    """Read the split in a `split.csv`, whose relative paths are below `root`.

    Raises:
        FileNotFoundError: None of its training files exists.
        ValueError: The file is not a `split.csv`, training or test files are missing, a class has no training files, or
            a line is incomplete or has an unknown part. The message names the line.
    """
    rows, parts = defaultdict(list), [field.name for field in dataclasses.fields(Split)]
    with open_csv(file) as reader:
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f'{file} is not the split.csv of a run: its first line is not {",".join(_COLUMNS)}')
        for row in reader:
            part, label, path = (row[column] for column in _COLUMNS)
            if part not in parts or not (label and path) or any(row.get(None, ())):
                raise ValueError(f'{file}, line {reader.line_num}: expected part ({", ".join(parts)}), label and '
                                 f'path; found {found_in(row)}')
            rows[part].append((os.path.join(root, from_cell(path)), from_cell(label)))
    if missing := {'train', 'test'} - set(rows):
        raise ValueError(f'{file} names no files of the part {" nor ".join(sorted(missing))}')
    if not any(os.path.exists(path) for path, _ in rows['train']):
        raise FileNotFoundError(f"{file} names {rows['train'][0][0]}, which does not exist, nor do its other training "
                                f"files; give the --data that it was made from")
    classes = sorted({label for _, label in rows['train']})
    if unknown := {label for pairs in rows.values() for _, label in pairs} - set(classes):
        raise ValueError(f'{file} names no training files of {some(sorted(unknown))}')
    return Split(**{part: ImageFiles.of(rows[part], classes) if rows[part] else None
                    for part in parts})
