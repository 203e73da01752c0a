"""Fast inference (BatchNorm folded, fastest form measured), and export to ONNX, `torch.export` and TorchScript.

    fast = optimize(model, images)             # images: a batch of the size that you will use
    to_onnx(model, 'wrn.onnx')                 # any batch, any image size
"""
from __future__ import annotations

import copy
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx
from timm.data import resolve_model_data_config
from timm.models import FeatureInfo
from timm.utils import unwrap_model
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_map

from .files import atomic_write

__all__ = [
    'EXPORTERS', 'OnnxModel', 'OptimizedModel', 'alternate', 'fold_batchnorm', 'inference_forms', 'optimize',
    'run_exported', 'to_exported_program', 'to_onnx', 'to_torchscript', 'write_onnx',
]

_logger = logging.getLogger(__name__)


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with BatchNorm folded into the convolution before it and replaced by `nn.Identity`.

    A BatchNorm is folded if nothing else reads the output of that convolution. In the 6N + 4 family this is `bn2` of
    every block, and `bn1` of the first block if its shortcut is a convolution (CIFAR stem); in the ImageNet family, it
    is every BatchNorm. The copy keeps the class of the model, with `forward_features`, `pretrained_cfg` and the rest.
    A model in a wrapper (`torch.compile`, DataParallel) is taken out of it.

    Raises:
        ValueError: `torch.fx` cannot trace the model; the reason is given.
    """
    model = copy.deepcopy(unwrap_model(model)).eval()
    try:
        graph = torch.fx.Tracer().trace(model)
    except Exception as e:  # tracing runs the model's own code, which can raise anything on proxies
        raise ValueError(f'torch.fx cannot trace {type(model).__name__}: {e}') from e
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == 'call_module']
    called = [node.target for node in calls]

    def only_input(node: torch.fx.Node) -> torch.fx.Node | None:
        """The module call whose output only this node reads, skipping identities in between."""
        source = node.args[0]
        if source.op != 'call_module' or len(source.users) > 1 or called.count(source.target) > 1:
            return None
        return only_input(source) if type(modules[source.target]) is nn.Identity else source

    for node in calls:
        norm = modules[node.target]
        if type(norm) is not nn.BatchNorm2d or not norm.track_running_stats or called.count(node.target) > 1:
            continue
        source = only_input(node)
        if source and type(modules[source.target]) is nn.Conv2d:
            modules[source.target] = fuse_conv_bn_eval(modules[source.target], norm)
            model.set_submodule(source.target, modules[source.target])
            model.set_submodule(node.target, nn.Identity())
    return model


def alternate(
        candidates: dict[str, Callable[[], Any]],
        rounds: int,
        device: str | torch.device,
) -> dict[str, list[float]]:
    """Time each candidate in each round, in seconds; they alternate, so that a busy machine slows all alike."""
    sync = torch.cuda.synchronize if torch.device(device).type == 'cuda' else lambda: None
    times = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, call in candidates.items():
            sync()
            started = time.perf_counter()
            call()
            sync()
            if i:  # the first round warms up
                times[name].append(time.perf_counter() - started)
    return times


class OptimizedModel(nn.Module):
    """A network in its fastest measured form, made by `optimize`. For inference only: it has no gradients.

    Attributes:
        form: The form chosen, a key of `images_per_second`.
        images_per_second: Speed of each form on the batch given to `optimize`; 'plain' is the model as given.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format):
        super().__init__()
        self.model, self.dtype, self.memory_format = model, dtype, memory_format
        self.form, self.images_per_second = 'plain', {}

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        """Run the network on images (B, C, H, W) of any dtype and memory format; the output has their dtype."""
        out = self.model(x.to(dtype=self.dtype, memory_format=self.memory_format))
        return tree_map(lambda o: o.to(x.dtype), out)


def inference_forms(
        model: nn.Module,
        images: torch.Tensor,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        compile: bool = True,
        onnx: bool = False,
) -> dict[str, OptimizedModel]:
    """Forms that `optimize` chooses from, by name; the arguments and errors are those of `optimize`."""
    if unknown := set(dtypes) - {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(f'dtypes has {unknown.pop()}; choose from torch.float32, torch.bfloat16 and torch.float16')
    if onnx and images.device.type != 'cpu':
        raise ValueError(f'onnx runs on the CPU, but the images are on {images.device}; move them or leave onnx out')
    dtype = next((p.dtype for p in model.parameters()), images.dtype)
    forms = {'plain': OptimizedModel(copy.deepcopy(model).eval(), dtype, torch.preserve_format)}
    folded = fold_batchnorm(model).requires_grad_(False)
    for dtype in dtypes:
        name = str(dtype).removeprefix('torch.')
        network = copy.deepcopy(folded).to(dtype, memory_format=torch.channels_last)
        forms[name] = OptimizedModel(network, dtype, torch.channels_last)
        if not compile:
            continue
        compiled = OptimizedModel(
            torch.compile(network, dynamic=False, options={'freezing': True}), dtype, torch.channels_last)
        try:
            compiled(images)
        except Exception as e:  # the compiler's errors have no common base
            _logger.warning('torch.compile failed (%s); continuing without it', ' '.join(str(e).split()[:40]))
            compile = False
        else:
            forms[f'{name} compiled'] = compiled
    if onnx:
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(model, Path(folder) / 'model.onnx')
            forms['onnxruntime'] = OptimizedModel(
                OnnxModel(Path(folder) / 'model.onnx'), torch.float32, torch.contiguous_format)
    return forms


def optimize(
        model: nn.Module,
        images: torch.Tensor,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        compile: bool = True,
        onnx: bool = False,
        rounds: int = 7,
) -> OptimizedModel:
    """A copy of the network in the form that runs fastest on this machine, measured on `images`.

    For each of `dtypes`, the model with BatchNorm folded is measured in channels_last, both eager and compiled with
    frozen weights. The unchanged model is measured too, so the result is never slower.

    The logits of the float32 forms agree with those of the model within 1e-5 of the largest logit, and those of the
    bfloat16 forms within 3e-2.

    Args:
        model: Any network that `torch.fx` can trace, classifier or `features_only`.
        images: A batch (B, C, H, W) on the model's device, of the size that you will use. Other sizes give the same
            logits, but are compiled again.
        dtypes: Data types that may be used for computing; add `torch.bfloat16` if its rounding is acceptable.
        compile: Try `torch.compile`, which takes some seconds and needs a C++ compiler; a failure is only logged.
        onnx: Try onnxruntime too, in float32 on the CPU, which takes some seconds. It needs the extra `export`.
        rounds: Number of measurements of each form.

    Raises:
        ImportError: `onnx` is set and the extra is not installed.
        ValueError: `torch.fx` cannot trace the model, a type is not float32, bfloat16 or float16, `rounds` is below 1,
            or `onnx` is set and the images are not on the CPU.
    """
    if rounds < 1:
        raise ValueError(f'rounds is {rounds}; it must be at least 1')
    forms = inference_forms(model, images, dtypes, compile, onnx)
    calls = {name: lambda form=form: form(images) for name, form in forms.items()}
    times = alternate(calls, rounds, images.device.type)
    seconds = {name: statistics.median(t) for name, t in times.items()}
    chosen = min(seconds, key=seconds.get)
    best = forms[chosen]
    best.form, best.images_per_second = chosen, {name: len(images) / s for name, s in seconds.items()}
    return best


_DYNAMIC = {0: 'batch', 2: 'height', 3: 'width'}


def _prepared(model: nn.Module) -> tuple[nn.Module, torch.Tensor, str]:
    """Folded model on the CPU, an example batch for tracing, and the preprocessing and class names as JSON."""
    model = unwrap_model(model)
    if getattr(model, 'pretrained_cfg', {}).get('fixed_input_size'):
        raise ValueError(f'{type(model).__name__} takes images of one size only, but the files that this package '
                         f'writes take any size; use torch.onnx.export or torch.export')
    model = fold_batchnorm(model).cpu().float().requires_grad_(False)
    config = resolve_model_data_config(model)
    channels = getattr(model, 'in_chans', 3)
    config |= {'input_size': (channels, *config['input_size'][1:]), 'range': (0, 1)}
    if channels == 3:
        config['color'] = 'RGB'
    elif len(config['mean']) != channels:
        config |= {k: (statistics.mean(config[k]),) * channels for k in ('mean', 'std')}
    names = getattr(model, 'pretrained_cfg', {}).get('label_names') or ()
    # timm keeps the class names of the pretrained weights even if the classifier was replaced
    config['label_names'] = names if len(names) == getattr(model, 'num_classes', 0) else None
    # height and width differ from each other and from the configuration, so that no tracer takes them for constants
    _, height, width = config['input_size']
    return model, torch.randn(2, channels, height + 16, width + 32), json.dumps(config)


def to_onnx(model: nn.Module, path: str | Path) -> None:
    """Write an ONNX file for any batch and image size.

    The input is `images` (batch, C, height, width), the output `logits`. A `features_only` model has one output per
    feature map instead, named after its module (`layer1`...).

    BatchNorm is folded. The preprocessing and class names are stored as JSON in the file's metadata, under `config`.

    Raises:
        ImportError: The extra `export` is not installed.
        ValueError: `torch.fx` cannot trace the model, or it takes images of one size only.
    """
    model, images, config = _prepared(model)
    info = getattr(model, 'feature_info', None)
    maps = [n.replace('.', '_') for n in info.module_name()] if isinstance(info, FeatureInfo) else []
    if torch.__version__ >= (2, 9):  # a TorchVersion, which compares with tuples
        options = dict(dynamo=True, dynamic_shapes=(_DYNAMIC,), external_data=False)
    else:  # the exporter based on torch.export fails on BatchNorm
        sizes = {n: {0: 'batch', 2: f'{n}_height', 3: f'{n}_width'} for n in maps} or {'logits': {0: 'batch'}}
        options = dict(dynamo=False, dynamic_axes={'images': _DYNAMIC, **sizes})

    write_onnx(model, images, Path(path), config, input_names=['images'], output_names=maps or ['logits'], **options)


def write_onnx(model: nn.Module, example: torch.Tensor, path: Path, config: str, **options: Any) -> None:
    """Trace a model and write a checked ONNX file, with `config` (JSON) in its metadata.

    Args:
        model: Model that is ready to be traced.
        example: Example input.
        path: Path of the file.
        config: JSON for the metadata.
        options: Passed to `torch.onnx.export`.

    Raises:
        ImportError: The extra `export` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as e:
        raise ImportError(
            f"ONNX export needs the extra [export] ({e}); in a clone of wrn_timm: pip install -e '.[export]'") from e

    def write(beside: Path) -> None:
        torch.onnx.export(model, (example,), str(beside), verbose=False, **options)
        written = onnx.load(beside)
        onnx.helper.set_model_props(written, {'config': config})
        onnx.checker.check_model(written, full_check=True)
        onnx.save(written, beside)

    atomic_write(path, write)


def to_exported_program(model: nn.Module, path: str | Path) -> None:
    """Write a `torch.export` file, run by `torch.export.load(path).module()`, for any batch size.

    Height and width must be at least twice the last reduction: 8 pixels in the 6N + 4 family (32 with the ImageNet
    stem) and 64 in the ImageNet family. Feature maps of a single pixel would need another program. BatchNorm is folded.
    The preprocessing and class names are stored as JSON in the extra file `config.json`.

    Raises:
        RuntimeError: torch 2.6 cannot export the max pool of an ImageNet stem for every size.
        ValueError: `torch.fx` cannot trace the model, or it takes images of one size only.
    """
    model, images, config = _prepared(model)
    smallest = 2 * model.feature_info[-1]['reduction']
    sizes = {i: torch.export.Dim(name, min=smallest if i else None) for i, name in _DYNAMIC.items()}
    program = torch.export.export(model, (images,), dynamic_shapes=(sizes,), strict=False)
    atomic_write(Path(path), lambda p: torch.export.save(program, p, extra_files={'config.json': config}))


def to_torchscript(model: nn.Module, path: str | Path) -> None:
    """Write a TorchScript file, run by `torch.jit.load(path)` without this package, for any batch and image size.

    BatchNorm is folded. The preprocessing and class names are stored as JSON in the extra file `config.json`.

    Raises:
        ValueError: `torch.fx` cannot trace the model, or it takes images of one size only.
    """
    model, _, config = _prepared(model)
    script = torch.jit.script(model)  # not frozen: weights that are constants stay on the CPU
    atomic_write(Path(path), lambda p: torch.jit.save(script, p, _extra_files={'config.json': config}))


EXPORTERS = {'onnx': to_onnx, 'pt2': to_exported_program, 'ts': to_torchscript}


class OnnxModel(nn.Module):
    """A file written by `to_onnx`, run by onnxruntime on the CPU with as many threads as torch currently uses.

    Args:
        file: Path of the file; it is read once and can then be deleted.

    Raises:
        ImportError: onnxruntime is not installed.
    """

    def __init__(self, file: str | Path):
        super().__init__()
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # without spinning, waiting threads leave the cores to the rest of the program
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')
        self._session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
        self._classifies = [output.name for output in self._session.get_outputs()] == ['logits']

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Compute logits (B, classes), or the feature maps of a backbone, from float32 images (B, C, H, W)."""
        out = [torch.from_numpy(o) for o in self._session.run(None, {'images': images.numpy()})]
        return out[0] if self._classifies else out


def run_exported(path: str | Path, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
    """Run an exported file on images (B, C, H, W): `.onnx` (by onnxruntime), `.pt2` or `.ts`.

    Raises:
        ValueError: The file has another suffix.
    """
    path = Path(path)
    if path.suffix == '.onnx':
        return OnnxModel(path)(images)
    if path.suffix == '.pt2':
        return torch.export.load(path).module()(images)
    if path.suffix == '.ts':
        return torch.jit.load(path)(images)
    raise ValueError(f'the suffix of {path} is not one of .{", .".join(EXPORTERS)}')
