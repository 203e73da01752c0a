"""Files that are whole or not there, after a power cut too, and folders that one process writes to."""
from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

__all__ = ['LOCK_FILE', 'FolderLock', 'atomic_folder', 'atomic_write', 'digest', 'discard_partial', 'make_folder',
           'writing']

LOCK_FILE = '.lock'


def atomic_write(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one and never half of it.

    The file is on the disk when this returns.

    Args:
        path: File, in a folder that is there.
        content: Text, or what writes the file that it is given.

    Raises:
        OSError: It cannot be written; names the file and the room that is left.
    """
    beside = path.with_name(f'.{path.name}.part{os.getpid()}{path.suffix}')
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


def atomic_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """The same of a folder: filled beside, then put in the place of the one that is there.

    Args:
        path: Folder; the ones above it are made.
        fill: Writes files and folders into the empty folder that it is given.

    Raises:
        OSError: It cannot be written; names the folder and the room that is left.
    """
    beside, old = (path.with_name(f'.{path.name}.{kind}') for kind in ('part', 'old'))
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with writing(path):
            make_folder(path.parent)
            beside.mkdir()
            fill(beside)
            for inside in (*beside.rglob('*'), beside):
                _sync(inside)
            if path.exists():  # a folder can be renamed only to where there is none
                shutil.rmtree(old, ignore_errors=True)
                os.replace(path, old)
            os.replace(beside, path)
            _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and put their names on the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync(path.parent)


def discard_partial(folder: Path) -> None:
    """Remove what `atomic_write` left in a folder where it was killed."""
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
    """Wait until a file, or the names in a folder, are on the disk."""
    folder = path.is_dir()
    with contextlib.suppress(OSError) if folder else contextlib.nullcontext():  # not every system can for folders
        file = os.open(path, os.O_RDWR if os.name == 'nt' else os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file or folder in errors of what writes it: that of a full disk names none."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        there = next(p for p in (path, *path.absolute().parents) if p.exists())
        raise OSError(f'{path} cannot be written ({str(e).partition(chr(10))[0]}); '
                      f'{shutil.disk_usage(there).free / 1e6:.0f} MB are free there') from e


class FolderLock:
    """Keeps other processes from a folder for as long as this object and its process live, however they end.

    It is a lock of the operating system on a file, LOCK_FILE, which stays behind and means nothing by itself. Processes
    that are forked do not inherit it. Where the file system has no locks nothing is kept.

    Args:
        folder: It is there.

    Raises:
        BlockingIOError: Another process has it; it is named.
    """

    def __init__(self, folder: Path):
        self._file = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.release = weakref.finalize(self, os.close, self._file)
        try:
            if fcntl:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            holder = os.read(self._file, 20).decode(errors='replace')
            raise BlockingIOError(f'another run (process {holder}) is writing to {folder}; wait for its end, stop it, '
                                  f'or choose another --out') from e
        except OSError:  # no locks here
            return
        os.ftruncate(self._file, 0)
        os.write(self._file, str(os.getpid()).encode())
