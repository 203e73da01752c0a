"""Files that are complete or absent, even after a power cut, and folders that only one process writes to."""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ['LOCK_FILE', 'FolderLock', 'atomic_folder', 'atomic_write', 'digest', 'discard_partial', 'make_folder',
           'write_json', 'writing']

LOCK_FILE = '.lock'


def atomic_write(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write a temporary file and rename it, so that a reader sees the old file or the new one and never half of it.

    The data is on the disk when this returns.

    Args:
        path: Path of the file, in an existing folder.
        content: Text, or a function that writes the file at the path it is given.

    Raises:
        OSError: The file cannot be written. The message names it and the free space.
    """
    beside = path.with_name(f'.{path.name[:50]}.part{os.getpid()}{path.suffix}')  # names have at most 255 bytes
    try:
        with writing(path):
            if callable(content):
                content(beside)
            else:
                beside.write_text(content, encoding='utf-8', errors='surrogateescape')
            _sync(beside)
            os.replace(beside, path)
            _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file with `atomic_write`."""
    atomic_write(path, json.dumps(content, indent=2) + '\n')


def atomic_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary folder beside `path`, then replace the existing folder by it.

    Args:
        path: Folder, or symbolic link to it; its parents are created.
        fill: Function that writes files and folders into the empty folder that it is given.

    Raises:
        OSError: The folder cannot be written. The message names it and the free space.
    """
    if path.is_symlink():
        path = path.resolve()
    beside, old = (path.with_name(f'.{path.name}.{kind}') for kind in ('part', 'old'))
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(path):
            make_folder(path.parent)
            beside.mkdir()
            fill(beside)
            for inside in (*beside.rglob('*'), beside):
                _sync(inside)
            if path.exists():  # a folder cannot be renamed to an existing one
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(beside, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, and sync their names to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def discard_partial(folder: Path) -> None:
    """Remove the temporary files that a killed `atomic_write` left in a folder."""
    for beside in folder.glob('.*.part[0-9]*'):
        beside.unlink(missing_ok=True)


def digest(path: Path, algorithm: str = 'sha256') -> str:
    """Hexadecimal digest of a file by one of hashlib's algorithms."""
    found = hashlib.new(algorithm)
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():  # not every system can sync folders
        file = os.open(path, os.O_RDWR if os.name == 'nt' else os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the name of the file or folder to errors, because the error of a full disk has none."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        raise OSError(f'{path} cannot be written ({str(e).partition(chr(10))[0]}); '
                      f'{shutil.disk_usage(there).free / 1e6:.0f} MB are free there') from e


class FolderLock:
    """Keep other processes from writing to a folder until this object is deleted or its process ends in any way.

    The operating system locks the file LOCK_FILE in the folder. The file stays there afterwards and has no effect
    without the lock. Forked processes do not inherit the lock. File systems without locks give no protection.

    Args:
        folder: Existing folder.

    Raises:
        BlockingIOError: Another process holds the lock; its process id is given.
    """

    def __init__(self, folder: Path):
        self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, self._file)
        try:
            if fcntl:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            holder = os.read(self._file, 20).decode(errors='replace')
            raise BlockingIOError(f'another run (process {holder}) is writing to {folder}; wait until it ends, stop '
                                  f'it, or choose another --out') from e
        except OSError:  # the file system has no locks
            return
        os.ftruncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())
