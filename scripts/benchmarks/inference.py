"""Speed of inference: in batches, for one image, by batch and image size, in 8 bits, and time to start."""
from __future__ import annotations

import copy
import functools
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

import wrn_timm
from wrn_timm.checkpoints import convert_state_dict, fit_to_model
from wrn_timm.data.small_sets import ImageArrays, load, normalise, parse_spec
from wrn_timm.export import OnnxModel, OptimizedModel, inference_forms, to_onnx
from wrn_timm.weights import WEIGHTS_FILE, export_weights, open_model
from wrn_timm.wrn import WideResNet

from .measuring import (
    CLASSES,
    Case,
    Command,
    Row,
    batch_size,
    flops,
    image_size,
    matmul_rate,
    measure,
    summarise,
    without,
)

LIBRARIES = ('pytorchcv', 'torchvision', 'timm')


def their_model(library: str, name: str) -> nn.Module | str:
    """Create the library's own network of this architecture with random weights, or say why there is none."""
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
    """Return our network and those of other libraries with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    ours, others = timm.create_model(name), {library: their_model(library, name) for library in LIBRARIES}
    if isinstance(others['pytorchcv'], nn.Module):  # its weights can be converted to our layout
        ours.load_state_dict(fit_to_model(convert_state_dict(others['pytorchcv'].state_dict()), ours))
    for library in ('torchvision', 'timm'):  # they have the same layout as ours
        if isinstance(others[library], nn.Module):
            others[library].load_state_dict(ours.state_dict())
    return ours.eval(), {n: m.eval() if isinstance(m, nn.Module) else m for n, m in others.items()}


def through_onnx(model: nn.Module, device: str) -> Callable[[torch.Tensor], torch.Tensor] | str:
    """Export a network and run it with onnxruntime, or say why that is not possible."""
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
    """Return the inference contestants by name, plain eager first, after checking that they give the same logits.

    Raises:
        ValueError: The logits differ.
    """
    torch.compiler.reset()  # torch compiles a class at most eight times, over all instances
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
        except RuntimeError as e:  # some accept only one image size
            found[other] = f'it fails: {str(e).splitlines()[0]}'
        else:
            if differ > (0.1 if 'bfloat16' in other else 0.01):
                raise ValueError(f'{name}: the logits of {other} differ by {differ:.0e} of the largest')
    return found


@torch.no_grad()
def difference(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def inference(command: Command, name: str, size: int, batch: int, rounds: int) -> list[Row]:
    """Measure all inference contestants, one row each."""
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


def evaluate(command: Command) -> Iterator[Case]:
    """Images/s of inference."""
    for name in command.models:
        size = image_size(command, name)
        batch = batch_size(command, flops(name, size))
        rows = inference(command, name, size, batch, command.rounds)
        yield Case(f'{name}, {size} px, batch {batch}', without('p95_ms', rows))


def latency(command: Command) -> Iterator[Case]:
    """Milliseconds for one image: median and 95th percentile."""
    for name in command.models:
        size = image_size(command, name)
        rows = inference(command, name, size, 1, 8 * command.rounds)
        yield Case(f'{name}, {size} px, batch 1', without('images_per_second', rows))


def int8(command: Command) -> Iterator[Case]:
    """Speed and accuracy with 8-bit weights and activations in onnxruntime, calibrated on 512 training images."""
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


def growth(command: Command) -> Iterator[Case]:
    """Images/s by batch size and by image size. `linear` is 1 if the time per image is proportional to its area."""
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


def start(command: Command) -> Iterator[Case]:
    """Milliseconds to import, and to create a network with its weights. The first line of each is the lower bound."""
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
