"""The machine's part in a run: device, number format, processes, time, and what is recorded of it."""
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
    """Settings of a run that belong to the machine and not to the result."""

    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """'cpu' or 'cuda'; the default is 'cuda' if torch finds a GPU."""
    workers: int = 0
    """Processes that read images."""
    image_memory: float = 1.
    """Memory per process for keeping decoded photographs between epochs, in GB. Photographs that do not fit are decoded
    again in every epoch; the result is the same."""
    on_bad: Literal['skip', 'fail'] = 'skip'
    """What to do with unreadable files: 'skip' leaves them out and lists them, 'fail' stops the run."""
    download: bool = False
    """Fetch the data set if it is missing."""
    resume: bool = False
    """Continue the run in the run directory."""
    time_budget: float = math.inf
    """Seconds after which the run stops, to be resumed."""
    progress: bool | None = None
    """Whether to show a progress bar; None shows it in a terminal, and not in a notebook."""

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f'workers is {self.workers}; it must be at least 0')
        if self.on_bad not in ('skip', 'fail'):
            raise ValueError(f"on_bad is {self.on_bad!r}; choose 'skip' or 'fail'")
        check_numbers({'image_memory': self.image_memory, 'time_budget': self.time_budget}, math.inf)

    def deadline(self) -> float:
        """`time.monotonic()` at which the time budget of a run that begins now ends."""
        return time.monotonic() + self.time_budget


def environment(device: str | torch.device = 'cpu') -> dict[str, str]:
    """Versions, commit, and the hardware behind `device`, which a figure depends on."""
    from .. import __version__
    cuda = torch.device(device).type == 'cuda'
    return {
        'wrn_timm': __version__, 'commit': _commit(), 'python': platform.python_version(),
        'torch': torch.__version__, 'torchvision': torchvision.__version__, 'timm': timm.__version__,
        'hardware': torch.cuda.get_device_name(device) if cuda else _processor(),
    }


def _processor() -> str:
    """Cores (and how many are used, if not all) and kind of the CPU, which some versions of torch cannot tell."""
    kind = torch.cpu.get_capabilities().get('cpu_name') if hasattr(torch.cpu, 'get_capabilities') else None
    cores = os.cpu_count() or 1
    used = torch.get_num_threads() * (dist.get_world_size() if dist.is_initialized() else 1)
    return f'{f"{used} of " if used < cores else ""}{cores} CPU cores{f" ({kind})" if kind else ""}'


def _commit() -> str:
    """Commit of the checkout that this package stands in, with `-dirty` where files were changed.

    A copy without its history is told by `$WRN_TIMM_COMMIT`.
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
    """CPU cores that this process may use: those that a scheduler or `taskset` gave it, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def fast_bfloat16(device: torch.device | str) -> bool:
    """Whether a device computes faster in bfloat16 than in float32.

    True for GPUs that have bfloat16, and for CPUs with the instructions avx512_bf16 or amx_bf16. Other CPUs imitate it,
    several times slower than float32. Versions of torch that cannot tell the CPU's instructions count as without.
    """
    device = torch.device(device)
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != 'cpu' or not hasattr(torch.cpu, 'get_capabilities'):
        return False
    instructions = torch.cpu.get_capabilities()
    return any(instructions.get(name, False) for name in ('avx512_bf16', 'amx_bf16'))


def resolve_precision(precision: Precision, device: torch.device | str) -> Literal['no', 'fp16', 'bf16']:
    """What 'auto' stands for on a device: bf16 where that is fast, else fp16 on GPUs and float32 ('no') on CPUs.

    Raises:
        ValueError: The precision is none of 'auto', 'no', 'fp16' and 'bf16', or is fp16 on a CPU.
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
    """Have GPUs compute float32 as such and not as TensorFloat-32, whatever the caller has set."""
    if not hasattr(torch.backends.cudnn, 'conv'):  # before torch 2.9
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
        return
    places = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = 'ieee'
        yield
    finally:
        for place, precision in zip(places, before, strict=True):
            place.fp32_precision = precision


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Have the caller's random numbers (Python's, numpy's, torch's) go on afterwards as if nothing had been drawn."""
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
    """The option of timm's `create_optimizer_v2` that updates in one pass over memory, where this optimizer has it."""
    return {'fused': True} if opt in _FUSED else {}
