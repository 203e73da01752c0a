"""What the reports of classifiers and of detectors share: pictures and tables, and the page that holds them."""
from __future__ import annotations

import base64
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from ..files import atomic_write
from ..names import printable

__all__ = ['save_figure', 'set_title', 'short_name', 'table', 'whole_path', 'write_page']

_NARROWEST = 640  # pixels of a picture, below which its text is too small: it is scrolled
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('wrn_timm'), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined)
_TEMPLATES.filters['shown'] = lambda cell: (
    '-' if cell is None else f'{cell:.1f}' if isinstance(cell, float) else str(cell))


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; characters that the font lacks are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # a class name in another script
        atomic_write(path, lambda p: figure.savefig(p, dpi=100))


def short_name(name: str, most: int = 24) -> str:
    """A name that leaves room in a picture for the picture."""
    name = printable(' '.join(name.split()))
    return name if len(name) <= most else f'{name[:most - 1]}…'


def set_title(axis: Any, text: str, colour: str) -> None:
    """The title of a photograph, as it is written: `$` begins no formula."""
    axis.set_title(text, parse_math=False, fontsize=9, color=colour)


def whole_path(name: str) -> str:
    """A path that opens from any folder; the image of a named data set has none."""
    return os.path.abspath(name) if os.path.lexists(name) else name


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[tuple[str, Markup, tuple[Any, ...]]]:
    """Name, attributes and cells of each column: numbers are set to the right, and a `file` is not broken."""
    columns = []
    for name, cells in zip(header, zip(*rows, strict=True), strict=bool(rows)):
        number = all(cell is None or isinstance(cell, (int, float)) for cell in cells)
        kind = 'path' if name == 'file' else 'number' if number else ''
        columns.append((name, Markup(f' class="{kind}"' if kind else ''), cells))
    return columns


_PICTURES = ('curves', 'confusion', 'wrong', 'predictions', 'precision_recall', 'best', 'worst')


def _picture(file: Path) -> dict[str, Any]:
    """The width in pixels that a picture has at least on a page, and its bytes in base64."""
    with Image.open(file) as image:
        width = min(image.width, _NARROWEST)
    return {'width': width, 'data': base64.b64encode(file.read_bytes()).decode()}


def write_page(
        folder: Path,
        template: str,
        command: str,
        made_with: Iterable[tuple[str, Any]],
        **content: Any,
) -> None:
    """Write `report.html` into a run directory, with those of `_PICTURES` that are there.

    Args:
        folder: Its pictures can be shown by their names.
        template: File of `wrn_timm/templates`, which calls `page` of `report_parts.html`.
        command: Repeats the run.
        made_with: Names and values of the settings and of the environment.
        content: What the template shows; `page` needs `title`, `outcome`, `curves` and `notes`.
    """
    page = _TEMPLATES.get_template(template).render(
        pictures={name: _picture(file) for name in _PICTURES if (file := folder / f'{name}.png').is_file()},
        command=printable(command),
        made_with=[*made_with, ('date', time.strftime('%Y-%m-%d %H:%M'))], **content)
    atomic_write(folder / 'report.html', page.encode(errors='replace').decode())  # names of files can be any bytes
