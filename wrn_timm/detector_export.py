"""Detectors as ONNX and TorchScript files, for photographs of any size.

    detector_to_onnx(open_detector('RUN'), 'detector.onnx')
    found, = ExportedDetector('detector.onnx')([image])     # as the detector itself
"""
from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from .detection import postprocessor
from .export import write_onnx
from .files import atomic_write

__all__ = ['DETECTOR_EXPORTERS', 'ExportedDetector', 'detector_to_onnx', 'detector_to_torchscript', 'in_common']

_OUTPUTS = ('boxes', 'labels', 'scores')
_TRACED = (3, 96, 128)
TOLERANCE = 1e-3  # of a score, and of a box in sides of the image


class _Transform(GeneralizedRCNNTransform):
    """torchvision's preprocessing, which resizes to the same size in a file as outside.

    Its own computes the size in float32 there and in Python's float64 outside. For many sizes of photographs (a fifth,
    if they are resized to 480 pixels), the resized one differs by a pixel then, and the boxes are others.
    """

    def resize(
            self,
            image: torch.Tensor,
            target: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Resize an image; for inference, so that `target` is None."""
        if torch.jit.is_scripting():
            height, width = image.shape[-2:]
            scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
            size = [int(height * scale), int(width * scale)]
        else:  # traced
            sides = torch._shape_as_tensor(image)[-2:].double()
            # one-dimensional, because ONNX gets numbers as float32
            least, most = (torch.full((1,), size, dtype=torch.float64) for size in (self.min_size[-1], self.max_size))
            scale = torch.minimum(least / sides.min()[None], most / sides.max()[None])
            size = list((sides * scale).floor().long().unbind())
        image = nn.functional.interpolate(image[None], size=size, mode='bilinear', align_corners=False)[0]
        return image, target


class _OfOneImage(nn.Module):
    """A detector as a function of one image, which is what a file can hold."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.jit.is_scripting():
            found = self.detector([image])[1][0]  # after the losses, of which there are none
        else:
            found = self.detector([image])[0]
        return found['boxes'], found['labels'], found['scores']


def _prepared(detector: nn.Module) -> tuple[_OfOneImage, str]:
    """A copy on the CPU to be exported, and what its file says of it, as JSON."""
    detector = copy.deepcopy(detector).cpu().float().requires_grad_(False)
    own = detector.transform
    detector.transform = _Transform(own.min_size, own.max_size, own.image_mean, own.image_std, own.size_divisible)
    config = {'classes': list(detector.classes), 'threshold': detector.threshold,
              'lowest_score': postprocessor(detector).score_thresh, 'image_size': own.max_size}
    return _OfOneImage(detector).eval(), json.dumps(config)


def detector_to_onnx(detector: nn.Module, path: str | Path) -> None:
    """Write an ONNX file with input `image` (3, height, width), RGB, float32, 0 to 1, of any size, and outputs `boxes`
    (n, 4), `labels` (n,) and `scores` (n,): what the detector returns for this image.

    Class names (label 1 is the first), the detector's threshold, the lowest score of what is returned and the image
    size are JSON in the file's metadata, under `config`. The lowest score is the initializer whose name ends in
    `score_thresh`, where it can be changed.

    Args:
        detector: From `open_detector`.
        path: File.

    Raises:
        ImportError: The extra `export` is not installed.
    """
    network, config = _prepared(detector)
    last = postprocessor(network.detector)
    lowest = torch.tensor(last.score_thresh)
    del last.score_thresh
    last.register_buffer('score_thresh', lowest)  # a number would be written into the middle of the graph

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # this exporter is old, but torch.export cannot trace detectors
        write_onnx(
            network, torch.rand(_TRACED), Path(path), config, dynamo=False, input_names=['image'],
            output_names=list(_OUTPUTS),
            dynamic_axes={'image': {1: 'height', 2: 'width'}, **{name: {0: 'objects'} for name in _OUTPUTS}})


def detector_to_torchscript(detector: nn.Module, path: str | Path) -> None:
    """Write a TorchScript file, run by `torch.jit.load(path)` without this package (`import torchvision` adds the
    operators it needs). It takes an image and returns boxes, labels and scores as the file of `detector_to_onnx` does.

    Class names, lowest score and image size are JSON in the file's extra `config.json`.

    Args:
        detector: From `open_detector`.
        path: File.
    """
    network, config = _prepared(detector)
    network.detector._has_warned = True  # of what a scripted detector returns
    script = torch.jit.script(network)
    atomic_write(Path(path), lambda p: torch.jit.save(script, p, _extra_files={'config.json': config}))


DETECTOR_EXPORTERS = {'onnx': detector_to_onnx, 'ts': detector_to_torchscript}

_Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def _with_threshold(file: Path, threshold: float) -> bytes:
    import onnx
    model = onnx.load(file)
    lowest = next(tensor for tensor in model.graph.initializer if tensor.name.endswith('score_thresh'))
    lowest.CopyFrom(onnx.numpy_helper.from_array(np.float32(threshold), lowest.name))
    return model.SerializeToString()


def _opened_onnx(file: Path, threshold: float | None) -> tuple[_Run, str]:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        str(file) if threshold is None else _with_threshold(file, threshold), options,
        providers=['CPUExecutionProvider'])
    config = session.get_modelmeta().custom_metadata_map['config']
    return lambda image: [torch.from_numpy(o) for o in session.run(_OUTPUTS, {'image': image.numpy()})], config


def _opened_script(file: Path, threshold: float | None) -> tuple[_Run, str]:
    extra = {'config.json': ''}
    script = torch.jit.load(str(file), _extra_files=extra)
    if threshold is not None:
        postprocessor(script.detector).score_thresh = float(threshold)
    return script, extra['config.json']


class ExportedDetector(nn.Module):
    """A file of `detector_to_onnx` (run by onnxruntime on the CPU) or `detector_to_torchscript`, called as a detector.

    Args:
        file: `.onnx` or `.ts`.
        threshold: Lowest score of an object; None for that of the file.

    Attributes:
        classes: Names; label 1 is the first.

    Raises:
        ImportError: onnxruntime is not installed, or, with a `threshold`, onnx.
        ValueError: The file has another suffix.
    """

    def __init__(self, file: str | Path, threshold: float | None = None):
        super().__init__()
        file = Path(file)
        if file.suffix not in ('.onnx', '.ts'):
            raise ValueError(f'the suffix of {file} is not one of .onnx, .ts')
        self._run, config = (_opened_onnx if file.suffix == '.onnx' else _opened_script)(file, threshold)
        self.classes = tuple(json.loads(config)['classes'])

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Float32 images (3, H, W), 0 to 1, to `boxes` (N, 4), `labels` (N,) and `scores` (N,) of each."""
        return [dict(zip(_OUTPUTS, self._run(image), strict=True)) for image in images]


@torch.no_grad()
def in_common(file: str | Path, detector: nn.Module, images: Sequence[torch.Tensor]) -> tuple[int, int]:
    """How many objects an exported file and the detector both find on images, and how many they find in all.

    The lowest score is 0 for that, so that there are objects on every image. An object is found by both if the labels
    are the same, the scores differ by at most `TOLERANCE`, and the sides of the boxes by that times the longer side of
    the image.

    Args:
        file: Of `detector_to_onnx` or `detector_to_torchscript`.
        detector: On the CPU.
        images: (3, H, W), 0 to 1.
    """
    detector = copy.deepcopy(detector)
    postprocessor(detector).score_thresh = 0.
    exported, same, total = ExportedDetector(file, 0.), 0, 0
    for image in images:
        a, b = (found([image])[0] for found in (exported, detector))
        apart = (a['boxes'][:, None] - b['boxes']).abs().amax(2) / max(image.shape)
        close = (apart <= TOLERANCE) & ((a['scores'][:, None] - b['scores']).abs() <= TOLERANCE) & (
            a['labels'][:, None] == b['labels'])
        common = min(int(close.any(1).sum()), int(close.any(0).sum()))
        same, total = same + common, total + len(a['scores']) + len(b['scores']) - common
    return same, total
