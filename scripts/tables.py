#!/usr/bin/env python3
"""Generate the tables, charts and data derived from the models, the weights folders and `scripts/benchmarks/`.

These are the tables between markers in the READMEs, the charts in `.github/`, and `wrn_timm/released.json`, which
describes released weights to the package when they are not on the machine.

    python scripts/tables.py            # write them
    python scripts/tables.py --check    # exit 1 if any is out of date
"""
from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from benchmarks.charts import chart_is_current, draw_transfer, write_chart
from torch.utils.flop_counter import FlopCounterMode

from wrn_timm.card import PAPER_ERROR
from wrn_timm.schemas import environments
from wrn_timm.train.transfer_results import read_transfer
from wrn_timm.weights import WEIGHTS_FILE, more_accurate, published
from wrn_timm.wrn import VARIANTS
from wrn_timm.wrn_imagenet import default_cfgs as imagenet_cfgs

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / 'scripts' / 'benchmarks'  # output of `benchmark.py SECTION --json`, one file per section
READMES = [ROOT / folder / 'README.md' for folder in ('', 'wrn_timm', 'weights', 'scripts/benchmarks')]
METHODS = {'kNN': 'kNN', 'linear probe': 'linear probe', 'head': 'classifier only', 'gradual': 'gradual',
           'all': 'all layers', 'from scratch': 'from scratch'}  # by their name in transfer.json


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding='utf-8'))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a Markdown table, without columns that are empty in every row."""
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
    """Return each released folder with its metrics, recipe and configuration."""
    folders = sorted((p for p in (ROOT / 'weights').iterdir() if p.is_dir()),
                     key=lambda p: [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', p.name)])
    return [(f, *(read(f / f'{n}.json') for n in ('metrics', 'recipe', 'config'))) for f in folders]


def known_errors() -> dict[str, float]:
    """Test error in % of our released weights, then of third-party weights as published."""
    ours = {folder.name: 100 - metrics['top1'] for folder, metrics, *_ in weights_folders()}
    return ours | {name: entry['error'] for name, entry in published().items()}


def named(name: str, known: dict[str, float], link: str = '') -> str:
    """Format the name of weights, marking the default of the network, which is the first one in `known`."""
    default = name == next(n for n in known if n.startswith(f"{name.partition('.')[0]}."))
    return (f'[`{name}`]({link})' if link else f'`{name}`') + ' (default)' * default


def beaten(name: str, known: dict[str, float]) -> str:
    """More accurate weights of the same network and classes, with their error; '-' if there are none."""
    better = more_accurate(name, known)
    return f'`{better}`, {known[better]:.2f}' if better else '-'


def hardware(run: dict[str, Any]) -> str:
    """Hardware of a run, without the processor model, which is in the card."""
    return ', then '.join(dict.fromkeys(env['hardware'].partition(' (')[0] for env in environments(run)))


def training_minutes(folder: Path) -> float:
    """Training time in minutes of a released folder, from its history."""
    with open(folder / 'history.csv', encoding='utf-8', newline='') as file:
        return float(list(csv.DictReader(file))[-1]['seconds']) / 60


def overview_table() -> str:
    """Test error, size and training time of our weights, then of third-party weights, one row per network."""
    known = known_errors()
    rows = [
        [named(folder.name, known, f'/weights/{folder.name}'), f'**{known[folder.name]:.2f}**', file_size(folder.name),
         f"{training_minutes(folder):.0f} min on {hardware(run)}"]
        for folder, _, run, _ in weights_folders()]
    for arch in dict.fromkeys(name.partition('.')[0] for name in published()):
        names = [name for name in published() if name.startswith(f'{arch}.')]
        rows.append([', '.join(named(name, known) for name in names), ', '.join(f'{known[name]:.2f}' for name in names),
                     f'{file_size(names[0])} each', 'by pytorchcv'])
    return table(['weights', 'test error, %', 'file', 'training'], rows)


def file_size(name: str) -> str:
    """Size of the weights file of `<arch>.<tag>`; for third-party weights, size of the tensors in float32."""
    file = ROOT / 'weights' / name / WEIGHTS_FILE
    if file.is_file():
        return f'{file.stat().st_size / 1e6:.1f} MB'
    tensors = timm.create_model(name, device='meta').state_dict().values()
    return f'{4 * sum(t.numel() for t in tensors) / 1e6:.0f} MB'


def weights_table() -> str:
    """Test error of each released folder beside published results."""
    rows, known = [], known_errors()
    for folder, metrics, run, config in weights_folders():
        paper = f'{PAPER_ERROR[folder.name]:.2f}' if folder.name in PAPER_ERROR else '-'
        over = metrics.get('seeds', {}).get('top1')
        seeds = f"{100 - over['mean']:.2f} ± {over['std']:.2f} ({len(over['values'])})" if over else '-'
        rows.append([
            named(folder.name, known, f'/weights/{folder.name}'), f"**{known[folder.name]:.2f}**", seeds, paper,
            beaten(folder.name, known), f"{metrics['ece']:.2f}", file_size(folder.name),
            f"{run['recipe']['epochs']} epochs, {training_minutes(folder):.0f} min, {hardware(run)}",
            f"`{config['sha256'][:12]}`"])
    header = ['weights', 'test error, %', 'over seeds', 'paper', 'more accurate', 'ECE, %', 'file', 'training',
              'sha256']
    return table(header, rows)


def published_table() -> str:
    """Published test error of third-party weights, beside that of our own."""
    rows, known = [], known_errors()
    for name, entry in published().items():
        arch, tag = name.split('.')
        ours = known.get(f"{arch}.{tag.removeprefix('pcv_')}")
        rows.append([
            named(name, known), f"{entry['error']:.2f}", f'**{ours:.2f}**' if ours else '-', beaten(name, known),
            file_size(name), f"`{entry['sha1'][:12]}`"])
    header = ['weights', 'published test error, %', 'ours', 'more accurate', 'file', 'sha1']
    return table(header, rows)


def caltech_results(folder: Path) -> list[dict[str, Any]]:
    """Results of a released folder on Caltech 101 with 30 random training images per class."""
    return [r for r in read_transfer(folder) if (r['dataset'], r['protocol']) == ('caltech101', 'random30')]


def transfer_table() -> str:
    """The results on Caltech 101 in the `transfer.json` of each released folder."""
    ways = list(METHODS)
    rows = []
    for folder, *_ in weights_folders():
        results = caltech_results(folder)
        for result in sorted(results, key=lambda r: (ways.index(r['way']), r.get('stem', ''), r['input_size'])):
            several = result['seeds'] > 1
            scores = (f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if several else '')
                      for s in (result['mean_per_class'], result['top1']))
            rows.append([
                f'`{folder.name}`', METHODS[result['way']] + (f", {result['stem']} stem" if result.get('stem') else ''),
                str(result['input_size']), str(result.get('epochs', '-')), str(result['seeds']), *scores,
                f"{result['seconds'] / 60 / result['seeds']:.1f}"])
    header = ['weights', 'method', 'px', 'epochs', 'seeds', 'mean per-class accuracy, %', 'accuracy, %',
              'minutes per seed']
    return table(header, rows)


def compared(sections: list[str], first: Callable[[dict[str, Any]], str], cell: Callable[[dict[str, Any]], str]) -> str:
    """Measurements of `benchmark.py`: one column per case, one row per contestant, each relative to the first row."""
    cases = [c for s in sections for c in read(BENCHMARKS / f'{s}.json')['sections'][s]]
    names = list(dict.fromkeys(row['name'] for case in cases for row in case['rows']))
    rows = []
    for name in names:
        found = [next((r for r in case['rows'] if r['name'] == name and 'ratio' in r), None) for case in cases]
        show = first if name == names[0] else cell
        rows.append([name, *(show(row) if row else '-' for row in found)])
    return table(['speed relative to the first row', *(case['name'] for case in cases)], rows)


def inference_table() -> str:
    """Speed of inference, in batches and one image at a time."""
    return compared(['evaluate', 'latency'], lambda row: f"{row['images_per_second']:.0f} images/s"
                    if 'images_per_second' in row else f"{row['ms']:.1f} ms", lambda row: f"{row['ratio']:.2f}")


def training_table() -> str:
    """Speed and peak memory of training steps."""
    return compared(['train'], lambda row: f"{row['images_per_second']:.1f} images/s, {row['peak_mb']:.0f} MB",
                    lambda row: f"{row['ratio']:.2f}, memory {row['memory']:.2f}")


def trainers_table() -> str:
    """Accuracy that each library's trainer reaches from the same weights, measured by `benchmark.py trainers`."""
    found = [read(file) for file in sorted(BENCHMARKS.glob('trainers_*.json'), reverse=True)]
    rows = []
    for i, row in enumerate(found[0]['rows']):
        scores = [other['rows'][i]['mean_per_class'] for other in found]
        rows.append([row['trainer'], *(
            f"{s['mean']:.1f}" + (f" ± {s['std']:.1f}" if len(s['values']) > 1 else '') for s in scores)])
    header = '{data}, {split}, {input_size} px, {epochs} epochs, seeds: {seeds}'
    return table(['trainer', *(header.format(**f) for f in found)], rows)


def released() -> str:
    """Content of `wrn_timm/released.json`."""
    return json.dumps({
        folder.name: {
            'size': (folder / WEIGHTS_FILE).stat().st_size, 'sha256': config['sha256'],
            'license': config['pretrained_cfg']['license'], 'top1': metrics['top1']}
        for folder, metrics, _, config in weights_folders()}, indent=2) + '\n'


TABLES: dict[str, Callable[[], str]] = {
    'models': models_table, 'overview': overview_table, 'weights': weights_table, 'published': published_table,
    'transfer': transfer_table, 'inference': inference_table, 'training': training_table, 'trainers': trainers_table}


def transfer_data() -> dict[str, dict[str, list[float | None]]]:
    """Mean per-class accuracy on Caltech 101 at 32 px and its standard deviation, by weights and method."""
    found = {}
    for folder, *_ in weights_folders():
        scores = {METHODS[r['way']]: r for r in caltech_results(folder) if r['input_size'] == 32 and not r.get('stem')}
        found[folder.name] = {
            method: [r['mean_per_class']['mean'], r['mean_per_class']['std'] if r['seeds'] > 1 else None]
            for method, r in sorted(scores.items(), key=lambda item: list(METHODS.values()).index(item[0]))}
    return {name: scores for name, scores in found.items() if scores}


CHARTS: dict[str, tuple[Callable[[], Any], Callable[..., None]]] = {'caltech101.png': (transfer_data, draw_transfer)}


def rewritten(text: str) -> str:
    """Return the text with every generated table updated."""
    for name, make in TABLES.items():
        pattern = rf'(<!-- {name}: scripts/tables\.py -->\n).*?(\n<!-- /{name} -->)'
        if re.search(pattern, text, flags=re.S):
            text = re.sub(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.S)
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 if anything is out of date')
    args = parser.parse_args(argv)
    texts = {path: rewritten(path.read_text(encoding='utf-8')) for path in READMES}
    texts[ROOT / 'wrn_timm' / 'released.json'] = released()
    stale = {path: lambda path=path, new=new: path.write_text(new, encoding='utf-8')
             for path, new in texts.items() if path.read_text(encoding='utf-8') != new}
    for name, (collect, draw) in CHARTS.items():
        path, data = ROOT / '.github' / name, collect()
        if not chart_is_current(path, data):
            stale[path] = lambda path=path, data=data, draw=draw: write_chart(path, data, draw)
    for path, write in stale.items():
        print(f'{path.relative_to(ROOT)} {"is out of date" if args.check else "written"}')
        if not args.check:
            write()
    return 1 if args.check and stale else 0


if __name__ == '__main__':
    sys.exit(main())
