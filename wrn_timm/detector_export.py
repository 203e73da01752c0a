"""Export of detectors to ONNX and TorchScript, for photographs of any size.

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
TOLERANCE = 1e-3  # of scores, and of boxes relative to the longer side of the image


class _Transform(GeneralizedRCNNTransform):
    """torchvision's preprocessing, resizing to the same size in an exported file as in Python.

    torchvision computes the size in float32 in the file, but in float64 in Python. For many image sizes (a fifth, when
    resizing to 480 pixels), the results differ by a pixel, which changes the boxes.
    """

    def resize(
            self,
            image: torch.Tensor,
            target: dict[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Resize an image for inference; `target` is None."""
        if torch.jit.is_scripting():
            height, width = image.shape[-2:]
            scale = min(self.min_size[-1] / min(height, width), self.max_size / max(height, width))
            size = [int(height * scale), int(width * scale)]
        else:  # traced
            sides = torch._shape_as_tensor(image)[-2:].double()
            # one-dimensional, because scalars are exported to ONNX as float32
            least, most = (torch.full((1,), size, dtype=torch.float64) for size in (self.min_size[-1], self.max_size))
            scale = torch.minimum(least / sides.min()[None], most / sides.max()[None])
            size = list((sides * scale).floor().long().unbind())
        image = nn.functional.interpolate(image[None], size=size, mode='bilinear', align_corners=False)[0]
        return image, target


class _OfOneImage(nn.Module):
    """Wrap a detector as a function of a single image, which can be exported."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if torch.jit.is_scripting():
            found = self.detector([image])[1][0]  # a scripted detector returns losses and detections
        else:
            found = self.detector([image])[0]
        return found['boxes'], found['labels'], found['scores']


def _prepared(detector: nn.Module) -> tuple[_OfOneImage, str]:
    """Return a copy of the detector on the CPU for export, and its metadata as JSON."""
    detector = copy.deepcopy(detector).cpu().float().requires_grad_(False)
    own = detector.transform
    detector.transform = _Transform(own.min_size, own.max_size, own.image_mean, own.image_std, own.size_divisible)
    config = {'classes': list(detector.classes), 'threshold': detector.threshold,
              'lowest_score': postprocessor(detector).score_thresh, 'image_size': own.max_size}
    return _OfOneImage(detector).eval(), json.dumps(config)


def detector_to_onnx(detector: nn.Module, path: str | Path) -> None:
    """Write a detector as an ONNX file.

    The input `image` (3, height, width) is RGB, float32, 0 to 1, of any size. The outputs `boxes` (n, 4), `labels` (n,)
    and `scores` (n,) are what the detector returns for this image.

    The file's metadata holds JSON under `config`: class names (label 1 is the first), the detector's threshold, the
    lowest score that is returned, and the image size. To change the lowest score, edit the initializer whose name ends
    in `score_thresh`.

    Args:
        detector: Detector from `open_detector`.
        path: File to write.

    Raises:
        ImportError: The extra `export` is not installed.
    """
    network, config = _prepared(detector)
    last = postprocessor(network.detector)
    lowest = torch.tensor(last.score_thresh)
    del last.score_thresh
    last.register_buffer('score_thresh', lowest)  # a Python number would become a constant within the graph

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # this exporter is deprecated, but torch.export cannot trace detectors
        write_onnx(
            network, torch.rand(_TRACED), Path(path), config, dynamo=False, input_names=['image'],
            output_names=list(_OUTPUTS),
            dynamic_axes={'image': {1: 'height', 2: 'width'}, **{name: {0: 'objects'} for name in _OUTPUTS}})


def detector_to_torchscript(detector: nn.Module, path: str | Path) -> None:
    """Write a detector as a TorchScript file.

    `torch.jit.load(path)` runs it without this package; `import torchvision` adds the operators it needs. Like the file
    of `detector_to_onnx`, it takes an image and returns boxes, labels and scores.

    Class names, threshold, lowest score and image size are JSON in the extra file `config.json` within the file.

    Args:
        detector: Detector from `open_detector`.
        path: File to write.
    """
    network, config = _prepared(detector)
    network.detector._has_warned = True  # avoids a warning about the outputs of a scripted detector
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
    """An exported ONNX file (run by onnxruntime on the CPU) or TorchScript file, called like the detector.

    Args:
        file: File with the suffix `.onnx` or `.ts`.
        threshold: Lowest score of an object; None for that of the file.

    Attributes:
        classes: Class names; label 1 is the first.

    Raises:
        ImportError: onnxruntime, or onnx if a `threshold` is given, is not installed.
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
        """Return `boxes` (N, 4), `labels` (N,) and `scores` (N,) of each float32 image (3, H, W), 0 to 1."""
        return [dict(zip(_OUTPUTS, self._run(image), strict=True)) for image in images]


@torch.no_grad()
def in_common(file: str | Path, detector: nn.Module, images: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Count the objects that an exported file and the detector both find, and all that they find.

    The lowest score is set to 0, so that there are objects in every image. Two objects are the same if the labels are
    equal, the scores differ by at most `TOLERANCE`, and the box coordinates by at most `TOLERANCE` times the longer
    side of the image.

    Args:
        file: File of `detector_to_onnx` or `detector_to_torchscript`.
        detector: Detector on the CPU.
        images: Images (3, H, W), 0 to 1.
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
