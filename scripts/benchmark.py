#!/usr/bin/env python3
"""Measure speed: import, inference, augmentation and training, each against the plain alternative in the same run.

    python scripts/benchmark.py                        # import time, inference, augmentation
    python scripts/benchmark.py --train                # and training steps
    python scripts/benchmark.py --train --model wrn28_10 --batch-size 512 --device cuda --json
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.data.augment import AutoAugment, RandAugment, TrivialAugment
from wrn_timm.data.datasets import ImageArrays
from wrn_timm.data.device import DeviceLoader
from wrn_timm.export import alternate
from wrn_timm.train.loop import Learner, create_model
from wrn_timm.train.recipes import Recipe
from wrn_timm.train.rundir import environment

CLASSES = 10


def seconds_to_import() -> float:
    """Seconds that `import wrn_timm` takes in a fresh interpreter that has imported timm."""
    code = 'import timm, time; t = time.perf_counter(); import wrn_timm; print(time.perf_counter() - t)'
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)


def waiter(device: str) -> Callable[[], None]:
    return torch.cuda.synchronize if device == 'cuda' else lambda: None


def rival(name: str) -> torch.nn.Module | None:
    """pytorchcv's network of the same shape, where it has one."""
    try:
        from pytorchcv.model_provider import get_model
        return get_model(f'{name}_cifar10')
    except (ImportError, ValueError):
        return None


def matmul_ceiling(device: str) -> float:
    """FLOP/s of a large matrix product: 8192 cubed in bfloat16 on CUDA, 2048 cubed in float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == 'cuda' else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / alternate({'matmul': lambda: a @ b}, 10, waiter(device))['matmul']


def training_flops(name: str) -> int:
    """Operations of a training step an image: those of the forward pass, and twice as many backward."""
    model = timm.create_model(name, device='meta')
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.pretrained_cfg['input_size'], device='meta'))
    return 3 * counter.get_total_flops()


def plain_step(model: torch.nn.Module, device: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
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


def trainer_step(name: str, device: str, batch: int, loader: DeviceLoader, checkpointing: bool) -> Callable[[], None]:
    """The trainer's own step: a new batch augmented on the device, then what `train.py` does with it."""
    recipe = Recipe('synthetic', name, epochs=1, batch_size=batch, lr=0.01, ema_decay=0.999)
    model = create_model(recipe, CLASSES).to(device, memory_format=torch.channels_last).train()
    if checkpointing:
        model.set_grad_checkpointing()
    learner = Learner(model, recipe, steps=1_000_000)
    batches = (b for epoch in range(1_000_000) for b in loader.epoch(epoch))
    return lambda: learner.step(1, *next(batches))


def compare_training(name: str, device: str, batch: int, rounds: int) -> dict[str, Any]:
    """The trainer's step against plain eager loops: images/s, share of the ceiling, peak memory, first step."""
    size = timm.create_model(name, device='meta').pretrained_cfg['input_size']
    data = ImageArrays(torch.randint(256, (4 * batch, *size), dtype=torch.uint8), torch.randint(CLASSES, (4 * batch,)),
                       tuple(map(str, range(CLASSES))), (0.5,) * 3, (0.25,) * 3)
    loader = DeviceLoader(data, batch, device)
    images, labels = next(loader.epoch(0))
    images = images.contiguous()
    makers: dict[str, Callable[[], Callable[[], None]]] = {
        'trainer': lambda: trainer_step(name, device, batch, loader, False),
        'trainer, checkpointing': lambda: trainer_step(name, device, batch, loader, True),
        'plain eager': lambda: plain_step(timm.create_model(name, num_classes=CLASSES), device, images, labels)}
    if other := rival(name):
        makers['pytorchcv'] = lambda: plain_step(other, device, images, labels)

    sync, steps, first, memory = waiter(device), {}, {}, {}
    for kind, make in makers.items():
        if device == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step = make()
        started = time.perf_counter()
        step()
        sync()
        first[kind] = time.perf_counter() - started
        if device == 'cuda':
            memory[kind] = (torch.cuda.max_memory_allocated() - before) / 1e9
        steps[kind] = step
    rates = {k: batch / t for k, t in alternate(steps, rounds, waiter(device)).items()}
    ceiling, flops = matmul_ceiling(device), training_flops(name)
    out = {
        'ratios': {f'over {k}': round(rates['trainer'] / v, 3) for k, v in rates.items() if k != 'trainer'},
        'images_per_second': {k: round(v, 1) for k, v in rates.items()},
        'share_of_matmul_ceiling': {k: round(v * flops / ceiling, 3) for k, v in rates.items()},
        'ceiling_tflops': round(ceiling / 1e12, 3), 'gflop_an_image': round(flops / 1e9, 2),
        'first_step_seconds': {k: round(v, 1) for k, v in first.items()}}
    if memory:
        out['peak_gb'] = {k: round(v, 2) for k, v in memory.items()}
        out['memory_over_plain'] = {k: round(v / memory['plain eager'], 3) for k, v in memory.items()}
    return out


def compare_inference(name: str, device: str, batch: int, rounds: int) -> dict[str, Any]:
    """Images/s of the network in channels_last, plain, and of pytorchcv's, on random images in float32."""
    images = torch.randn(batch, *timm.create_model(name, device='meta').pretrained_cfg['input_size'], device=device)
    last = images.contiguous(memory_format=torch.channels_last)

    def call(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: model(images))

    candidates = {
        'channels_last': call(timm.create_model(name).to(device, memory_format=torch.channels_last).eval(), last),
        'plain': call(timm.create_model(name).to(device).eval(), images)}
    if other := rival(name):
        candidates['pytorchcv'] = call(other.to(device).eval(), images)
    rates = {k: batch / t for k, t in alternate(candidates, rounds, waiter(device)).items()}
    ours = rates['channels_last']
    return {'ratios': {f'over {k}': round(ours / v, 3) for k, v in rates.items() if k != 'channels_last'},
            'images_per_second': {k: round(v, 1) for k, v in rates.items()}}


def compare_augmentation(device: str, batch: int, rounds: int) -> dict[str, Any]:
    """Images/s through the loader on its device, and through torchvision's transforms image by image in one process."""
    images = torch.randint(256, (4 * batch, 3, 32, 32), dtype=torch.uint8)
    data = ImageArrays(images, torch.zeros(len(images), dtype=torch.int64), ('a',), (0.5,) * 3, (0.25,) * 3)
    policies = {'crop, flip': (None, None), 'TrivialAugment': (TrivialAugment(), v2.TrivialAugmentWide()),
                'RandAugment': (RandAugment(), v2.RandAugment()),
                'AutoAugment': (AutoAugment(), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10))}

    def on_device(policy: torch.nn.Module | None) -> Callable[[], Any]:
        batches = DeviceLoader(data, batch, device, augment=policy)
        stream = (b for epoch in range(1_000_000) for b in batches.epoch(epoch))
        return lambda: next(stream)

    def image_by_image(policy: torch.nn.Module | None) -> Callable[[], Any]:
        transform = v2.Compose([
            v2.RandomCrop(32, padding=4, padding_mode='reflect'), v2.RandomHorizontalFlip(),
            policy or torch.nn.Identity(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.5,) * 3, (0.25,) * 3)])
        return lambda: torch.stack([transform(image) for image in images[:batch]])

    candidates = {}
    for name, (ours, theirs) in policies.items():
        candidates[f'{name}: loader'] = on_device(ours)
        candidates[f'{name}: torchvision'] = image_by_image(theirs)
    rates = {k: batch / t for k, t in alternate(candidates, rounds, waiter(device)).items()}
    return {'ratios': {f'{name} over torchvision': round(rates[f'{name}: loader'] / rates[f'{name}: torchvision'], 2)
                       for name in policies},
            'images_per_second': {k: round(v) for k, v in rates.items()}}


def show(kind: str, result: dict[str, Any]) -> None:
    """Ratios first, then everything measured of each candidate in a line."""
    print(f"{kind}: {', '.join(f'{v} {k}' for k, v in result['ratios'].items())}")
    columns = {k: v for k, v in result.items() if isinstance(v, dict) and k != 'ratios'}
    for name in result['images_per_second']:
        print(f'  {name:28s}' + '  '.join(f'{column} {values[name]}' for column, values in columns.items()))
    for key, value in result.items():
        if not isinstance(value, dict):
            print(f'  {key} {value}')


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='wrn16_1')
    parser.add_argument('--train', action='store_true', help='measure training steps too')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args(argv)
    if not timm.is_model(args.model):
        parser.error(f'{args.model} is not a model of timm or of this package')

    settings = args.device, args.batch_size, args.rounds
    result = {
        'import_ms_over_timm': round(1000 * statistics.median(seconds_to_import() for _ in range(5)), 1),
        'model': args.model, 'batch_size': args.batch_size, 'device': args.device, 'environment': environment(),
        'inference': compare_inference(args.model, *settings), 'augmentation': compare_augmentation(*settings)}
    if args.train:
        result['training'] = compare_training(args.model, *settings)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"import wrn_timm: {result['import_ms_over_timm']} ms over import timm")
    print(f'{args.model}, batch {args.batch_size}, {args.device}')
    for kind in ('inference', 'augmentation', 'training'):
        if kind in result:
            show(kind, result[kind])
    return 0


if __name__ == '__main__':
    sys.exit(main())
