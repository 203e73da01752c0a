"""What every command does alike: an error is one line on standard error, and where it arose is shown on demand."""
from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from .names import printable

__all__ = ['TRACEBACK_HELP', 'reports_errors', 'show_error']

TRACEBACK_HELP = 'show where an error arose'
_EXPECTED = (FloatingPointError, ImportError, OSError, RuntimeError, ValueError)  # whose messages are for the user


def show_error(error: Exception) -> None:
    """Print an error as a line; one that nobody foresaw with its kind, and the file that was at hand."""
    if isinstance(error, _EXPECTED):
        print(f'error: {printable(error, lines=True)}', file=sys.stderr)
        return
    file = _file_at_hand(error)
    said = f'{type(error).__name__}{f": {error}" if str(error) else ""}{f", at {file}" if file else ""}'
    print(f'error: {printable(said, lines=True)}; --traceback shows where it arose', file=sys.stderr)


def _file_at_hand(error: Exception) -> str:
    """The file that the innermost function knew of which knew of any; '' where none did."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
                return os.fspath(value)
    return ''


def reports_errors(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str] | None], int]:
    """Have a `main` print its errors by `show_error` and return 1, unless `--traceback` is among its arguments."""
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        try:
            code = main(argv)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # who reads it has read enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # 128 + SIGPIPE, as a shell has it of other programs
        except Exception as e:
            if '--traceback' in argv:
                raise
            show_error(e)
            return 1

    return run
