"""The run directory: the files of a training run, written so that nothing saved before is lost.

    recipe.json     the resolved recipe, seed, versions and commit, and those that the run was resumed with
    history.csv     one row per epoch
    curves.png      loss, accuracy and learning rate
    train.log       the log messages, with the time
    checkpoints/    the last two, and the best on the held-out images if there are any
    weights/        the weights folder, once the run is finished
"""
from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import functools
import hashlib
import io
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..files import FolderLock, atomic_write, discard_partial, make_folder, write_json, writing
from ..names import is_utf8
from ..recipes import with_defaults
from ..schemas import environments, read_record
from ..weights import not_finite
from .curves import plot_history
from .machine import Machine, environment, hidden

__all__ = [
    'TIME_BUDGET', 'RunControl', 'RunDir', 'agreed', 'any_process', 'begun_with', 'check_begun', 'check_place',
    'config_of', 'has_begun', 'holds_checkpoint', 'is_best', 'planned_runs', 'progress_bar', 'run_each']

TIME_BUDGET = 'the time budget'  # as a reason to stop
_logger = logging.getLogger(__name__)

_RECIPE = 'recipe.json'
_FORMAT = 1  # of checkpoints; increased when older versions would misread new ones
_SHARE_OF_SAVING = 20  # at most one part in this many of the time goes into checkpoints
_SECONDS_BETWEEN_DRAWINGS = 30
_MADE = ('checkpoints', 'history.csv', 'weights', 'last', 'best', 'metrics.json')  # what training writes


def has_begun(out: str | Path) -> bool:
    """Whether a run directory, or one of its `seed-N` folders, holds anything that training wrote."""
    return any((run / name).exists() for run in (Path(out), *Path(out).glob('seed-*')) for name in _MADE)


def holds_checkpoint(out: str | Path) -> bool:
    """Whether a run directory, or one of its `seed-N` folders, holds a checkpoint to resume from."""
    return any(_newest_first(run / 'checkpoints') for run in (Path(out), *Path(out).glob('seed-*')))


def is_best(history: list[dict[str, float]]) -> bool:
    """Whether the last epoch has the highest held-out accuracy so far; False if nothing is held out."""
    held_out = [row['holdout_accuracy'] for row in history if 'holdout_accuracy' in row]
    return bool(held_out) and held_out[-1] >= max(held_out)


_Config = TypeVar('_Config')


def config_of(file: Path, key: str, kind: type[_Config]) -> _Config:
    """The settings under `key` in a `recipe.json`, as the dataclass `kind`; missing ones have their defaults.

    Raises:
        ValueError: The file is damaged, or a setting is unknown to this version or has an invalid value.
    """
    recipe = read_record(file)
    names = {f.name: None for f in dataclasses.fields(kind)}
    _check_known({key: recipe.get(key)}, {key: names}, recipe, file)
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in recipe.get(key, {}).items()})
    except (AttributeError, TypeError, ValueError) as e:
        raise ValueError(f'{file} is damaged: {e}. Restore it, or begin a new run') from e


def begun_with(out: Path, key: str, kind: type[_Config]) -> _Config:
    """The settings that a run, or the first of its `seed-N` runs, was started with; the defaults if there is none.

    Raises:
        Any error of `config_of`.
    """
    runs = [out, *sorted(out.glob('seed-*'), key=lambda p: (len(p.name), p.name))]
    recipe = next((run / _RECIPE for run in runs if (run / _RECIPE).is_file()), None)
    return config_of(recipe, key, kind) if recipe else kind()


def planned_runs(
        config: _Config,
        out: str | Path,
        seeds: int,
        resume: bool,
) -> list[tuple[_Config, Path, bool]]:
    """Plan a run for each of `seeds` seeds, starting with `config.seed`.

    Returns:
        For each run, its settings, its folder (`out`, or `out/seed-N` for several seeds) and whether to resume it.

    Raises:
        ValueError: `seeds` is less than 1, or it is 1 and `out` holds runs of several seeds to resume.
        FileExistsError: For several seeds, `out` holds a single run, or the results of several and `resume` is off.
    """
    if seeds < 1:
        raise ValueError(f'seeds is {seeds}; it must be at least 1')
    out = Path(out)
    if seeds == 1:
        if resume and not (out / _RECIPE).is_file() and any(out.glob(f'seed-*/{_RECIPE}')):
            raise ValueError(f'{out} holds runs of several seeds; give --seeds again, as many as before')
        return [(config, out, resume)]
    if (out / _RECIPE).is_file():
        raise FileExistsError(f'{out} holds a single run; choose another --out for several seeds')
    if (out / 'metrics.json').is_file() and not resume:
        raise FileExistsError(f'{out} already holds the results of several seeds; choose another --out, or continue '
                              f'with --resume')
    folders = [(seed, out / f'seed-{seed}') for seed in range(config.seed, config.seed + seeds)]
    return [(dataclasses.replace(config, seed=seed), folder, resume and (folder / _RECIPE).is_file())
            for seed, folder in folders]


def run_each(
        planned: list[tuple[_Config, Path, bool]],
        run: Callable[[_Config, Path, Machine], dict[str, Any] | None],
        machine: Machine,
) -> list[dict[str, Any]] | None:
    """Run the `planned_runs` in turn, skipping those that are finished.

    Args:
        planned: Runs from `planned_runs`.
        run: Called with the settings, the folder, and the machine with the remaining time budget; returns the metrics,
            or None if the run was stopped.
        machine: Machine settings; the time budget is that of all runs together.

    Returns:
        The metrics of each run, including finished ones; None if a run was stopped, or one of several ran out of time.
    """
    found, deadline, several = [], machine.deadline(), len(planned) > 1

    def can_go_on(metrics: dict[str, Any] | None) -> bool:
        return metrics is None or several and metrics.get('stopped') == TIME_BUDGET

    for config, folder, resume in planned:
        file = folder / 'metrics.json'
        metrics = json.loads(file.read_text(encoding='utf-8')) if several and resume and file.is_file() else None
        if can_go_on(metrics):
            left = dataclasses.replace(machine, resume=resume, time_budget=max(0., deadline - time.monotonic()))
            metrics = run(config, folder, left)
        if can_go_on(metrics):
            return None
        found.append(metrics)
    return found


def _check_known(there: dict[str, Any], known: dict[str, Any], recipe: dict[str, Any], file: Path) -> None:
    """Refuse settings that this version would ignore."""
    def unknown(there: dict[str, Any], known: dict[str, Any], prefix: str = '') -> Iterator[str]:
        for key, value in there.items():
            if key not in known:
                yield f'{prefix}{key}'
            elif isinstance(value, dict) and isinstance(known[key], dict):
                yield from unknown(value, known[key], f'{prefix}{key}.')

    if names := list(unknown(there, known)):
        from .. import __version__
        environment = recipe.get('environment')
        version = environment.get('wrn_timm') if isinstance(environment, dict) else None
        raise ValueError(f'{file} names settings that wrn_timm {__version__} does not know ({", ".join(names)}); it '
                         f'was written by version {version or "unknown"}: continue with that version')


def _newest_first(checkpoints: Path) -> list[Path]:
    return sorted(checkpoints.glob('epoch-*.pt'), reverse=True)


def _link(source: Path, to: Path) -> None:
    try:
        os.link(source, to)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(source, to)


def check_place(path: Path, wanted: int = 0) -> None:
    """Check that a folder, which need not exist yet, is writable and has enough free space.

    Args:
        path: The folder; nothing is left in it.
        wanted: Required free space, in bytes.

    Raises:
        OSError: The folder is not writable, or there is too little free space.
    """
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as e:
        raise OSError(f'{path} cannot be written to ({there}: {e.strerror}); choose another --out') from e
    if free < wanted:
        raise OSError(f'the weights and checkpoints of a run take up to {wanted / 1e6:.0f} MB, but only '
                      f'{free / 1e6:.0f} MB are free at {there}; free some space or choose another --out')


def check_begun(path: str | Path) -> None:
    """Check that a run directory holds a run to resume.

    Raises:
        FileNotFoundError: There is no run.
    """
    if not (Path(path) / _RECIPE).is_file():
        raise FileNotFoundError(f'{path} holds no run to resume')


class RunDir:
    """Opens or creates a run directory, locked for this process as long as the object lives.

    Args:
        path: The directory.
        settings: Settings that determine the result (recipe, seed, data), stored in `recipe.json`. A dataclass field
            that is missing in the `recipe.json` of an older version counts as its default.
        resume: Continue the existing run.
        write: Whether this process writes files; only the first process of a run does.
        device: Device of the run, for `recipe.json`.
        notes: More entries for the `environment` in `recipe.json`, such as the precision.

    Raises:
        BlockingIOError: Another process has it open.
        FileExistsError: It holds a run and `resume` is off.
        FileNotFoundError: `resume` is on and there is no run.
        ValueError: The path is not UTF-8; or `resume` is on, and the settings differ from those of the run (the message
            names the fields), or its `recipe.json` is damaged or has settings unknown to this version.
    """

    def __init__(
            self,
            path: str | Path,
            settings: dict[str, Any],
            resume: bool = False,
            write: bool = True,
            device: str | torch.device = 'cpu',
            notes: dict[str, str] | None = None,
    ):
        self.path = Path(path)
        self.recipe_file = self.path / _RECIPE
        self.checkpoints = self.path / 'checkpoints'
        self.write = write
        if not write:
            return
        self.check(self.path, settings, resume)
        make_folder(self.path)
        self._lock = FolderLock(self.path)
        self.check(self.path, settings, resume)  # another process may have run in between
        for folder in (self.path, self.checkpoints):
            discard_partial(folder)  # partial checkpoints of a killed run
        self._here = {**environment(device), **(notes or {})}
        if not has_begun(self.path):
            write_json(self.recipe_file, {**_plain(settings), 'environment': self._here})

    @staticmethod
    def check(path: str | Path, settings: dict[str, Any], resume: bool = False) -> None:
        """Raise the errors of opening the run directory, without creating it: a check before longer work."""
        if not is_utf8(path):
            raise ValueError(f'{path} is not UTF-8, which safetensors cannot open; choose another --out')
        recipe_file = Path(path) / _RECIPE
        if not resume:
            if has_begun(path):  # a run that failed before training has none of this
                raise FileExistsError(f'{path} already holds a run; choose another --out, or continue with --resume')
            return
        check_begun(path)
        there, now = read_record(recipe_file), _plain(settings)
        _check_known(there, now | {'environment': None, 'resumed': None}, there, recipe_file)
        for key, value in settings.items():
            if dataclasses.is_dataclass(value) and isinstance(there.get(key), dict):
                there[key] = with_defaults(there[key], type(value))
        if differ := _differences(there, now):
            raise ValueError(f'{path} was started with other settings ({", ".join(differ)}); '
                             f'resume with the same, or choose another --out')

    def log(self, message: str, *args: Any, level: int = logging.INFO) -> None:
        """Log a message and append it to `train.log`."""
        if not self.write:
            return
        _logger.log(level, message, *args)
        log = self.path / 'train.log'
        with writing(log), open(log, 'a', encoding='utf-8', errors='surrogateescape') as f:
            f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {message % args}\n")

    def save(self, state: dict[str, Any], history: list[dict[str, float]], draw: bool = True) -> None:
        """Write a checkpoint, delete all but the last two and the best, and write `history.csv` and `curves.png`.

        Args:
            state: Tensors, numbers and containers of them, with `epoch` and `step`; `load_checkpoint` returns it.
            history: One row per epoch so far; if rows have `holdout_accuracy`, the best epoch is kept as `best.pt`.
            draw: Whether to draw `curves.png`, which can take longer than a short epoch.

        Raises:
            FloatingPointError: A weight is not finite.
            OSError: The checkpoint cannot be written.
        """
        if not self.write:
            return
        self._note_environment()
        for weights in (state.get('model'), state.get('ema')):
            if name := not_finite(weights or {}):
                raise FloatingPointError(
                    f'{name} is no longer finite after epoch {state["epoch"]}, step {state["step"]}; the checkpoints '
                    f'in {self.checkpoints} are not affected. Try a smaller learning rate.')
        if history and state['step'] == 0:  # before the checkpoint: a resumed run does not write them again
            self.write_history(history, draw)
        make_folder(self.checkpoints)
        newest = self.checkpoints / f"epoch-{state['epoch']:04d}-step-{state['step']:06d}.pt"
        state = {**state, 'format': _FORMAT, 'fingerprint': self._fingerprint}
        try:
            atomic_write(newest, lambda p: _save(state, p))
        except OSError as e:
            raise OSError(f'{e}. Earlier files are intact: free some space and continue with --resume') from e
        if state['step'] == 0 and is_best(history):
            self._keep_best(newest)
        for old in _newest_first(self.checkpoints)[2:]:
            old.unlink()

    def _note_environment(self) -> None:
        """Add where this process trains to `recipe.json`, if the run has been elsewhere."""
        record = read_record(self.recipe_file)
        if self._here not in (known := environments(record)):
            write_json(self.recipe_file, {**record, 'resumed': [*known[1:], self._here]})

    @functools.cached_property
    def _fingerprint(self) -> str:
        """Hash of the settings in `recipe.json`, which ties a checkpoint to its run."""
        recipe = {k: v for k, v in read_record(self.recipe_file).items() if k not in ('environment', 'resumed')}
        return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The last intact checkpoint, on the CPU; None if there are no checkpoints.

        Damaged ones are reported, renamed to `*.damaged` and skipped.

        Raises:
            OSError: A checkpoint cannot be read for reasons other than damage.
            ValueError: All checkpoints are damaged, or the last one is from another run or a later version.
        """
        damaged = []
        for path in _newest_first(self.checkpoints):
            found = self._read(path)
            if found is None:
                damaged.append(path)
                continue
            if self.write:
                for other in damaged:  # else it would count as one of the last two
                    os.replace(other, other.with_suffix('.damaged'))
                if found['step'] == 0 and is_best(found['history']):  # the run may have been killed before this
                    self._keep_best(path)
            return found
        if damaged:
            raise ValueError(f'every checkpoint in {self.checkpoints} is damaged; start again with another --out')
        return None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A checkpoint of this run, or None if it is damaged."""
        try:
            found = _load_whole(path)
        except zipfile.BadZipFile as e:
            self.log('%s is damaged (%s); going back to the previous one', path, e, level=logging.WARNING)
            return None
        if not isinstance(found, dict) or not {'epoch', 'step', 'history'} <= found.keys():
            raise ValueError(f'{path} is not a checkpoint of a training run; move it away')
        if found.get('format', _FORMAT) > _FORMAT:
            raise ValueError(f'{path} was written by a later version of wrn_timm; continue with that version')
        if found.get('fingerprint', self._fingerprint) != self._fingerprint:  # older versions wrote none
            raise ValueError(f'{path} does not belong to {self.recipe_file}: the settings differ. Move it away, or '
                             f'restore the recipe.json that it belongs to')
        return found

    def _keep_best(self, checkpoint: Path) -> None:
        atomic_write(self.checkpoints / 'best.pt', lambda p: _link(checkpoint, p))

    def load_best(self) -> dict[str, Any] | None:
        """The checkpoint with the highest held-out accuracy, on the CPU; None if there is none or it is damaged.

        Raises:
            Any error of `load_checkpoint`.
        """
        path = self.checkpoints / 'best.pt'
        return self._read(path) if path.is_file() else None

    def write_history(self, history: list[dict[str, float]], draw: bool = True) -> None:
        """Write `history.csv` and, with `draw`, `curves.png`."""
        if not self.write:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(history[-1]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(history)
        atomic_write(self.path / 'history.csv', text.getvalue())
        if draw:
            atomic_write(self.path / 'curves.png', lambda p: plot_history(history, p))


def agreed(reason: str) -> str:
    """The first reason to stop that any process has; '' if none has one."""
    if not dist.is_initialized():
        return reason
    reasons = [''] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    return next(filter(None, reasons), '')


class RunControl:
    """Decides when a run saves and when it stops, for every kind of training.

    As a context manager, it treats SIGTERM and the first Ctrl-C as a request to stop after the current step; a second
    one acts at once.

    Args:
        run: Run directory.
        deadline: The `time.monotonic()` at which the time budget ends.
        save_every: Seconds between checkpoints; more if they are slow to write, so that they take at most a twentieth
            of the time. With 0, a checkpoint is always due.
    """

    def __init__(self, run: RunDir, deadline: float = math.inf, save_every: float = 0.):
        self.run, self.deadline, self.save_every = run, deadline, save_every
        self._asked, self._handlers = '', {}
        self._saved, self._saving, self._drawn = time.monotonic(), 0., -math.inf

    def __enter__(self) -> RunControl:
        def note(number: int, frame: Any) -> None:
            self._asked = signal.Signals(number).name
            signal.signal(number, self._handlers[number])

        with contextlib.suppress(ValueError):  # signals can be handled only in the main thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @property
    def signalled(self) -> bool:
        """Whether a signal has asked the run to stop."""
        return bool(self._asked)

    def reason_to_stop(self, ahead: float = 0.) -> str:
        """The signal that stops the run, or 'the time budget' if the next `ahead` seconds exceed it; '' to continue."""
        return self._asked or (TIME_BUDGET if time.monotonic() + ahead > self.deadline else '')

    @property
    def save_is_due(self) -> bool:
        """Whether it is time for another checkpoint."""
        return not self.save_every or (
            time.monotonic() - self._saved > self.save_every + _SHARE_OF_SAVING * self._saving)

    def save(self, state: dict[str, Any], history: list[dict[str, float]]) -> None:
        """Write a checkpoint (`RunDir.save`), drawing the curves at most every 30 seconds."""
        began = time.monotonic()
        draw = began - self._drawn > _SECONDS_BETWEEN_DRAWINGS
        self.run.save(state, history, draw)
        self._saved = time.monotonic()
        self._saving = self._saved - began
        self._drawn = began if draw else self._drawn

    def check_finite(self, value: float, what: str, epoch: int) -> None:
        """Stop a run whose loss is NaN or infinite.

        Raises:
            FloatingPointError: The value is not finite.
        """
        if not math.isfinite(value):
            raise FloatingPointError(
                f'{what} is {value} in epoch {epoch}; the checkpoints in {self.run.checkpoints} are not affected. Try '
                f'a smaller learning rate (--lr)')

    def log_stop(self, reason: str) -> None:
        """Log why the run stopped, and how to continue it."""
        if newest := next(iter(_newest_first(self.run.checkpoints)), None):
            epoch, step = map(int, newest.stem.split('-')[1::2])
            self.run.log('stopped by %s after epoch %d%s; continue with --resume', reason, epoch,
                         f', step {step}' if step else '')
        else:
            self.run.log('stopped by %s before anything was saved; to begin again, run the same command', reason)


@contextlib.contextmanager
def progress_bar(total: int, done: int = 0, show: bool | None = None) -> Iterator[tqdm]:
    """A progress bar over the steps of a run; log messages are printed above it.

    Args:
        total: Number of steps.
        done: Steps done before the run was resumed.
        show: As in `Machine.progress`.
    """
    with tqdm(total=total, initial=done, unit='step', leave=False, smoothing=0.05, disable=hidden(show)) as bar, \
            logging_redirect_tqdm():
        yield bar


def any_process(*flags: bool, device: torch.device | str = 'cpu') -> tuple[bool, ...]:
    """Whether each flag is set in any process of the run; all processes must call this at the same point."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.float32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return tuple(map(bool, raised.tolist()))


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as e:  # torch's error for a full disk
        raise OSError(str(e)) from e


def _load_whole(path: Path) -> Any:
    """Load a file of `torch.save` to the CPU, after checking the zip's checksums, which torch does not do.

    Raises:
        BadZipFile: The file is damaged.
        OSError, MemoryError: The file cannot be read for another reason.
    """
    open(path, 'rb').close()  # raises OSError if there is no permission to read it
    try:
        with zipfile.ZipFile(path) as archive:
            if entry := archive.testzip():
                raise zipfile.BadZipFile(f'the checksum of {entry} does not match')
        return torch.load(path, map_location='cpu', weights_only=True)
    except MemoryError:
        raise
    except Exception as e:  # damaged zips and pickles raise almost anything, including EINVAL for a negative offset
        if (isinstance(e, OSError) and e.errno != errno.EINVAL) or 'DefaultCPUAllocator' in str(e):
            raise
        raise zipfile.BadZipFile(f'{type(e).__name__}: {str(e).partition(chr(10))[0]}') from e


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings after a round trip through JSON."""
    return json.loads(json.dumps(settings, default=dataclasses.asdict))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = '') -> list[str]:
    """Dotted names of the settings of `new` that differ in `old`, with both values."""
    out = []
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            out += _differences(old[key], value, f'{prefix}{key}.')
        elif old.get(key) != value:
            out.append(f'{prefix}{key}: was {old.get(key)}, now {value}')
    return out
