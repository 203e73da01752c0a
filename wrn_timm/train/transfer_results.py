"""What weights are worth on another data set, kept in their folder as `transfer.json` for the tables of README."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..card import TRANSFER_FILE
from ..files import write_json
from ..weights import find, weights_name
from .machine import environment

__all__ = ['read_transfer', 'record_transfer', 'transfer_folder']

_KEY = ('way', 'dataset', 'protocol', 'input_size', 'epochs', 'stem')


def transfer_folder(weights: str) -> Path:
    """The weights folder of `<arch>.<tag>`, or the one named.

    Raises:
        FileNotFoundError: The weights have no folder on this machine.
    """
    folder = Path(weights) if Path(weights).is_dir() else find(weights)
    if not folder:
        raise FileNotFoundError(f'{weights} has no weights folder on this machine to record results in')
    return folder


def record_transfer(weights: str, rows: list[dict[str, Any]]) -> Path:
    """Put results into the `transfer.json` of a weights folder, in place of earlier ones of the same kind.

    Args:
        weights: `<arch>.<tag>` or a weights folder.
        rows: Each with `way` ('linear probe', 'kNN', 'all', 'from scratch'...), `dataset`, `protocol`, `input_size`,
            `seeds`, `mean_per_class` and `top1` (each `mean`, `std`, `values`, in %), `seconds`; and `epochs` and
            `stem` where they apply.

    Raises:
        What `transfer_folder` raises.
    """
    folder = transfer_folder(weights)
    made_with = {k: v for k, v in environment().items() if k in ('torch', 'timm', 'hardware')}
    results = {tuple(row.get(k) for k in _KEY): row for row in [
        *read_transfer(folder), *({**row, 'environment': made_with} for row in rows)]}
    for row in results.values():  # no paths of this machine: the folder may be published
        row.pop('skipped', None)
        row.update({'weights': weights_name(row['weights'])} if 'weights' in row else {})
    write_json(folder / TRANSFER_FILE, list(results.values()))
    return folder / TRANSFER_FILE


def read_transfer(folder: Path) -> list[dict[str, Any]]:
    """The results that a weights folder keeps; none where it has no `transfer.json`."""
    file = folder / TRANSFER_FILE
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else []
