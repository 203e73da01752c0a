"""A run or a weights folder as shards of a few megabytes, for ways that take no large files, and back bit for bit."""
from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import atomic_folder
from ..schemas import check_shards, read_json
from .rundir import carried_files

__all__ = ['pack', 'unpack']

INDEX_FILE = 'shards.json'


class _ShardWriter(io.RawIOBase):
    """A stream cut into files of at most `limit` bytes."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit, self.shards = folder, limit, []
        self._buffer = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._buffer += data
        while len(self._buffer) >= self.limit:
            self._cut(self.limit)
        return len(data)

    def finish(self) -> None:
        if self._buffer:
            self._cut(len(self._buffer))

    def _cut(self, size: int) -> None:
        shard = bytes(self._buffer[:size])
        del self._buffer[:size]
        name = f'shard-{len(self.shards):04d}'
        (self.folder / name).write_bytes(shard)
        self.shards.append({'name': name, 'size': size, 'sha256': hashlib.sha256(shard).hexdigest()})


class _ShardReader(io.RawIOBase):
    """The shards as one stream, each checked as it is opened."""

    def __init__(self, shards: Iterator[bytes]):
        self._shards, self._rest = shards, memoryview(b'')

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        self._rest = self._rest or memoryview(next(self._shards, b''))  # whose parts are not copied
        n = min(len(into), len(self._rest))
        into[:n], self._rest = self._rest[:n], self._rest[n:]
        return n


def pack(folder: str | Path, out: str | Path, shard_bytes: int = 15_000_000) -> list[Path]:
    """Cut a run directory (of its checkpoints the newest and the best) or a weights folder into shards.

    Args:
        folder: What to carry; it is not changed.
        out: New folder of the shards and their index, `shards.json`.
        shard_bytes: Largest size of a shard.

    Returns:
        The files of `out`.

    Raises:
        FileNotFoundError: `folder` holds nothing.
        FileExistsError: `out` is there already.
        ValueError: `shard_bytes` is below 1.
    """
    folder, out = Path(folder), Path(out)
    if shard_bytes < 1:
        raise ValueError(f'shard_bytes is {shard_bytes}; it must be at least 1')
    files = carried_files(folder)
    if not files:
        raise FileNotFoundError(f'{folder} holds no files to carry')
    if out.exists():
        raise FileExistsError(f'{out} is there already; choose another place for the shards')

    def fill(new: Path) -> None:
        writer = _ShardWriter(new, shard_bytes)
        with tarfile.open(fileobj=writer, mode='w|') as archive:
            for file in files:
                archive.add(file, file.relative_to(folder).as_posix())
        writer.finish()
        (new / INDEX_FILE).write_text(json.dumps({'shards': writer.shards}, indent=2) + '\n', encoding='utf-8')

    atomic_folder(out, fill)
    return sorted(out.iterdir())


def unpack(shards: str | Path, out: str | Path) -> Path:
    """Put together again what `pack` cut.

    Args:
        shards: Folder of all the shards and their index.
        out: New folder.

    Returns:
        `out`.

    Raises:
        FileNotFoundError: The index or a shard is missing; says which.
        FileExistsError: `out` is there already.
        RuntimeError: A shard is not the one that the index names; says which.
        ValueError: The index is damaged.
    """
    shards, out = Path(shards), Path(out)
    index = shards / INDEX_FILE
    if not index.is_file():
        raise FileNotFoundError(f'{shards} holds no {INDEX_FILE}')
    if out.exists():
        raise FileExistsError(f'{out} is there already; choose another folder')
    rows = read_json(index, check_shards)['shards']
    missing = [row['name'] for row in rows if not (shards / row['name']).is_file()]
    if missing:
        raise FileNotFoundError(f'{shards} lacks {len(missing)} of {len(rows)} shards: {", ".join(missing[:5])}')

    def checked() -> Iterator[bytes]:
        for row in rows:
            data = (shards / row['name']).read_bytes()
            if (found := hashlib.sha256(data).hexdigest()) != row['sha256']:
                raise RuntimeError(f"{shards / row['name']} is damaged: sha256 {found}, the index names "
                                   f"{row['sha256']}. Carry it again.")
            yield data

    def fill(new: Path) -> None:
        with tarfile.open(fileobj=io.BufferedReader(_ShardReader(checked())), mode='r|') as archive:
            archive.extractall(new, filter='data')

    atomic_folder(out, fill)
    return out
