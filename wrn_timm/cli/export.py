"""Write a pretrained network as one file that other programs run.

    wrn-timm export --model wrn16_1.cifar10 --to onnx --out wrn16_1.onnx    # or pt2, ts
    wrn-timm export --model wrn16_1.cifar10 --features --to onnx --out backbone.onnx

The file is checked against the network and kept only if both give the same.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from ..export import EXPORTERS, run_exported
from ..names import printable
from ..weights import open_model
from .common import Options, reports_errors
from .options import option, parse

TOLERANCE = 1e-4  # of the largest logit; other kernels add in another order


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    model: str
    """timm name or weights folder."""
    to: Literal['onnx', 'pt2', 'ts']
    """ONNX, torch.export or TorchScript."""
    out: str = option(metavar='FILE')
    """File to write; its name ends in .onnx, .pt2 or .ts."""
    features: bool = False
    """Export the feature maps (features_only) in place of the logits."""

    def __post_init__(self):
        super().__post_init__()
        out = Path(self.out)
        if out.suffix != f'.{self.to}':
            raise ValueError(f'--to {self.to} writes a .{self.to} file; {out} is named otherwise')
        if out.exists():
            raise ValueError(f'{out} is there already; choose another --out')


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, _ = parse(argv, ('export', __doc__), ExportOptions)
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        model = open_model(options.model, **{'features_only': True} if options.features else {})
        EXPORTERS[options.to](model, out)
        least = 2 * model.feature_info[-1]['reduction']  # of to_exported_program
        images = torch.randn(3, model.pretrained_cfg['input_size'][0], least + 8, least + 24)
        with torch.no_grad():
            expected, found = (
                list(o) if options.features else [o] for o in (model(images), run_exported(out, images)))
        difference = torch.stack(
            [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]).max().item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f'{out} is removed: what it gives differs from the network by {difference:.1g} of the '
                               f'largest, more than {TOLERANCE:g}')
    except BaseException:
        out.unlink(missing_ok=True)  # it was not there before
        raise
    print(f'{printable(out)}: {out.stat().st_size / 1e6:.1f} MB; its {"maps" if options.features else "logits"} differ '
          f'from the network\'s by {difference:.1g} of the largest, on 3 images of {least + 8} x {least + 24}')
    return 0
