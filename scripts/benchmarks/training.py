"""Speed and memory of training from scratch: training steps, several processes, and augmentation."""
from __future__ import annotations

import csv
import functools
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from wrn_timm.data.augment import AutoAugment, RandAugment, TrivialAugment
from wrn_timm.data.on_device import DeviceLoader
from wrn_timm.data.small_sets import ImageArrays
from wrn_timm.recipes import Recipe
from wrn_timm.train.machine import fast_bfloat16
from wrn_timm.train.scratch import Learner, create_model

from .inference import LIBRARIES, their_model
from .measuring import CLASSES, Call, Case, Command, Row, batch_size, flops, image_size, matmul_rate, measure


def repeated(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def plain_step(model: nn.Module, device: str, images: torch.Tensor, labels: torch.Tensor) -> Call:
    """Create a step as in tutorials: NCHW, nothing compiled or fused, in bfloat16 on CUDA like the trainer's."""
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
    """Create the trainer's own step: augment a new batch on the device, then train on it as `train` does."""
    recipe = Recipe('synthetic', name, epochs=1, batch_size=loader.batch_size, lr=0.01, ema_decay=0.999)
    model = create_model(recipe, CLASSES).to(device, memory_format=torch.channels_last).train()
    if checkpointing:
        model.set_grad_checkpointing()
    learner = Learner(model, recipe, steps=1_000_000, **{'compile': device == 'cuda', **kwargs})
    batches = (b for epoch in range(1_000_000) for b in loader.epoch(epoch))
    return lambda: learner.step(1, *next(batches))


def training_steps(name: str, size: int, batch: int, device: str) -> dict[str, Callable[[], Call | str]]:
    """Return functions that create each contestant's step, or say why there is none."""
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
    for _ in range(2):  # the first allocates the optimiser state
        step()
    if device == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()  # without the memory for compiling and choosing algorithms
        step()
    return (torch.cuda.max_memory_allocated() if device == 'cuda' else _peak_rss() - before) / 1e6


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def peak_memory(contestant: str, name: str, size: int, batch: int, device: str) -> float | None:
    """Peak memory of training steps in MB, measured in a separate process: resident on a CPU, allocated on CUDA.

    None if CUDA runs out of memory.
    """
    if device == 'cuda':
        torch.cuda.empty_cache()
    # forked by a small server, because a direct child would inherit the peak of this process
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([])  # newer Pythons import this script there by default
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(_peak_in_this_process, contestant, name, size, batch, device).result()
        except torch.OutOfMemoryError:
            return None


def _tried(step: Callable[[], Any] | str, device: str) -> tuple[Callable[[], Any] | str, float]:
    """Run a step once. Returns the step, or why there is none, and the seconds."""
    began = time.perf_counter()
    if callable(step):
        try:
            step()
        except RuntimeError as e:  # some accept only one image size
            step = f'it fails: {str(e).splitlines()[0]}'
        if device == 'cuda':
            torch.cuda.synchronize()
    return step, time.perf_counter() - began


def train(command: Command) -> Iterator[Case]:
    """Images/s and peak memory of training steps. A step counts as three forward passes, two of them for backward."""
    for name in command.models:
        size = image_size(command, name)
        settings = name, size, batch_size(command, 3 * flops(name, size)), command.device
        steps, first = {}, {}
        for contestant, make in training_steps(*settings).items():
            steps[contestant], first[contestant] = _tried(make(), command.device)
        repeat = 10 if command.device == 'cuda' else 1  # a step is launched while the previous one computes
        calls = {n: functools.partial(repeated, step, repeat) if callable(step) else step for n, step in steps.items()}
        rows, _ = measure(calls, command.rounds, command.device, repeat * settings[2])
        for row in (row for row in rows if 'absent' not in row):
            dtype = torch.bfloat16 if command.device == 'cuda' or 'bfloat16' in row['name'] else torch.float32
            rate = 3 * flops(name, size) * row['images_per_second']
            row |= {'matmul': rate / matmul_rate(command.device, dtype), 'first_step_s': first[row['name']]}
            if command.memory:
                row['peak_mb'] = peak_memory(row['name'], *settings)
                if row['peak_mb'] and rows[0].get('peak_mb'):
                    row['memory'] = row['peak_mb'] / rows[0]['peak_mb']
        yield Case(f'{name}, {size} px, batch {settings[2]}', rows)


# Runs a command and prints the peak resident memory of its processes in bytes, like `_peak_rss`. A small process has to
# start them, since they inherit the peak of their parent.
_PEAK_OF = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
sys.exit(code)
"""


def _train_in_processes(count: int, device: str, *args: str) -> tuple[list[float], float]:
    """Train in `count` processes. Returns images/s of each epoch but the first, and peak resident MB of one process."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, '-c', _PEAK_OF, sys.executable, '-m', 'torch.distributed.run', '--standalone',
             f'--nproc-per-node={count}', '-m', 'wrn_timm.cli', 'train', '--recipe', 'smoke', '--device', device,
             '--holdout', '0', '--ema-decay', '0.999', '--out', f'{folder}/run', *args],
            env={**os.environ, **({'OMP_NUM_THREADS': '1'} if device == 'cpu' else {})}, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
            raise RuntimeError(f'training in {count} processes failed: {said[-1] if said else done.stderr[-500:]}')
        with open(f'{folder}/run/history.csv', newline='', encoding='utf-8') as f:
            rates = [float(row['images_per_second']) for row in csv.DictReader(f)]
    return rates[1:], int(done.stdout.split()[-1]) / 1e6


def scale(command: Command) -> Iterator[Case]:
    """Images/s of `train` by number of processes that share a batch, with a core or GPU each, and memory of one."""
    cuda = command.device == 'cuda'
    most = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    for name in command.models:
        batch = min(batch_size(command, 3 * flops(name, 32)), 256)  # `smoke` has 512 images
        rows: list[Row] = []
        for count in (2 ** i for i in range(most.bit_length()) if not batch % 2 ** i):
            rates, peak = _train_in_processes(count, command.device, '--model', name, '--batch-size', str(batch),
                                              '--epochs', str(command.rounds + 1))
            rate = statistics.median(rates)
            rows.append({
                'name': f'{count} processes' if count > 1 else '1 process', 'images_per_second': rate,
                'ratio': rate / rows[0]['images_per_second'] if rows else 1., 'peak_mb': None if cuda else peak})
        yield Case(f'{name}, 32 px, batch {batch} over all', rows)


def augment(command: Command) -> Iterator[Case]:
    """Images/s of the loader on its device, and of torchvision's transforms image by image in one process."""
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
