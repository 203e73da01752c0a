#!/usr/bin/env python3
"""Name what photographs show.

    python scripts/predict.py --model wrn16_1.cifar10 photo.jpg [...]
    python scripts/predict.py --model RUN/weights --json photo.jpg
"""
from __future__ import annotations

import argparse
import json
import sys

import torch

import wrn_timm  # noqa: F401  (registers the models)
from wrn_timm.data.folders import read_rgb
from wrn_timm.train.validate import eval_transform, open_model


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE')
    parser.add_argument('--model', default='wrn16_1.cifar10', help='timm name or weights folder (default: %(default)s)')
    parser.add_argument('--json', action='store_true', help='print one JSON list')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    try:
        model = open_model(args.model).to(args.device)
    except (OSError, RuntimeError, ValueError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 1
    transform = eval_transform(model)
    names = model.pretrained_cfg.get('label_names') or [str(i) for i in range(model.num_classes)]

    results = []
    for path in args.images:
        try:
            image = transform(read_rgb(path))
        except ValueError as e:
            results.append({'image': path, 'error': str(e)})
            continue
        with torch.inference_mode():
            probabilities = model(image[None].to(args.device))[0].softmax(0)
        top = probabilities.topk(min(5, len(probabilities)))
        results.append({'image': path, 'top5': [
            {'label': names[i], 'probability': round(p, 6)}
            for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)]})

    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for r in results:
            print(r['image'])
            for row in r.get('top5', ()):
                print(f"  {100 * row['probability']:5.1f} %  {row['label']}")
            if 'error' in r:
                print(f"  error: {r['error']}")
    return 1 if any('error' in r for r in results) else 0


if __name__ == '__main__':
    sys.exit(main())
