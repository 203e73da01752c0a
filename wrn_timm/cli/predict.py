"""Predict the classes of photographs.

    wrn-timm predict --model wrn16_1.cifar10 photo.jpg FOLDER [...]
    find . -name '*.jpg' | wrn-timm predict --model RUN/best --csv -
"""
from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import timm

from ..names import as_cell, counted, printable
from ..recipes import Precision
from ..train.predict import find_images, predict_files
from .common import OnDevice, pass_any_name, reports_errors
from .options import option, parse

DEFAULT = 'wrn16_1.cifar10'


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions(OnDevice):
    images: tuple[str, ...] = option(metavar='IMAGE', positional=True)
    """File, folder, or - for a list on standard input."""
    model: str | None = None
    """timm name, weights folder or run directory; the default is wrn16_1.cifar10."""
    json: bool = False
    """Print one JSON list."""
    csv: bool = False
    """Print one line per file: image, label, probability (label_2... with --top-k), error. Names that a spreadsheet
    would read as a formula get a leading '."""
    top_k: int | None = option(None, 'K')
    """Number of classes per file; the default is 5, or 1 with --csv."""
    batch_size: int = 32
    """Files per batch."""
    precision: Precision = 'auto'
    """'auto' is bfloat16 on GPUs and CPUs that are faster in it, 'no' is float32."""

    def __post_init__(self):
        super().__post_init__()
        if self.json and self.csv:
            raise ValueError('choose one of --json and --csv')

    @property
    def classes(self) -> int:
        """Number of classes to print for each file."""
        return (1 if self.csv else 5) if self.top_k is None else self.top_k


def named(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, with '-' replaced by the lines of standard input."""
    for argument in arguments:
        if argument == '-':
            yield from (line.rstrip('\r\n') for line in sys.stdin if line.strip())
        else:
            yield argument


def print_text(result: dict[str, Any]) -> None:
    print(printable(result['image']))
    for row in result.get('top', ()):
        print(f"  {100 * row['probability']:5.1f} %  {printable(row['label'])}")
    if 'error' in result:
        print(f"  error: {printable(result['error'])}")


def cells(result: dict[str, Any], classes: int) -> list[Any]:
    """Cells of the CSV line of a file."""
    answers = [value for row in result.get('top', ()) for value in (as_cell(row['label']), row['probability'])]
    answers += [''] * (2 * classes - len(answers))
    return [as_cell(result['image']), *answers, as_cell(result.get('error', ''))]


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('predict', __doc__), PredictOptions)
    if options.model is None:
        labels = timm.get_pretrained_cfg(DEFAULT).label_names
        print(f'no --model is given: using {DEFAULT}, which knows only {", ".join(labels)}', file=sys.stderr)
    pass_any_name()
    failed = 0
    results = predict_files(options.model or DEFAULT, find_images(named(options.images)), options.device,
                            options.batch_size, options.classes, options.precision)
    table = csv.writer(sys.stdout, lineterminator='\n')
    if options.json:
        results = list(results)
        print(json.dumps(results, indent=2))
    if options.csv:
        numbers = ['', *(f'_{i}' for i in range(2, options.classes + 1))]
        table.writerow(['image', *(f'{name}{n}' for n in numbers for name in ('label', 'probability')), 'error'])
    for result in results:
        failed += 'error' in result
        if options.csv:
            table.writerow(cells(result, options.classes))
        elif not options.json:
            print_text(result)
    if failed:
        print(f"{counted(failed, 'file')} could not be read", file=sys.stderr)
    return 1 if failed else 0
