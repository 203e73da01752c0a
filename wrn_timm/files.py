"""Files that are whole or not there."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ['atomic_write', 'digest', 'discard_partial']


def atomic_write(path: Path, content: str | Callable[[Path], None]) -> None:
    """Write beside `path` and rename, so that a reader sees the old file or the new one and never half of it."""
    beside = path.with_name(f'.{path.name}.part{os.getpid()}{path.suffix}')
    try:
        if callable(content):
            content(beside)
        else:
            beside.write_text(content, encoding='utf-8', errors='surrogateescape')
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


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
