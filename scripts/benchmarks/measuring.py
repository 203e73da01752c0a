"""Time contestants in turn, and count the operations of a network. Used by all sections."""
from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, Literal

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.cli.common import OnDevice
from wrn_timm.data.bundled import sample
from wrn_timm.export import alternate
from wrn_timm.recipes import FinetuneConfig

CLASSES = 10
BFLOAT16 = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith('AVX512')

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command(OnDevice):
    """Options of the measurements."""
    models: tuple[str, ...] = ('wrn16_4', 'wrn28_10', 'wrn50_2')
    """Networks to measure in evaluate, train, latency, growth, scale and start."""
    batch: int = 0
    """Images per call, except in latency, head and finetune; 0 takes as many as about two seconds allow, at most 128
    (1024 on a GPU)."""
    size: int = 0
    """Side of the images in pixels; 0 takes the network's default."""
    rounds: int = 7
    """Number of measurements per contestant (latency: eight times as many)."""
    data: str = ''
    """cifar10:DIR for int8; for head and finetune as in finetune.py, by default the bundled sample."""
    workers: int = 0
    """Number of processes that load photographs."""
    image_memory: float = 1.
    """Memory in GB for decoded photographs in head and finetune."""
    compile: bool = True
    """Also measure compiled networks."""
    dtypes: tuple[Literal['float32', 'bfloat16'], ...] = ('float32', 'bfloat16') if BFLOAT16 else ('float32',)
    """Data types of inference; by default also bfloat16, except on CPUs without AVX-512, where it takes minutes."""
    memory: bool = True
    """Measure the peak memory of training, in a separate process for each contestant."""
    json: bool = False
    """Print JSON instead of tables."""
    config: FinetuneConfig = FinetuneConfig()  # of head and finetune

    @property
    def photographs(self) -> str:
        """Source of the photographs for head and finetune."""
        return self.data or str(sample())


@dataclasses.dataclass
class Case:
    """Contestants that did the same work. Ratios are relative to the first."""
    name: str
    rows: list[Row]


def summarise(seconds: dict[str, list[float]], items: int | Mapping[str, int] = 1) -> list[Row]:
    """Return a row per contestant: images/s, and median and quartiles of the speed relative to the first one.

    Args:
        seconds: Seconds of each contestant's calls, one per round.
        items: Images per call.
    """
    rows = []
    for name, own in seconds.items():
        each = {n: items[n] if isinstance(items, Mapping) else items for n in seconds}
        first = next(iter(seconds))
        ratios = [(a / each[first]) / (b / each[name]) for a, b in zip(seconds[first], own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        rows.append({
            'name': name, 'ratio': statistics.median(ratios), 'ratio_low': low, 'ratio_high': high,
            'images_per_second': each[name] / statistics.median(own), 'ms': 1000 * statistics.median(own)})
    return rows


def measure(
        contestants: dict[str, Call | str],
        rounds: int,
        device: str,
        items: int | Mapping[str, int] = 1,
) -> tuple[list[Row], dict[str, list[float]]]:
    """Time contestants in turn. Returns a row for each, and the seconds of each round.

    A contestant that is a string is absent; the string says why.
    """
    seconds = alternate({n: c for n, c in contestants.items() if callable(c)}, rounds, device)
    rows = {row['name']: row for row in summarise(seconds, items)}
    return [rows.get(n) or {'name': n, 'absent': c} for n, c in contestants.items()], seconds


def without(column: str, rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != column} for row in rows]


COLUMNS = {  # formats of the printed columns; others appear only in the JSON output
    'ratio': '{:.2f}', 'images_per_second': '{:,.1f}', 'ms': '{:,.1f}', 'p95_ms': '{:,.1f}', 'matmul': '{:.0%}',
    'logits_differ': '{:.0e}', 'peak_mb': '{:,.0f}', 'memory': '{:.2f}', 'first_step_s': '{:.1f}', 'linear': '{:.2f}',
    'ms_over': '{:,.1f}', 'accuracy': '{:.2f}', 'points': '{:+.2f}', 'seconds': '{:.1f}', 'share_of_slower': '{:.0%}',
    'share_of_serial': '{:.0%}'}


def show(section: str, case: Case) -> None:
    """Print a case: its columns, ratio first, and the name of each contestant."""
    columns = [c for c in COLUMNS if any(c in row for row in case.rows)]
    cells = [[c.replace('_per_second', '/s').replace('_', ' ') for c in columns]]
    cells += [[COLUMNS[c].format(row[c]) if row.get(c) is not None else '-' for c in columns] for row in case.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f'\n{section}: {case.name}')
    names = ['', *(r['name'] + (f"  absent: {r['absent']}" if 'absent' in r else '') for r in case.rows)]
    for line, name in zip(cells, names, strict=True):
        print('  ' + '  '.join(f'{c:>{w}}' for c, w in zip(line, widths, strict=True)) + f'  {name}'.rstrip())


@functools.cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: 8192 cubed on CUDA, 2048 cubed on a CPU."""
    size = 8192 if device == 'cuda' else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / statistics.median(alternate({'matmul': lambda: a @ b}, 5, device)['matmul'])


@functools.cache
def flops(name: str, size: int) -> int:
    """FLOP of a forward pass per image, two for each multiply-add of a convolution or matrix product."""
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops()


def image_size(command: Command, name: str) -> int:
    return command.size or timm.create_model(name, device='meta').pretrained_cfg['input_size'][-1]


def batch_size(command: Command, cost: float) -> int:
    """Choose a power of two so that a call takes about two seconds on two CPU cores, at `cost` FLOP per image."""
    work, most = (2e11, 128) if command.device == 'cpu' else (2e14, 1024)
    return command.batch or min(most, 2 ** int(math.log2(max(1, work / cost))))
