"""Display of durations and of file and class names, which can be almost any bytes."""
from __future__ import annotations

import logging
import re
from collections.abc import Sequence

__all__ = ['as_cell', 'counted', 'duration', 'from_cell', 'is_utf8', 'printable', 'some', 'terminal_handler']

# Control characters, line breaks, changes of text direction, and bytes that are not UTF-8.
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]')
_FORMULA = ('=', '+', '-', '@', '\t', '\r')


def printable(text: object, lines: bool = False) -> str:
    """A text with unprintable characters escaped as in Python: `\\x1b`, `\\n`, `\\udce9`.

    Args:
        text: Any object; converted by `str`.
        lines: Keep newlines and tabs, for messages of several lines.
    """
    return _UNPRINTABLE.sub(
        lambda found: found[0] if lines and found[0] in '\n\t' else ascii(found[0])[1:-1], str(text))


def is_utf8(path: object) -> bool:
    """Whether a path is valid UTF-8; safetensors cannot open others."""
    return re.search('[\ud800-\udfff]', str(path)) is None


class _PrintableLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def terminal_handler() -> logging.Handler:
    """A handler that prints log messages to standard error, without prefix and escaped as by `printable`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableLines())  # tqdm would replace a subclass of StreamHandler
    return handler


def as_cell(name: str) -> str:
    """A name as a cell of a CSV file, with an apostrophe in front if a spreadsheet would take it for a formula.

    Numbers are kept as they are. `from_cell` is the inverse.
    """
    return f"'{name}" if _is_formula(name) else name


def from_cell(cell: str) -> str:
    """The name from a cell written by `as_cell`."""
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(text: str) -> bool:
    text = text.lstrip("'")
    try:
        float(text)
        return False
    except ValueError:
        return text.startswith(_FORMULA)


def duration(seconds: float) -> str:
    """Duration in words: seconds, minutes or hours."""
    for limit, unit, name in ((90, 1, 'seconds'), (90 * 60, 60, 'minutes')):
        if seconds < limit:
            return '1 second' if round(seconds) == 1 else f'{seconds / unit:.0f} {name}'
    return f'{seconds / 3600:.1f} hours'


def counted(n: int, noun: str) -> str:
    """A number with its noun: `1 file`, `1,200 files`."""
    return f'{n:,} {noun}{"s" * (n != 1)}'


def some(names: Sequence[str], separator: str = ', ') -> str:
    """First five names, and the number of further ones."""
    more = f'{separator if separator == "; " else " "}and {len(names) - 5} more' if len(names) > 5 else ''
    return separator.join(names[:5]) + more
