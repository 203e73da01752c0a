"""Photographs of Caltech 101 (CC BY 4.0) that come with the package: in a checkout a sample of eight classes, in the
wheel the first of each class."""
from __future__ import annotations

from pathlib import Path

__all__ = ['golden_photographs', 'sample']

_PACKAGE = Path(__file__).resolve().parents[1]
_SAMPLE = _PACKAGE.parent / 'tests' / 'data' / 'caltech101_sample'
_IN_WHEEL = _PACKAGE / '_photographs'


def sample() -> Path | None:
    """The class folders of the sample (240 photographs) to try things out on; None where there is no checkout."""
    return _SAMPLE if _SAMPLE.is_dir() else None


def golden_photographs() -> Path:
    """Class folders whose first photographs are the inputs of the golden logits, the same in a checkout and a wheel."""
    return sample() or _IN_WHEEL
