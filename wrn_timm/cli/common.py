"""Shared parts of the commands: options, one-line errors on standard error, exit codes and logging."""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import math
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..names import printable, terminal_handler
from ..recipes import check_numbers
from ..train.machine import Machine
from ..train.run import has_begun
from . import what_to_install
from .options import option

__all__ = [
    'STOPPED', 'OnDevice', 'Options', 'Training', 'is_main_process', 'log_to_terminal', 'machine_of', 'reports_errors',
    'resumable', 'show_error']

STOPPED = 130  # 128 + SIGINT: exit code of a command that was stopped early
_EXPECTED = (FloatingPointError, ImportError, OSError, RuntimeError, ValueError)  # with messages for the user


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""
    traceback: bool = False
    """Print the full traceback of an error."""

    def __post_init__(self):
        check_numbers(vars(self), math.inf)
        for name, least in (('batch_size', 1), ('seeds', 1), ('top_k', 1), ('workers', 0)):
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise ValueError(f'{name} is {value}; it must be at least {least}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnDevice(Options):
    """Options of commands that compute."""
    device: str = Machine.device
    """Device to compute on: 'cpu' or 'cuda'."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(OnDevice):
    """Options of commands that train."""
    out: str
    """Run directory."""
    resume: bool = False
    """Continue the run in --out."""
    time_budget: float = option(math.inf, 'SECONDS')
    """Seconds after which the run stops; --resume continues it."""


_Machine = TypeVar('_Machine', bound=Machine)


def machine_of(options: OnDevice, kind: type[_Machine], **more: Any) -> _Machine:
    """Build the machine settings from the command-line options and `more`."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(options).items() if name in names}, **more)


def show_error(error: Exception) -> None:
    """Print an error as one line; an unexpected error with its type and the file that was being processed."""
    if isinstance(error, _EXPECTED):
        print(f'error: {printable(error, lines=True)}', file=sys.stderr)
        return
    file = _file_at_hand(error)
    said = f'{type(error).__name__}{f": {error}" if str(error) else ""}{f", at {file}" if file else ""}'
    print(f'error: {printable(said, lines=True)}; --traceback prints the full traceback', file=sys.stderr)


def _file_at_hand(error: Exception) -> str:
    """File that was being processed: the first in the local variables, innermost frame first; '' if none."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, (str, os.PathLike)) and os.path.isfile(value):
                return os.fspath(value)
    return ''


def reports_errors(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str] | None], int]:
    """Make a `main` print its errors with `show_error` and return 1, unless `--traceback` is given.

    After Ctrl-C or SIGTERM it returns 130.
    """
    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        try:
            with _sigterm_as_ctrl_c():
                code = main(argv)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as e:
            print(str(e) or 'stopped', file=sys.stderr)
            return STOPPED
        except BrokenPipeError:  # the reader closed the pipe, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141  # 128 + SIGPIPE, as shells report it
        except Exception as e:
            if '--traceback' in argv:
                raise
            if isinstance(e, ModuleNotFoundError) and e.name:
                e = ImportError(what_to_install(e, main.__module__.rpartition('.')[2]))
            show_error(e)
            return 1

    return run


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Handle SIGTERM, by which clusters stop jobs, like Ctrl-C."""
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # only the main thread can handle signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def pass_any_name() -> None:
    """Let standard input and output carry any file name: all of Unicode, and bytes that are not UTF-8."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='surrogateescape')
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')


@contextlib.contextmanager
def resumable(out: str) -> Iterator[None]:
    """On Ctrl-C, say whether the run in `out` can be resumed."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            'stopped; continue with --resume' if has_begun(out) else
            'stopped before anything was saved; to begin again, run the same command') from None


def is_main_process() -> bool:
    """Whether this is the main process, the only one of those started by `torchrun` that writes."""
    return os.environ.get('RANK', '0') == '0'


def log_to_terminal(level: int = logging.INFO) -> None:
    """Print log messages of at least this level without prefixes; from timm, only warnings."""
    logging.basicConfig(handlers=[terminal_handler()], level=level, force=True)
    logging.getLogger('timm').setLevel(logging.WARNING)
