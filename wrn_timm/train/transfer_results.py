"""Results of weights on other data sets, stored in the weights folder as `transfer.json` for the README tables."""
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
    """The weights folder of `<arch>.<tag>`, or the given folder.

    Raises:
        FileNotFoundError: The weights have no folder on this machine.
    """
    folder = Path(weights) if Path(weights).is_dir() else find(weights)
    if not folder:
        raise FileNotFoundError(f'{weights} has no weights folder on this machine to record results in')
    return folder


def record_transfer(weights: str, rows: list[dict[str, Any]]) -> Path:
    """Write results to the `transfer.json` of a weights folder, replacing earlier ones with the same settings.

    Args:
        weights: `<arch>.<tag>` or a weights folder.
        rows: Results, each with `way` ('linear probe', 'kNN', 'all', 'from scratch'...), `dataset`, `protocol`,
            `input_size`, `seeds`, `mean_per_class` and `top1` (with `mean`, `std` and `values`, in %), `seconds`, and
            `epochs` and `stem` if they apply.

    Raises:
        Any error of `transfer_folder`.
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
    """The results in a weights folder's `transfer.json`; empty if there is no such file."""
    file = folder / TRANSFER_FILE
    return json.loads(file.read_text(encoding='utf-8')) if file.is_file() else []
