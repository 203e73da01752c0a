"""Photographs of Caltech 101 (CC BY 4.0) bundled with the package.

A checkout has a sample of eight classes, a wheel only the first photograph of each.
"""
from __future__ import annotations

from pathlib import Path

__all__ = ['golden_photographs', 'sample']

_PACKAGE = Path(__file__).resolve().parents[1]
_SAMPLE = _PACKAGE.parent / 'tests' / 'data' / 'caltech101_sample'
_IN_WHEEL = _PACKAGE / '_photographs'


def sample() -> Path | None:
    """Folder of the sample: 240 photographs in class folders, for trying things out; None outside a checkout."""
    return _SAMPLE if _SAMPLE.is_dir() else None


def golden_photographs() -> Path:
    """Folder of the class folders whose first photographs are the inputs of the golden logits.

    These photographs are the same in a checkout and a wheel.
    """
    return sample() or _IN_WHEEL
