#!/usr/bin/env python3
"""Measure speed: import, inference and training, each against the plain alternative in the same run.

    python scripts/benchmark.py                      # import time, inference
    python scripts/benchmark.py --train              # and training steps
    python scripts/benchmark.py --model wrn28_10 --json
"""
from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.train.rundir import environment


def seconds_to_import() -> float:
    """Seconds that `import wrn_timm` takes in a fresh interpreter that has imported timm."""
    code = 'import timm, time; t = time.perf_counter(); import wrn_timm; print(time.perf_counter() - t)'
    return float(subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout)


def alternate(candidates: dict[str, Callable[[], None]], rounds: int, sync: Callable[[], None]) -> dict[str, float]:
    """Median seconds a call; the candidates take turns, so that a busy machine slows each alike."""
    times = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, call in candidates.items():
            sync()
            started = time.perf_counter()
            call()
            sync()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def rival(name: str) -> torch.nn.Module | None:
    """pytorchcv's network of the same shape, where it has one."""
    try:
        from pytorchcv.model_provider import get_model
        return get_model(f'{name}_cifar10')
    except (ImportError, ValueError):
        return None


def training_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, weight_decay=5e-4)

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.train()
    return step


def inference(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            model(images)

    model.eval()
    return call


def compare(name: str, make: Callable, device: str, batch: int, rounds: int) -> dict[str, float]:
    """Images/s of the network in channels_last, plain, and of pytorchcv's, on random images."""
    images = torch.randn(batch, *timm.create_model(name, device='meta').pretrained_cfg['input_size'], device=device)
    labels = torch.randint(10, (batch,), device=device)
    args = (labels,) if make is training_step else ()
    ours = timm.create_model(name).to(device, memory_format=torch.channels_last)
    candidates = {
        'channels_last': make(ours, images.contiguous(memory_format=torch.channels_last), *args),
        'plain': make(timm.create_model(name).to(device), images, *args)}
    if other := rival(name):
        candidates['pytorchcv'] = make(other.to(device), images, *args)
    sync = torch.cuda.synchronize if device == 'cuda' else lambda: None
    return {k: batch / t for k, t in alternate(candidates, rounds, sync).items()}


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

    result = {
        'import_ms_over_timm': round(1000 * statistics.median(seconds_to_import() for _ in range(5)), 1),
        'model': args.model, 'batch_size': args.batch_size, 'device': args.device, 'environment': environment()}
    for kind, make in (('inference', inference), ('training', training_step)):
        if kind == 'inference' or args.train:
            rates = compare(args.model, make, args.device, args.batch_size, args.rounds)
            ours = rates['channels_last']
            result[kind] = {'ratios': {f'over {k}': round(ours / v, 3) for k, v in rates.items() if v is not ours},
                            'images_per_second': {k: round(v, 1) for k, v in rates.items()}}
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"import wrn_timm: {result['import_ms_over_timm']} ms over import timm")
    for kind in ('inference', 'training'):
        if kind in result:
            ratios = ', '.join(f'{v} {k}' for k, v in result[kind]['ratios'].items())
            print(f"{args.model} {kind}, batch {args.batch_size}, {args.device}: {ratios}")
            for name, rate in result[kind]['images_per_second'].items():
                print(f'  {name:14s} {rate:10.1f} images/s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
