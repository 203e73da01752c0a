"""Export a pretrained network to a file that other programs can run.

    wrn-timm export --model wrn16_1.cifar10 --to onnx --out wrn16_1.onnx    # or pt2, ts
    wrn-timm export --model wrn16_1.cifar10 --features --to onnx --out backbone.onnx
    wrn-timm export --model RUN --to onnx --out detector.onnx               # or ts; RUN is a run of detect

The file is checked against the network, and kept only if their outputs agree.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torchvision.transforms.functional import pil_to_tensor

from ..card import first_photographs
from ..data.images import read_rgb
from ..detection import DETECTORS, find_detector, open_detector
from ..detector_export import DETECTOR_EXPORTERS, in_common
from ..export import EXPORTERS, run_exported
from ..names import printable
from ..weights import open_model
from .common import Options, reports_errors
from .options import option, parse

TOLERANCE = 1e-4  # relative to the largest logit; other kernels sum in another order
LEAST_IN_COMMON = 0.95  # fraction of objects; near the overlap limit, either of two boxes may be dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    model: str
    """timm name, weights folder, or run directory of finetune, train or detect."""
    to: Literal['onnx', 'pt2', 'ts']
    """Format: ONNX, torch.export (pt2; not for detectors) or TorchScript (ts)."""
    out: str = option(metavar='FILE')
    """File to write; its name ends in .onnx, .pt2 or .ts."""
    features: bool = False
    """Export the feature maps (features_only) in place of the logits."""

    def __post_init__(self):
        super().__post_init__()
        out = Path(self.out)
        if out.suffix != f'.{self.to}':
            raise ValueError(f'--to {self.to} writes a .{self.to} file, but --out is {out}')
        if out.exists():
            raise ValueError(f'{out} already exists; choose another --out')
        if self.of_detector and self.to not in DETECTOR_EXPORTERS:
            raise ValueError(f'torch.export cannot trace {self.model}, a detector, because the number of boxes depends '
                             f'on the image; choose --to {" or ".join(DETECTOR_EXPORTERS)}')
        if self.of_detector and self.features:
            raise ValueError(f'--features is for classifiers, and {self.model} is a detector; leave it out')

    @property
    def of_detector(self) -> bool:
        """Whether the model is a detector, which on the Hub is recognised by its name."""
        return find_detector(self.model) is not None or (
            self.model.startswith('hf-hub:') and self.model.rpartition('/')[2].startswith(tuple(DETECTORS)))


def export_detector(options: ExportOptions, out: Path) -> str:
    """Export a detector, check the file on photographs, and return the result of the check as text."""
    detector = open_detector(options.model)
    DETECTOR_EXPORTERS[options.to](detector, out)
    images = [pil_to_tensor(read_rgb(path)) / 255 for path in first_photographs()[:3]]
    same, total = in_common(out, detector, images)
    sizes = ', '.join(f'{image.shape[2]} x {image.shape[1]}' for image in images)
    found = f'on photographs of {sizes}, it and the detector agree on {same} of {total} objects'
    if not total or same < LEAST_IN_COMMON * total:
        raise RuntimeError(f'{out} is removed: {found}, less than {LEAST_IN_COMMON:.0%}')
    return found


def export_classifier(options: ExportOptions, out: Path) -> str:
    """Export a classifier or its backbone, check the file on random images, and return the result as text."""
    model = open_model(options.model, **{'features_only': True} if options.features else {})
    EXPORTERS[options.to](model, out)
    least = 2 * model.feature_info[-1]['reduction']  # as required by to_exported_program
    images = torch.randn(3, model.pretrained_cfg['input_size'][0], least + 8, least + 24)
    with torch.no_grad():
        expected, found = (list(o) if options.features else [o] for o in (model(images), run_exported(out, images)))
    difference = torch.stack(
        [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]).max().item()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{out} is removed: its output differs from the network's by {difference:.1g} of the "
                           f'largest value; the limit is {TOLERANCE:g}')
    return (f'its {"maps" if options.features else "logits"} differ from the network\'s by {difference:.1g} of the '
            f'largest, on 3 images of {least + 8} x {least + 24}')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('export', __doc__), ExportOptions)
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = (export_detector if options.of_detector else export_classifier)(options, out)
    except BaseException:
        out.unlink(missing_ok=True)  # it did not exist before
        raise
    print(f'{printable(out)}: {out.stat().st_size / 1e6:.1f} MB; {found}')
    return 0
