"""Parts that the reports of classifiers and detectors share: figures, tables and the HTML page."""
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

_NARROWEST = 640  # pixels; narrower, the text of a figure would be too small, so it scrolls
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
    """A name, shortened to fit into a figure."""
    name = printable(' '.join(name.split()))
    return name if len(name) <= most else f'{name[:most - 1]}…'


def set_title(axis: Any, text: str, colour: str) -> None:
    """Set the title of a photograph literally: `$` does not start a formula."""
    axis.set_title(text, parse_math=False, fontsize=9, color=colour)


def whole_path(name: str) -> str:
    """The absolute path of an existing file; other names, as of images of named data sets, are unchanged."""
    return os.path.abspath(name) if os.path.lexists(name) else name


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[tuple[str, Markup, tuple[Any, ...]]]:
    """Name, HTML attributes and cells of each column; numbers are right-aligned, and a `file` is not wrapped."""
    columns = []
    for name, cells in zip(header, zip(*rows, strict=True), strict=bool(rows)):
        number = all(cell is None or isinstance(cell, (int, float)) for cell in cells)
        kind = 'path' if name == 'file' else 'number' if number else ''
        columns.append((name, Markup(f' class="{kind}"' if kind else ''), cells))
    return columns


_PICTURES = ('curves', 'confusion', 'wrong', 'predictions', 'precision_recall', 'best', 'worst')


def _picture(file: Path) -> dict[str, Any]:
    """Minimum width of a figure on the page, in pixels, and its bytes in base64."""
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
    """Write `report.html` into a run directory, with those of `_PICTURES` that exist.

    Args:
        folder: Run directory, which holds the figures.
        template: File in `wrn_timm/templates` that calls `page` from `report_parts.html`.
        command: Command that repeats the run.
        made_with: Names and values of the settings and of the environment.
        content: Other variables of the template; `page` needs `title`, `outcome`, `curves` and `notes`.
    """
    page = _TEMPLATES.get_template(template).render(
        pictures={name: _picture(file) for name in _PICTURES if (file := folder / f'{name}.png').is_file()},
        command=printable(command),
        made_with=[*made_with, ('date', time.strftime('%Y-%m-%d %H:%M'))], **content)
    atomic_write(folder / 'report.html', page.encode(errors='replace').decode())  # file names can hold any bytes
