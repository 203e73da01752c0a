#!/usr/bin/env python3
"""Write a pretrained network as one file that other programs run, and check the file against the network.

    python scripts/export.py --model wrn16_1.cifar10 --to onnx --out wrn16_1.onnx    # or pt2, ts
    python scripts/export.py --model wrn16_1.cifar10 --features --to onnx --out backbone.onnx
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.command import TRACEBACK_HELP, reports_errors
from wrn_timm.export import EXPORTERS, run_exported
from wrn_timm.names import printable
from wrn_timm.weights import open_model

TOLERANCE = 1e-4  # of the largest logit; other kernels add in another order


@reports_errors
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help='timm name or weights folder')
    parser.add_argument('--to', required=True, choices=EXPORTERS, help='ONNX, torch.export or TorchScript')
    parser.add_argument('--out', required=True, metavar='FILE', help='its name ends in .onnx, .pt2 or .ts')
    parser.add_argument('--features', action='store_true', help='the feature maps (features_only) in place of logits')
    parser.add_argument('--traceback', action='store_true', help=TRACEBACK_HELP)
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix != f'.{args.to}':
        parser.error(f'--to {args.to} writes a .{args.to} file; {out} is named otherwise')
    if out.exists():
        parser.error(f'{out} is there already; choose another --out')
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        model = open_model(args.model, **{'features_only': True} if args.features else {})
        EXPORTERS[args.to](model, out)
        least = 2 * model.feature_info[-1]['reduction']  # of to_exported_program
        images = torch.randn(3, model.pretrained_cfg['input_size'][0], least + 8, least + 24)
        with torch.no_grad():
            expected, found = (list(o) if args.features else [o] for o in (model(images), run_exported(out, images)))
        difference = torch.stack(
            [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]).max().item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f'{out} is removed: what it gives differs from the network by {difference:.1g} of the '
                               f'largest, more than {TOLERANCE:g}')
    except Exception:
        out.unlink(missing_ok=True)  # it was not there before
        raise
    print(f'{printable(out)}: {out.stat().st_size / 1e6:.1f} MB; its {"maps" if args.features else "logits"} differ '
          f'from the network\'s by {difference:.1g} of the largest, on 3 images of {least + 8} x {least + 24}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
