#!/usr/bin/env python3
"""Write what is made from the models, the weights folders and `scripts/benchmarks/`: the tables of README.md and
weights/README.md, and `wrn_timm/released.json`, by which the package knows released weights that are not on the
machine.

    python scripts/tables.py            # write
    python scripts/tables.py --check    # exit 1 where they are out of date
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from wrn_timm.hub import PAPER_ERROR
from wrn_timm.train.transfer_results import read_transfer
from wrn_timm.weights import WEIGHTS_FILE, more_accurate, published
from wrn_timm.wrn import VARIANTS
from wrn_timm.wrn_imagenet import default_cfgs as imagenet_cfgs

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'scripts' / 'benchmarks'  # what `benchmark.py SECTION --json` printed, a file a section


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding='utf-8'))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Of what has a value in any row."""
    kept = [i for i in range(len(header)) if any(row[i] != '-' for row in rows)]
    header, *rows = ([row[i] for i in kept] for row in [header, *rows])
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [header, ['---'] * len(header), *rows])


def models_table() -> str:
    """Parameters, multiply-adds at the default input and reductions of every model."""
    rows = []
    names = {*imagenet_cfgs, *(f'wrn{depth}_{width}' for depth, width in VARIANTS)}
    for name in (n for n in timm.list_models('wrn*') if n in names):
        model = timm.create_model(name, device='meta').eval()
        size = model.pretrained_cfg['input_size']
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *size, device='meta'))
        rows.append([
            f'`{name}`', f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M',
            f'{counter.get_total_flops() / 2e9:.2f}', str(size[-1]),
            ', '.join(str(f['reduction']) for f in model.feature_info)])
    return table(['model', 'parameters', 'GMACs', 'input', 'reductions'], rows)


def weights_folders() -> list[tuple[Path, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Each released folder, with its metrics, recipe and configuration."""
    folders = sorted((p for p in (ROOT / 'weights').iterdir() if p.is_dir()),
                     key=lambda p: timm.models._registry._natural_key(p.name))
    return [(f, *(read(f / f'{n}.json') for n in ('metrics', 'recipe', 'config'))) for f in folders]


def known_errors() -> dict[str, float]:
    """Test error in % of the weights that we released, then of other people's as they published it."""
    ours = {folder.name: 100 - metrics['top1'] for folder, metrics, *_ in weights_folders()}
    return ours | {name: entry['error'] for name, entry in published().items()}


def named(name: str, known: dict[str, float], link: str = '') -> str:
    """Weights in a table, marked where they are their network's default: the first of those known."""
    default = name == next(n for n in known if n.startswith(f"{name.partition('.')[0]}."))
    return (f'[`{name}`]({link})' if link else f'`{name}`') + ', default' * default


def beaten(name: str, known: dict[str, float]) -> str:
    """The more accurate weights of the same network and classes, with their error."""
    better = more_accurate(name, known)
    return f'`{better}`, {known[better]:.2f}' if better else '-'


def weights_table() -> str:
    """Test error of each released folder beside what is published."""
    rows, known = [], known_errors()
    for folder, metrics, run, config in weights_folders():
        paper = f'{PAPER_ERROR[folder.name]:.2f}' if folder.name in PAPER_ERROR else '-'
        rows.append([
            named(folder.name, known, f'/weights/{folder.name}'), f"**{known[folder.name]:.2f}**", paper,
            beaten(folder.name, known), f"{metrics['ece']:.2f}",
            f"{(folder / WEIGHTS_FILE).stat().st_size / 1e6:.1f} MB",
            f"{run['recipe']['epochs']} epochs, {run['environment']['hardware']}", f"`{config['sha256'][:12]}`"])
    header = ['weights', 'test error, %', 'paper', 'more accurate', 'ECE, %', 'file', 'training', 'sha256']
    return table(header, rows)


def published_table() -> str:
    """Test error of other people's weights as they published it, beside that of ours."""
    rows, known = [], known_errors()
    for name, entry in published().items():
        arch, tag = name.split('.')
        model = timm.create_model(name, device='meta')
        ours = known.get(f"{arch}.{tag.removeprefix('pcv_')}")
        rows.append([
            named(name, known), f"{entry['error']:.2f}", f'**{ours:.2f}**' if ours else '-', beaten(name, known),
            f'{4 * sum(t.numel() for t in model.state_dict().values()) / 1e6:.0f} MB', f"`{entry['sha1'][:12]}`"])
    header = ['weights', 'test error, %, as published', 'ours', 'more accurate', 'file', 'sha1']
    return table(header, rows)


def transfer_table() -> str:
    """What each released folder's `transfer.json` says of other data sets."""
    ways = ('kNN', 'linear probe', 'head', 'gradual', 'all', 'from scratch')
    rows = []
    for folder, *_ in weights_folders():
        results = read_transfer(folder)
        for result in sorted(results, key=lambda r: (ways.index(r['way']), r.get('stem', ''), r['input_size'])):
            several = result['seeds'] > 1
            scores = (f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if several else '')
                      for s in (result['mean_per_class'], result['top1']))
            rows.append([
                f'`{folder.name}`', result['way'] + (f", {result['stem']} stem" if result.get('stem') else ''),
                str(result['input_size']), str(result.get('epochs', '-')),
                f"{result['dataset']}, {result['protocol']}", str(result['seeds']), *scores,
                f"{result['seconds'] / 60 / result['seeds']:.1f}"])
    header = ['weights', 'way', 'px', 'epochs', 'data, protocol', 'seeds', 'mean of the classes, %', 'all files, %',
              'minutes a seed']
    return table(header, rows)


def compared(sections: list[str], first: Callable[[dict[str, Any]], str], cell: Callable[[dict[str, Any]], str]) -> str:
    """Measurements of `benchmark.py`: a column a case, a row a contestant, the first of which the others are over."""
    cases = [c for s in sections for c in read(BENCHMARKS / f'{s}.json')['sections'][s]]
    names = list(dict.fromkeys(row['name'] for case in cases for row in case['rows']))
    rows = []
    for name in names:
        found = [next((r for r in case['rows'] if r['name'] == name and 'ratio' in r), None) for case in cases]
        show = first if name == names[0] else cell
        rows.append([name, *(show(row) if row else '-' for row in found)])
    return table(['times as fast as the first', *(case['name'] for case in cases)], rows)


def inference_table() -> str:
    """Speed of inference, in batches and one image at a time."""
    return compared(['evaluate', 'latency'], lambda row: f"{row['images_per_second']:.0f} images/s"
                    if 'images_per_second' in row else f"{row['ms']:.1f} ms", lambda row: f"{row['ratio']:.2f}")


def training_table() -> str:
    """Speed and peak memory of training steps."""
    return compared(['train'], lambda row: f"{row['images_per_second']:.1f} images/s, {row['peak_mb']:.0f} MB",
                    lambda row: f"{row['ratio']:.2f}, memory {row['memory']:.2f}")


def trainers_table() -> str:
    """Accuracy that each library's trainer reaches from the same weights, as `benchmark.py trainers` measured it."""
    found = [read(file) for file in sorted(BENCHMARKS.glob('trainers_*.json'), reverse=True)]
    rows = []
    for i, row in enumerate(found[0]['rows']):
        scores = [other['rows'][i]['mean_per_class'] for other in found]
        rows.append([row['trainer'], *(
            f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if len(s['values']) > 1 else '') for s in scores)])
    header = '{data}, {split}, {input_size} px, {epochs} epochs, seeds: {seeds}'
    return table(['trainer', *(header.format(**f) for f in found)], rows)


def released() -> str:
    """`wrn_timm/released.json`."""
    return json.dumps({
        folder.name: {
            'size': (folder / WEIGHTS_FILE).stat().st_size, 'sha256': config['sha256'],
            'license': config['pretrained_cfg']['license'], 'top1': metrics['top1']}
        for folder, metrics, _, config in weights_folders()}, indent=2) + '\n'


TABLES: dict[str, Callable[[], str]] = {
    'models': models_table, 'weights': weights_table, 'published': published_table, 'transfer': transfer_table,
    'inference': inference_table, 'training': training_table, 'trainers': trainers_table}


def rewritten(text: str) -> str:
    """The text with every generated table made anew."""
    for name, make in TABLES.items():
        pattern = rf'(<!-- {name}: scripts/tables\.py -->\n).*?(\n<!-- /{name} -->)'
        if re.search(pattern, text, flags=re.S):
            text = re.sub(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.S)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    args = parser.parse_args(argv)
    stale = 0
    made = {path: rewritten(path.read_text(encoding='utf-8'))
            for path in (ROOT / 'README.md', ROOT / 'weights' / 'README.md')}
    for path, new in {**made, ROOT / 'wrn_timm' / 'released.json': released()}.items():
        if path.read_text(encoding='utf-8') != new:
            stale += 1
            print(f'{path.name} of {path.parent.name}/ {"is out of date" if args.check else "written"}')
            if not args.check:
                path.write_text(new, encoding='utf-8')
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
