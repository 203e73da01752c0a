"""The machine of a run: device, precision, processes, time budget, and the recorded environment."""
from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import torch.distributed as dist
import torchvision

from ..recipes import Precision, check_numbers

__all__ = ['Machine', 'autocast', 'environment', 'fast_bfloat16', 'fused', 'hidden', 'in_float32',
           'kept_random_state', 'resolve_precision', 'usable_cores']


@dataclasses.dataclass(frozen=True)
class Machine:
    """Settings of a run that concern the machine, not the result."""

    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """'cpu' or 'cuda'; the default is 'cuda' if torch finds a GPU."""
    workers: int = 0
    """Number of processes that read images. With another number, augmentation draws other random numbers."""
    image_memory: float = 1.
    """Memory per process for keeping decoded photographs between epochs, in GB. Photographs that do not fit are decoded
    again in every epoch; the result is the same."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with unreadable files: 'skip' leaves them out and lists them, 'fail' stops the run."""
    download: bool = False
    """Download the data set if it is missing."""
    resume: bool = False
    """Continue the run in the run directory."""
    time_budget: float = math.inf
    """Seconds after which the run stops; it can be resumed."""
    progress: bool | None = None
    """Whether to show a progress bar; None shows it only in a terminal, not in a notebook."""

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f'workers is {self.workers}; it must be at least 0')
        if self.on_bad not in ('skip', 'fail'):
            raise ValueError(f"on_bad is {self.on_bad!r}; choose 'skip' or 'fail'")
        check_numbers({'image_memory': self.image_memory, 'time_budget': self.time_budget}, math.inf)

    def deadline(self) -> float:
        """The `time.monotonic()` at which the time budget ends if the run starts now."""
        return time.monotonic() + self.time_budget


def environment(device: str | torch.device = 'cpu') -> dict[str, str]:
    """Versions, commit and hardware of `device`, on which results depend."""
    from .. import __version__
    gpu = torch.cuda.get_device_name(device) if torch.device(device).type == 'cuda' else ''
    return {
        'wrn_timm': __version__, 'commit': _commit(), 'python': platform.python_version(),
        'torch': torch.__version__, 'torchvision': torchvision.__version__, 'timm': timm.__version__,
        'hardware': (f'{_processes()} x {gpu}' if _processes() > 1 else gpu) if gpu else _processor(),
    }


def _processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _processor() -> str:
    """Number of CPU cores (and how many are used, if not all), and the CPU model if this version of torch knows it."""
    kind = torch.cpu.get_capabilities().get('cpu_name') if hasattr(torch.cpu, 'get_capabilities') else None
    cores = os.cpu_count() or 1
    used = torch.get_num_threads() * _processes()
    return f'{f"{used} of " if used < cores else ""}{cores} CPU cores{f" ({kind})" if kind else ""}'


def _commit() -> str:
    """Commit of the checkout that holds this package, with `-dirty` if files were changed.

    `$WRN_TIMM_COMMIT` overrides it, for copies without their history.
    """
    if given := os.environ.get('WRN_TIMM_COMMIT'):
        return given
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():  # installed: a repository further up would be another project's
        return 'unknown'
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=40', '--exclude=*']
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.strip() or 'unknown'
    except OSError:  # no git on this machine
        return 'unknown'


def usable_cores() -> int:
    """Number of CPU cores that a scheduler or `taskset` lets this process use, or of all if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether a device computes faster in bfloat16 than in float32.

    True for GPUs that support bfloat16, and for CPUs with avx512_bf16 or amx_bf16 instructions. Other CPUs emulate it,
    several times slower than float32. Always False for CPUs if this version of torch does not report instructions.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != 'cpu' or not hasattr(torch.cpu, 'get_capabilities'):
        return False
    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in ('avx512_bf16', 'amx_bf16'))


def resolve_precision(precision: Precision, device: torch.device | str) -> Literal['no', 'fp16', 'bf16']:
    """Resolve 'auto' for a device: bf16 if it is fast there, else fp16 on GPUs and float32 ('no') on CPUs.

    Raises:
        ValueError: The precision is none of 'auto', 'no', 'fp16' and 'bf16', or it is 'fp16' on a CPU.
    """
    device = torch.device(device)
    if precision not in ('auto', 'no', 'fp16', 'bf16'):
        raise ValueError(f"precision {precision!r} is unknown; choose 'auto', 'no' (float32), 'fp16' or 'bf16'")
    if precision == 'fp16' and device.type == 'cpu':
        raise ValueError("precision 'fp16' is for GPUs; choose 'bf16' or 'no' (float32) on a CPU")
    if precision != 'auto':
        return precision
    return 'bf16' if fast_bfloat16(device) else 'fp16' if device.type == 'cuda' else 'no'


def autocast(device: torch.device | str, precision: Literal['no', 'fp16', 'bf16']) -> torch.autocast:
    """A context in which networks on `device` compute in `precision`."""
    dtype = torch.float16 if precision == 'fp16' else torch.bfloat16
    return torch.autocast(torch.device(device).type, dtype, enabled=precision != 'no')


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """A context in which GPUs do not use TensorFloat-32 for float32, whatever the caller has set."""
    if hasattr(torch.backends.cudnn, 'conv'):
        name, exact = 'fp32_precision', 'ieee'
        places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    else:  # before torch 2.9
        name, exact = 'allow_tf32', False
        places = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the caller's random number generators (Python, NumPy, PyTorch) on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def hidden(progress: bool | None) -> bool | None:
    """tqdm's `disable` for `Machine.progress`."""
    return None if progress is None else not progress


_FUSED = ('sgd', 'momentum', 'nesterov', 'adam', 'adamw')


def fused(opt: str) -> dict[str, bool]:
    """The argument of timm's `create_optimizer_v2` for a fused optimizer, if `opt` has one."""
    return {'fused': True} if opt in _FUSED else {}
