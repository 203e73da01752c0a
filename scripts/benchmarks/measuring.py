"""Timing contestants in turns, and what is known of a network's work: for all sections."""
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
    """What is measured, and how."""
    models: tuple[str, ...] = ('wrn16_4', 'wrn28_10', 'wrn50_2')
    """Networks that evaluate, train, latency, growth and start measure."""
    batch: int = 0
    """Images a call of evaluate, train and augment; 0 takes as many as some seconds allow, up to 128."""
    size: int = 0
    """Side of the images in pixels; 0 takes the network's own."""
    rounds: int = 7
    """Times each contestant is measured (latency: eight times as often)."""
    data: str = ''
    """cifar10:DIR for int8; for head and finetune as in finetune.py, by default the bundled sample."""
    workers: int = 0
    """Processes that read photographs."""
    image_memory: float = 1.
    """GB of decoded photographs that head and finetune keep."""
    compile: bool = True
    """Measure compiled forms too."""
    dtypes: tuple[Literal['float32', 'bfloat16'], ...] = ('float32', 'bfloat16') if BFLOAT16 else ('float32',)
    """Types of inference; by default bfloat16 too, save on CPUs without AVX-512, where it takes minutes."""
    memory: bool = True
    """Measure the peak memory of training, each in a process of its own."""
    json: bool = False
    """Print JSON in place of tables."""
    config: FinetuneConfig = FinetuneConfig()  # of head and finetune

    @property
    def photographs(self) -> str:
        """What head and finetune train on."""
        return self.data or str(sample())


@dataclasses.dataclass
class Case:
    """Contestants that did the same work; the first is what the others' ratio is over."""
    name: str
    rows: list[Row]


def summarise(seconds: dict[str, list[float]], items: int | Mapping[str, int] = 1) -> list[Row]:
    """A row a contestant: the median ratio over the first in the same round with its quartiles, and images/s.

    Args:
        seconds: Of each contestant's calls, a round each.
        items: Images a call.
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
    """Time contestants in turns; one that is a text is absent, and the text says why. Rows, and seconds of each round.
    """
    seconds = alternate({n: c for n, c in contestants.items() if callable(c)}, rounds, device)
    rows = {row['name']: row for row in summarise(seconds, items)}
    return [rows.get(n) or {'name': n, 'absent': c} for n, c in contestants.items()], seconds


def without(column: str, rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != column} for row in rows]


COLUMNS = {  # how a figure is printed; those not here are for JSON alone
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
    """Operations of a forward pass an image, two for each multiply-add of a convolution or matrix product."""
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device='meta'))
    return counter.get_total_flops()


def image_size(command: Command, name: str) -> int:
    return command.size or timm.create_model(name, device='meta').pretrained_cfg['input_size'][-1]


def batch_size(command: Command, cost: float) -> int:
    """A power of two for images of `cost` FLOP that keeps a call at about two seconds of two CPU cores."""
    work, most = (2e11, 128) if command.device == 'cpu' else (2e14, 1024)
    return command.batch or min(most, 2 ** int(math.log2(max(1, work / cost))))
