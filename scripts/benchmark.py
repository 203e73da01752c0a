#!/usr/bin/env python3
"""Measure speed and memory, each contestant beside the others in the same run.

    python scripts/benchmark.py                              # every section, on the bundled data
    python scripts/benchmark.py evaluate latency --models wrn28_10 wrn50_2 --json
    python scripts/benchmark.py int8 --data cifar10:DIR
    python scripts/benchmark.py head finetune --data caltech101:DIR --split random30     # as finetune.py

Of each line the ratio says how many times as fast as the first line of its case it is: the median over the rounds, in
each of which every contestant runs once. `matmul` is the share of the rate of a large matrix product of the same type,
which is the ceiling of what convolutions reach.
"""
from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
import torch.nn.functional as F
import torchvision
import tyro
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import wrn_timm
from wrn_timm.checkpoints import convert_state_dict, fit_to_model
from wrn_timm.command import reports_errors
from wrn_timm.data.augment import AutoAugment, RandAugment, TrivialAugment
from wrn_timm.data.on_device import DeviceLoader
from wrn_timm.data.small_sets import ImageArrays, load, normalise, parse_spec
from wrn_timm.export import OnnxModel, OptimizedModel, alternate, inference_forms, to_onnx
from wrn_timm.recipes import FinetuneConfig, Recipe
from wrn_timm.train import finetune as tuning
from wrn_timm.train.finetune_loop import Finetuner
from wrn_timm.train.machine import Machine, fast_bfloat16
from wrn_timm.train.measure import make_loader
from wrn_timm.train.run import RunControl, RunDir, environment
from wrn_timm.train.scratch import Learner, create_model
from wrn_timm.weights import WEIGHTS_FILE, export_weights, open_model
from wrn_timm.wrn import WideResNet

SAMPLE = Path(__file__).resolve().parents[1] / 'tests' / 'data' / 'caltech101_sample'
CLASSES = 10
BFLOAT16 = torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability().startswith('AVX512')

Call = Callable[[], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Command:
    sections: tyro.conf.Positional[tuple[str, ...]] = ()
    """evaluate, int8, train, latency, growth, scale, augment, start, head, finetune; by default all."""
    config: Annotated[FinetuneConfig, tyro.conf.arg(name='')] = dataclasses.field(
        default_factory=FinetuneConfig)
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
    device: str = 'cuda' if torch.cuda.is_available() else 'cpu'
    """'cpu' or 'cuda'."""
    compile: bool = True
    """Measure compiled forms too."""
    dtypes: tuple[Literal['float32', 'bfloat16'], ...] = ('float32', 'bfloat16') if BFLOAT16 else ('float32',)
    """Types of inference; by default bfloat16 too, save on CPUs without AVX-512, where it takes minutes."""
    memory: bool = True
    """Measure the peak memory of training, each in a process of its own."""
    json: bool = False
    """Print JSON in place of tables."""
    traceback: bool = False
    """Show where an error arose."""

    def __post_init__(self):
        for name, known in (('sections', SECTIONS), ('models', timm.list_models('*'))):
            if unknown := [n for n in getattr(self, name) if n.partition('.')[0] not in known]:
                near = ', '.join(known) if name == 'sections' else "timm.list_models('wrn*') lists ours"
                raise ValueError(f'{name}: {unknown[0]} is unknown; {near}')
        if self.rounds < 1 or self.batch < 0 or self.size < 0:
            raise ValueError('rounds must be at least 1, batch and size at least 0')


@dataclasses.dataclass
class Case:
    """Contestants that did the same work; the first is what the others' ratio is over."""
    name: str
    rows: list[Row]


# --- measuring and printing

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


# --- contestants of inference

LIBRARIES = ('pytorchcv', 'torchvision', 'timm')


def their_model(library: str, name: str) -> nn.Module | str:
    """The library's own network of this shape, with fresh weights, or why there is none."""
    wide = re.fullmatch(r'wrn(50|101)_2', name)
    if library == 'torchvision' and wide:
        return torchvision.models.get_model(f'wide_resnet{wide[1]}_2')
    if library == 'timm' and wide:
        return timm.create_model(f'wide_resnet{wide[1]}_2')
    ours = timm.models.model_entrypoint(name.partition('.')[0]).__module__ == WideResNet.__module__
    cifar = re.fullmatch(r'wrn(\d+)_(\d+)', name) if ours else None
    if library == 'pytorchcv' and (cifar or name == 'wrn50_2'):
        try:
            from pytorchcv.models.wrn import wrn50_2
            from pytorchcv.models.wrn_cifar import get_wrn_cifar
        except ImportError:
            return 'it is not installed'
        return get_wrn_cifar(CLASSES, *map(int, cifar.groups())) if cifar else wrn50_2()
    return 'it has no such network'


def peers(name: str) -> tuple[nn.Module, dict[str, nn.Module | str]]:
    """Our network, and those of other libraries with the same weights, for inference."""
    torch.manual_seed(0)
    ours, others = timm.create_model(name), {library: their_model(library, name) for library in LIBRARIES}
    if isinstance(others['pytorchcv'], nn.Module):  # whose layout we read
        ours.load_state_dict(fit_to_model(convert_state_dict(others['pytorchcv'].state_dict()), ours))
    for library in ('torchvision', 'timm'):  # whose layout is ours
        if isinstance(others[library], nn.Module):
            others[library].load_state_dict(ours.state_dict())
    return ours.eval(), {n: m.eval() if isinstance(m, nn.Module) else m for n, m in others.items()}


def through_onnx(model: nn.Module, device: str) -> Callable[[torch.Tensor], torch.Tensor] | str:
    """The exported file run by onnxruntime, or why it cannot be."""
    if device != 'cpu':
        return 'measured on a CPU only'
    try:
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(model, Path(folder) / 'model.onnx')
            return OnnxModel(Path(folder) / 'model.onnx')
    except ImportError as e:
        return str(e)


def networks(
        name: str,
        images: torch.Tensor,
        compile: bool,
        dtypes: tuple[str, ...],
) -> dict[str, Callable[[torch.Tensor], Any] | str]:
    """The contestants of inference by name, the plain eager network first; all give the same logits.

    Raises:
        ValueError: They do not.
    """
    torch.compiler.reset()  # torch compiles a class eight times at most, whatever its instances
    device = images.device.type
    ours, others = peers(name)
    ours.to(device)
    forms = inference_forms(ours, images, [getattr(torch, dtype) for dtype in dtypes], compile)
    last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    found = {'plain eager': forms.pop('plain'),
             'channels_last': OptimizedModel(last, torch.float32, torch.channels_last),
             **{f'folded, channels_last, {n}': form for n, form in forms.items()},
             **{n: OptimizedModel(m.to(device), torch.float32, torch.preserve_format) if isinstance(m, nn.Module)
                else m for n, m in others.items()},
             'onnxruntime': through_onnx(ours, device)}
    expected = found['plain eager'](images)
    for other, network in found.items():
        if not callable(network):
            continue
        try:
            differ = difference(network(images), expected)
        except RuntimeError as e:  # some take one image size alone
            found[other] = f'it fails: {str(e).splitlines()[0]}'
        else:
            if differ > (0.1 if 'bfloat16' in other else 0.01):
                raise ValueError(f'{name}: the logits of {other} differ by {differ:.0e} of the largest')
    return found


@torch.no_grad()
def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def inference(command: Command, name: str, size: int, batch: int, rounds: int) -> list[Row]:
    """Rows of all contestants of inference."""
    torch.manual_seed(0)
    images = torch.randn(batch, 3, size, size, device=command.device)
    found = networks(name, images, command.compile, command.dtypes)
    calls = {n: functools.partial(network, images) if callable(network) else network for n, network in found.items()}
    rows, seconds = measure(calls, rounds, command.device, batch)
    expected = calls['plain eager']()
    for row in rows:
        if 'absent' in row:
            continue
        dtype = torch.bfloat16 if 'bfloat16' in row['name'] else torch.float32
        row |= {'matmul': row['images_per_second'] * flops(name, size) / matmul_rate(command.device, dtype),
                'logits_differ': difference(calls[row['name']](), expected),
                'p95_ms': 1000 * sorted(seconds[row['name']])[int(0.95 * (rounds - 1))]}
        if command.device == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            calls[row['name']]()
            row['peak_mb'] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return rows


# --- sections

def evaluate(command: Command) -> Iterator[Case]:
    """Images/s of inference."""
    for name in command.models:
        size = image_size(command, name)
        batch = batch_size(command, flops(name, size))
        rows = inference(command, name, size, batch, command.rounds)
        yield Case(f'{name}, {size} px, batch {batch}', without('p95_ms', rows))


def latency(command: Command) -> Iterator[Case]:
    """Milliseconds of one image, median and 95th percentile."""
    for name in command.models:
        size = image_size(command, name)
        rows = inference(command, name, size, 1, 8 * command.rounds)
        yield Case(f'{name}, {size} px, batch 1', without('images_per_second', rows))


def int8(command: Command) -> Iterator[Case]:
    """Speed and accuracy of 8-bit weights and activations by onnxruntime, calibrated on 512 training images."""
    name = 'wrn16_1.cifar10'
    if not command.data.startswith('cifar10:'):
        yield Case(name, [{'name': 'onnxruntime int8', 'absent': 'it needs --data cifar10:DIR'}])
        return
    try:
        from onnxruntime.quantization import CalibrationDataReader, quant_pre_process, quantize_static
    except ImportError as e:
        yield Case(name, [{'name': 'onnxruntime int8', 'absent': str(e)}])
        return
    model, (dataset, root) = open_model(name), parse_spec(command.data)

    def normalised(part: ImageArrays) -> torch.Tensor:
        return normalise(part.images, model.pretrained_cfg['mean'], model.pretrained_cfg['std'])

    class Reader(CalibrationDataReader):
        def __init__(self, images: torch.Tensor):
            self.batches = iter(images.split(64))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    test = load(dataset, root, train=False)
    training = load(dataset, root, train=True)
    images = normalised(test)
    with tempfile.TemporaryDirectory() as folder:
        floats, prepared, ints = (Path(folder) / f'{kind}.onnx' for kind in ('floats', 'prepared', 'ints'))
        to_onnx(model, floats)
        quant_pre_process(str(floats), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(ints), Reader(normalised(training.subset(torch.arange(512)))),
                        op_types_to_quantize=['Conv', 'Gemm'], per_channel=True)
        batch = images[:batch_size(command, flops('wrn16_1', 32))]
        forms = inference_forms(model, batch, compile=command.compile)
        found = {'plain eager': forms.pop('plain'),
                 **{f'folded, channels_last, {n}': form for n, form in forms.items()},
                 'onnxruntime float32': OnnxModel(floats), 'onnxruntime int8': OnnxModel(ints)}
        rows, _ = measure({n: functools.partial(network, batch) for n, network in found.items()},
                          command.rounds, 'cpu', len(batch))
        for row in rows:
            logits = torch.cat([found[row['name']](part) for part in images.split(len(batch))])
            row['accuracy'] = 100 * (logits.argmax(1) == test.labels).float().mean().item()
            row['points'] = row['accuracy'] - rows[0]['accuracy']
    yield Case(f'{name}, 32 px, batch {len(batch)}, on {len(images)} test images', rows)


def repeated(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def plain_step(model: nn.Module, device: str, images: torch.Tensor, labels: torch.Tensor) -> Call:
    """The step of a tutorial's loop: NCHW, nothing compiled or fused; bfloat16 on CUDA, as the trainer's."""
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, weight_decay=5e-4, foreach=False)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == 'cuda'):
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def trainer_step(name: str, device: str, loader: DeviceLoader, checkpointing: bool = False, **kwargs: Any) -> Call:
    """The trainer's own step: a new batch augmented on the device, then what `train.py` does with it."""
    recipe = Recipe('synthetic', name, epochs=1, batch_size=loader.batch_size, lr=0.01, ema_decay=0.999)
    model = create_model(recipe, CLASSES).to(device, memory_format=torch.channels_last).train()
    if checkpointing:
        model.set_grad_checkpointing()
    learner = Learner(model, recipe, steps=1_000_000, **{'compile': device == 'cuda', **kwargs})
    batches = (b for epoch in range(1_000_000) for b in loader.epoch(epoch))
    return lambda: learner.step(1, *next(batches))


def training_steps(name: str, size: int, batch: int, device: str) -> dict[str, Callable[[], Call | str]]:
    """What makes each contestant's step, or says why there is none."""
    torch.compiler.reset()
    torch.manual_seed(0)
    data = ImageArrays(torch.randint(256, (4 * batch, 3, size, size), dtype=torch.uint8),
                       torch.randint(CLASSES, (4 * batch,)), tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3)
    loader = DeviceLoader(data, batch, device)
    images, labels = next(loader.epoch(0))
    images = images.contiguous()

    def theirs(library: str) -> Call | str:
        model = their_model(library, name)
        return model if isinstance(model, str) else plain_step(model, device, images, labels)

    ours = functools.partial(trainer_step, name, device, loader)
    bfloat16 = {
        'trainer, bfloat16': lambda: ours(precision='bf16'),
        'trainer, bfloat16 compiled': lambda: ours(precision='bf16', compile=True),
    } if device == 'cpu' and fast_bfloat16(device) else {}
    precision = 'auto' if device == 'cuda' else 'no'
    return {
        'plain eager': lambda: plain_step(timm.create_model(name, num_classes=CLASSES), device, images, labels),
        'trainer': lambda: ours(precision=precision),
        'trainer, checkpointing': lambda: ours(precision=precision, checkpointing=True),
        **bfloat16,
        **{library: functools.partial(theirs, library) for library in LIBRARIES}}


def _peak_in_this_process(contestant: str, name: str, size: int, batch: int, device: str) -> float:
    torch.backends.cudnn.benchmark = device == 'cuda'
    make = training_steps(name, size, batch, device)[contestant]
    before = 0 if device == 'cuda' else _peak_rss()
    step = make()
    for _ in range(2):  # the optimiser's memory comes with the first
        step()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # compiling, and choosing algorithms, took their own
        step()
    return (torch.cuda.max_memory_allocated() if device == 'cuda' else _peak_rss() - before) / 1e6


def _peak_rss(who: int = resource.RUSAGE_SELF) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_memory(contestant: str, name: str, size: int, batch: int, device: str) -> float | None:
    """MB that two training steps need at most, in a process of their own: resident on a CPU, allocated on CUDA.

    None where there is not so much beside this process.
    """
    if device == 'cuda':
        torch.cuda.empty_cache()
    # forked by a server, which is small: a process that this one starts takes over its peak
    with ProcessPoolExecutor(1, multiprocessing.get_context('forkserver')) as pool:
        try:
            return pool.submit(_peak_in_this_process, contestant, name, size, batch, device).result()
        except torch.OutOfMemoryError:
            return None


def train(command: Command) -> Iterator[Case]:
    """Images/s and peak memory of training steps. A step counts three forward passes: its own, and two backward."""
    for name in command.models:
        size = image_size(command, name)
        settings = name, size, batch_size(command, 3 * flops(name, size)), command.device
        steps, first = {}, {}
        for contestant, make in training_steps(*settings).items():
            step, began = make(), time.perf_counter()
            if callable(step):
                try:
                    step()
                except RuntimeError as e:  # some take one image size alone
                    step = f'it fails: {str(e).splitlines()[0]}'
                if command.device == 'cuda':
                    torch.cuda.synchronize()
                first[contestant] = time.perf_counter() - began
            steps[contestant] = step
        repeat = 10 if command.device == 'cuda' else 1  # a step's launches run while the one before computes
        calls = {n: functools.partial(repeated, step, repeat) if callable(step) else step for n, step in steps.items()}
        rows, _ = measure(calls, command.rounds, command.device, repeat * settings[2])
        for row in rows:
            if 'absent' not in row:
                dtype = torch.bfloat16 if command.device == 'cuda' or 'bfloat16' in row['name'] else torch.float32
                rate = 3 * flops(name, size) * row['images_per_second']
                row |= {'matmul': rate / matmul_rate(command.device, dtype), 'first_step_s': first[row['name']]}
                if command.memory:
                    row['peak_mb'] = peak_memory(row['name'], *settings)
                    if row['peak_mb'] and rows[0]['peak_mb']:
                        row['memory'] = row['peak_mb'] / rows[0]['peak_mb']
        yield Case(f'{name}, {size} px, batch {settings[2]}', rows)


def _train_in_processes(count: int, device: str, *args: str) -> tuple[list[float], float]:
    """Images/s of each epoch but the first, and the peak resident MB of one of `count` processes that train.py is."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={count}',
             str(Path(__file__).with_name('train.py')), '--recipe', 'smoke', '--device', device, '--holdout', '0',
             '--ema-decay', '0.999', '--out', f'{folder}/run', *args],
            env={**os.environ, **({'OMP_NUM_THREADS': '1'} if device == 'cpu' else {})}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f'train.py in {count} processes failed: {done.stderr[-500:]}')
        with open(f'{folder}/run/history.csv', newline='', encoding='utf-8') as f:
            rates = [float(row['images_per_second']) for row in csv.DictReader(f)]
    return rates[1:], _peak_rss(resource.RUSAGE_CHILDREN) / 1e6


def scale(command: Command) -> Iterator[Case]:
    """Images/s of train.py by the number of processes that share a batch, a core or a GPU each, and memory of one."""
    cuda = command.device == 'cuda'
    most = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    for name in command.models:
        batch = batch_size(command, 3 * flops(name, 32))
        rows: list[Row] = []
        for count in (2 ** i for i in range(most.bit_length()) if not batch % 2 ** i):
            # in a process of its own, whose children's peak is theirs alone
            with ProcessPoolExecutor(1, multiprocessing.get_context('forkserver')) as pool:
                rates, peak = pool.submit(_train_in_processes, count, command.device, '--model', name, '--batch-size',
                                          str(batch), '--epochs', str(command.rounds + 1)).result()
            rate = statistics.median(rates)
            rows.append({
                'name': f'{count} processes' if count > 1 else '1 process', 'images_per_second': rate,
                'ratio': rate / rows[0]['images_per_second'] if rows else 1., 'peak_mb': None if cuda else peak})
        yield Case(f'{name}, 32 px, batch {batch} over all', rows)


def growth(command: Command) -> Iterator[Case]:
    """Images/s by batch, and by image size: `linear` is 1 where an image takes time as its area."""
    for name in command.models:
        model = timm.create_model(name).to(command.device).eval()
        network = OptimizedModel(model.to(memory_format=torch.channels_last), torch.float32, torch.channels_last)
        size = image_size(command, name)
        most = batch_size(command, flops(name, size))
        batches = {f'batch {n}': n for n in (4 ** i for i in range(8)) if n < most} | {f'batch {most}': most}
        calls = {k: functools.partial(network, torch.randn(n, 3, size, size, device=command.device))
                 for k, n in batches.items()}
        rows, _ = measure(calls, command.rounds, command.device, batches)
        for row in rows:
            rate = row['images_per_second'] * flops(name, size)
            row['matmul'] = rate / matmul_rate(command.device, torch.float32)
        yield Case(f'{name}, {size} px', rows)

        sizes = {f'{s} px': s for s in ([command.size, 2 * command.size] if command.size else (32, 64, 128, 224))}
        batch = batch_size(command, flops(name, max(sizes.values())))
        calls = {k: functools.partial(network, torch.randn(batch, 3, s, s, device=command.device))
                 for k, s in sizes.items()}
        rows, _ = measure(calls, command.rounds, command.device, batch)
        for row, s in zip(rows, sizes.values(), strict=True):
            rate = row['images_per_second'] * flops(name, s)
            row |= {'linear': row['ratio'] * (s / next(iter(sizes.values()))) ** 2,
                    'matmul': rate / matmul_rate(command.device, torch.float32)}
        yield Case(f'{name}, batch {batch}', rows)


def augment(command: Command) -> Iterator[Case]:
    """Images/s through the loader on its device, and through torchvision's transforms image by image in one process."""
    batch = command.batch or 128
    images = torch.randint(256, (4 * batch, 3, 32, 32), dtype=torch.uint8)
    data = ImageArrays(images, torch.zeros(len(images), dtype=torch.int64), ('a',), (0.5,) * 3, (0.25,) * 3)
    policies = {'crop, flip': (None, None), 'TrivialAugment': (TrivialAugment(), v2.TrivialAugmentWide()),
                'RandAugment': (RandAugment(), v2.RandAugment()),
                'AutoAugment': (AutoAugment(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))}

    def on_device(policy: nn.Module | None) -> Call:
        batches = DeviceLoader(data, batch, command.device, augment=policy)
        stream = (b for epoch in range(1_000_000) for b in batches.epoch(epoch))
        return lambda: next(stream)

    def image_by_image(policy: nn.Module | None) -> Call:
        transform = v2.Compose([
            v2.RandomCrop(32, padding=4, padding_mode='reflect'), v2.RandomHorizontalFlip(),
            policy or nn.Identity(), v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.25,) * 3)])
        return lambda: torch.stack([transform(image) for image in images[:batch]])

    for name, (ours, theirs) in policies.items():
        rows, _ = measure({'torchvision': image_by_image(theirs), 'loader': on_device(ours)}, command.rounds,
                          command.device, batch)
        yield Case(f'{name}, 32 px, batch {batch}', rows)


def start(command: Command) -> Iterator[Case]:
    """Seconds to import, and to have a network with its weights; the floor is the first line of each."""
    code = ('import time; a = time.perf_counter(); import timm; b = time.perf_counter(); import wrn_timm; '
            'print(b - a, time.perf_counter() - a)')
    runs = [subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split()
            for _ in range(command.rounds)]
    alone, both = (list(map(float, column)) for column in zip(*runs, strict=True))
    rows = without('images_per_second', summarise({'import timm': alone, 'import timm, wrn_timm': both}))
    rows[1]['ms_over'] = 1000 * statistics.median(b - a for a, b in zip(alone, both, strict=True))
    yield Case('import', rows)

    with tempfile.TemporaryDirectory() as folder:
        at_hand = {w.name: (w.name, w.location) for w in wrn_timm.list_weights() if Path(w.location).is_dir()}
        for name in command.models:
            path = Path(folder) / name
            export_weights(timm.create_model(name), path, {'tag': 'random'})
            at_hand[name] = f'local-dir:{path}', str(path)
        for name, (source, path) in at_hand.items():
            arch, file = name.partition('.')[0], Path(path) / WEIGHTS_FILE
            kwargs = {'num_classes': timm.create_model(source, device='meta').num_classes}
            rows, seconds = measure({
                'build, and read the file':
                    lambda arch=arch, kwargs=kwargs, file=file: (timm.create_model(arch, **kwargs), load_file(file)),
                'create_model(pretrained=True)': lambda source=source: timm.create_model(source, pretrained=True),
            }, command.rounds, 'cpu')
            floor, whole = seconds.values()
            rows[1]['ms_over'] = 1000 * statistics.median(b - a for a, b in zip(floor, whole, strict=True))
            yield Case(f'{name}, {file.stat().st_size / 1e6:.1f} MB', without('images_per_second', rows))


def head(command: Command) -> Iterator[Case]:
    """Seconds to train the classifier alone, by epochs of the whole network or fitted to features; no augmentation."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, cache in (('backbone every epoch', False), ('features cached', True)):
            config = dataclasses.replace(command.config, train='head', cache=cache, augment=False)
            metrics = tuning.finetune(config, command.data or SAMPLE, Path(folder) / name, Machine(
                command.device, command.workers, command.image_memory, progress=False))
            rows.append({'name': name, 'seconds': metrics['train_seconds'], 'accuracy': metrics['mean_per_class']})
    for row in rows:
        row |= {'ratio': rows[0]['seconds'] / row['seconds'], 'points': row['accuracy'] - rows[0]['accuracy']}
    yield Case(f"{config.model}, {metrics['train_files']} photographs at {metrics['input_size']} px, {config.epochs} "
               f"epochs", rows)


def finetune(command: Command) -> Iterator[Case]:
    """Images/s of fine-tuning: its loader, its steps on images made ready, and both as they run after the first epoch.

    `share_of_slower` is what both reach of the slower of the two, `share_of_serial` of one after the other.
    """
    config = dataclasses.replace(command.config, holdout=0., epochs=1)
    accelerator = tuning.make_accelerator(config, command.device)
    model = tuning.build_model(config)
    split, _ = tuning.prepare_split(config, command.data or SAMPLE)
    model.reset_classifier(len(split.train.classes))
    model.to(accelerator.device, memory_format=torch.channels_last)
    transforms, cfg = tuning.preprocessing(config, model, 'benchmark', split.train.classes)
    files = tuning.training_set(config, split, transforms['train'], cfg['input_size'][-1], command.image_memory * 1e9)
    batch = min(config.batch_size, len(files))
    ready = [files[i] for i in range(min(len(files) - len(files) % batch, 16 * batch))]

    def load_all() -> float:
        began, seen = time.perf_counter(), 0
        for _, labels, *_ in make_loader(files, batch, command.workers, shuffle=True, drop_last=True):
            seen += len(labels)
        return (time.perf_counter() - began) / seen

    def fit_all(dataset: Any, workers: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            control = RunControl(RunDir(Path(folder) / 'run', {}))
            machine = Machine(command.device, workers, progress=False)
            fitted = Finetuner(model, config, accelerator, control, machine).fit(dataset)
        return 1 / fitted.history[-1]['images_per_second']

    runs = {'loader and steps': lambda: fit_all(files, command.workers), 'loader alone': load_all,
            'steps alone': lambda: fit_all(ready, 0)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(command.rounds + 1):
        for name, run in runs.items():
            took = run()
            if i:  # the first round warms up
                seconds[name].append(took)
    rows = without('ms', summarise(seconds))
    both, loader, steps = seconds.values()
    rows[0] |= {'share_of_slower': statistics.median(map(lambda b, *parts: max(parts) / b, both, loader, steps)),
                'share_of_serial': statistics.median(map(lambda b, *parts: sum(parts) / b, both, loader, steps))}
    yield Case(f"{config.model}, {len(files)} photographs at {cfg['input_size'][-1]} px, batch {batch}, "
               f"{command.workers} workers", rows)


SECTIONS = {f.__name__: f for f in (evaluate, int8, train, latency, growth, scale, augment, start, head, finetune)}


@reports_errors
def main(argv: Sequence[str]) -> int:
    command = tyro.cli(Command, args=argv, prog='benchmark.py', description=__doc__)
    torch.backends.cudnn.benchmark = command.device == 'cuda'
    if command.device == 'cuda':  # convolutions compute in TF32, and so does what they are compared with
        torch.backends.cuda.matmul.allow_tf32 = True
    results: dict[str, list[dict[str, Any]]] = {}
    for name in command.sections or SECTIONS:
        for case in SECTIONS[name](command):
            results.setdefault(name, []).append(dataclasses.asdict(case))
            if not command.json:
                show(name, case)
    about = {'device': command.device, 'threads': torch.get_num_threads(), 'rounds': command.rounds,
             **{f'matmul_gflops_{d}': round(matmul_rate(command.device, getattr(torch, d)) / 1e9, 1)
                for d in command.dtypes}, **environment(command.device)}
    if command.json:
        print(json.dumps({**about, 'sections': results}, indent=2))
    else:
        print('\n' + ', '.join(f'{k} {v}' for k, v in about.items()))
    return 0


if __name__ == '__main__':
    sys.exit(main())
