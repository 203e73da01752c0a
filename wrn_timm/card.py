"""Complete a weights folder with its model card (README.md), metrics and golden logits."""
from __future__ import annotations

import csv
import dataclasses
import json
import re
import statistics
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from .data.bundled import golden_photographs
from .data.folders import walk_files
from .data.images import read_rgb
from .data.small_sets import normalise
from .files import atomic_write, write_json
from .names import duration
from .recipes import RECIPES, Recipe, finetune_command, settings_flags
from .schemas import environments, read_record
from .weights import open_model

__all__ = [
    'GOLDEN_FILE', 'PAPER_ERROR', 'TEMPLATES', 'TRANSFER_FILE', 'check_golden', 'check_run_records',
    'finish_weights_folder', 'first_photographs', 'model_card', 'owners_licence', 'read_history', 'training_line']

GOLDEN_FILE = 'golden.npz'  # inputs with their logits
TRANSFER_FILE = 'transfer.json'  # results of the weights on other data sets
_GOLDEN_PIXELS = 8 * 448 ** 2  # in total
GOLDEN_TOLERANCE = 1e-3  # in logits; other CPUs and GPUs sum in another order


# Test error in % (arXiv 1605.07146 v4): from table 5 (mean/std preprocessing) if it has the network, else table 4.
PAPER_ERROR = {
    'wrn40_1.cifar10': 6.85, 'wrn40_1.cifar100': 30.89, 'wrn40_2.cifar10': 5.33, 'wrn40_2.cifar100': 26.04,
    'wrn40_4.cifar10': 4.53, 'wrn40_4.cifar100': 21.18, 'wrn16_8.cifar10': 4.27, 'wrn16_8.cifar100': 20.43,
    'wrn28_10.cifar10': 4.00, 'wrn28_10.cifar100': 19.25, 'wrn40_8.cifar10': 4.66, 'wrn28_12.cifar10': 4.33,
    'wrn28_12.cifar100': 20.43, 'wrn22_8.cifar10': 4.38, 'wrn22_8.cifar100': 21.22, 'wrn22_10.cifar10': 4.44,
    'wrn22_10.cifar100': 20.75, 'wrn16_10.cifar10': 4.56, 'wrn16_10.cifar100': 21.59,
}


_IN_TABLE_5 = ('wrn40_4', 'wrn16_8', 'wrn28_10')
_WITH_DROPOUT = {'wrn28_10.cifar10': 3.89, 'wrn28_10.cifar100': 18.85}  # table 6

_TITLES = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100', 'svhn': 'SVHN'}
_TINY_IMAGES = ('The images come from Tiny Images, an uncurated collection from the web; the authors of CIFAR state no '
                'licence, and the images are not included.')
_LIMITS = {
    'cifar10': f'CIFAR-10 has ten classes of animals and vehicles at 32x32 pixels. {_TINY_IMAGES}',
    'cifar100': f'CIFAR-100 has a hundred classes at 32x32 pixels. {_TINY_IMAGES} Its classes baby, boy, girl, man '
                f'and woman carry the biases of that collection.',
}
TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader('wrn_timm'), autoescape=True, keep_trailing_newline=True, trim_blocks=True,
    undefined=jinja2.StrictUndefined)
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}


def _command(run: dict[str, Any]) -> str:
    """The command that repeats a training run."""
    if 'finetune' in run:
        return finetune_command(run['finetune'])
    settings = {**json.loads(json.dumps(_DEFAULTS)), **run['recipe']}  # earlier versions had fewer fields
    recipes = {name: json.loads(json.dumps(dataclasses.asdict(recipe))) for name, recipe in RECIPES.items()}
    candidates = {name: settings_flags(settings, recipe) for name, recipe in recipes.items()}
    nearest = min(candidates, key=lambda name: len(candidates[name]))
    return ' '.join([
        f'wrn-timm train --recipe {nearest}', *candidates[nearest],
        f"--data DIR --out RUN --seed {run['seed']}"])


def _title(metrics: dict[str, Any], run: dict[str, Any]) -> str:
    """Title of the data; a user's folder keeps its name, even if a known data set has the same name."""
    dataset = metrics['dataset']
    return dataset if 'finetune' in run else _TITLES.get(dataset, dataset)


def _part(metrics: dict[str, Any]) -> str:
    """Name of the part of the data that was measured."""
    return metrics.get('tested_on') or {'given': 'test'}.get(metrics['split'], metrics['split'])


def owners_licence(card: Path) -> str:
    """The licence that the owner of the weights wrote into their card; '' if there is none yet."""
    text = card.read_text(encoding='utf-8') if card.is_file() else ''
    found = re.match(r'---\n(?:(?!---).*\n)*?license: *([^\s#]+)', text)
    return found[1].strip('\'"') if found else ''


def read_history(folder: Path) -> list[dict[str, str]]:
    """The rows of a folder's `history.csv`."""
    with open(folder / 'history.csv', encoding='utf-8', newline='') as f:
        return list(csv.DictReader(f))


def training_line(took: str, steps: str, seed: int | None, record: dict[str, Any]) -> str:
    """Describe how long a run took and what it ran on.

    Args:
        took: Duration and speed.
        steps: Number of epochs, in words.
        seed: Seed of the run.
        record: Content of `recipe.json`, with the environments of the run.
    """
    ran = environments(record)
    machines = [env['hardware'] + {'bf16': ' in bfloat16', 'no': ' in float32'}.get(env.get('precision'), '')
                for env in ran]
    versions = [f"torch {env['torch']}, timm {env['timm']}, commit `{env['commit']}`" for env in ran]
    machine, version = (', then '.join(dict.fromkeys(each)) for each in (machines, versions))
    return f'{took} on {machine}, seed {seed}, {steps}; {version}.'


def _training(folder: Path, metrics: dict[str, Any], run: dict[str, Any]) -> str:
    """Describe how long a run took, how fast it was, its seed and what it ran on."""
    history = read_history(folder)
    last, speed = history[-1], ''
    if 'finetune' in run:
        took = duration(metrics.get('train_seconds', float(last['seconds'])))
        if 'images_per_second' in last:
            rate = statistics.harmonic_mean(float(row['images_per_second']) for row in history)
            speed = f' at {rate:.0f} images/s (over all epochs, without the held-out files)'
    else:
        took = f"{float(last['seconds']) / 60:.1f} minutes"
        if 'images_per_second' in last:
            speed = f" at {float(last['images_per_second']):.0f} images/s (last epoch)"
    steps = f"{last['epoch']} {'penalties tried' if 'penalty' in last else 'epochs'}"
    if metrics.get('stopped'):
        steps += f" (stopped by {metrics['stopped']})"
    seed = run.get('seed', run.get('finetune', {}).get('seed'))
    return training_line(took + speed, steps, seed, run)


def _accuracy(name: str, metrics: dict[str, Any], run: dict[str, Any]) -> str:
    """Describe the measured accuracy and its protocol, with the paper's figures after training on CIFAR."""
    recipe = run.get('recipe', {})
    title = _title(metrics, run)
    top5 = f"; top-5 {metrics['top5']:.2f} %" if metrics.get('top5') is not None else ''
    averaged = (recipe or run.get('finetune', {})).get('ema_decay')
    weights = f"{'averaged ' if averaged else ''}weights of the last epoch"
    if penalty := metrics.get('penalty'):
        weights = (f'classifier fitted to features, its L2 penalty ({penalty:.0e}) and temperature chosen on files not '
                   f'used for the fit')
    elif metrics.get('chosen_by') != 'the end of the schedule' and metrics.get(
            'holdout_files', run.get('finetune', {}).get('holdout')):
        weights = f"{'averaged ' if averaged else ''}weights of the epoch most accurate on files held out of training"
    seed = 'one seed'
    if over := metrics.get('seeds', {}).get('top1'):
        seed = (f"seed {run['seed']} of {len(over['values'])}, over which the error is "
                f"{100 - over['mean']:.2f} ± {over['std']:.2f} %")
    text = (
        f"Top-1 **{metrics['top1']:.2f} %** (error {100 - metrics['top1']:.2f} %){top5}; expected calibration error "
        f"{metrics['ece']:.2f} %. Measured by `{metrics.get('measured_by', 'wrn-timm validate')}` on "
        f"{metrics['images']:,} images of {title} ({_part(metrics)}) with these weights, reloaded from disk: {seed}, "
        f"{weights}.{' No choice was made on the test set.' if recipe else ''}")
    if recipe.get('dataset') not in ('cifar10', 'cifar100'):
        return text
    arch, with_dropout = name.partition('.')[0], bool(recipe.get('conv_drop_rate'))
    paper, trained = 'no figure for this network', f"{arch}.{recipe['dataset']}"  # the tag may be another name
    if trained in (errors := _WITH_DROPOUT if with_dropout else PAPER_ERROR):
        protocol = ('table 6: dropout 0.3, mean and std preprocessing, 200 epochs, median of five runs' if with_dropout
                    else 'table 5: mean and std preprocessing, 200 epochs, median of five runs'
                    if arch in _IN_TABLE_5 else 'table 4: ZCA preprocessing, 200 epochs')
        paper = f'{errors[trained]:.2f} ({protocol})'
    return f"""{text}

| | test error, % |
|---|---|
| these weights | {100 - metrics['top1']:.2f} ({recipe['epochs']} epochs, one run) |
| the paper | {paper} |"""


def check_run_records(folder: Path) -> dict[str, Any]:
    """Read and check `recipe.json` of a weights folder, the record of the run that made it.

    Raises:
        FileNotFoundError: `recipe.json` or `history.csv` is missing.
        ValueError: `recipe.json` is damaged or describes no run.
    """
    for name in ('recipe.json', 'history.csv'):
        if not (folder / name).is_file():
            raise FileNotFoundError(f'{folder} holds no {name}: only folders that wrn-timm train or finetune wrote can '
                                    f'be finished by --write')
    run = read_record(folder / 'recipe.json')
    if not any(isinstance(run.get(key), dict) for key in ('recipe', 'finetune')) or 'environment' not in run:
        raise ValueError(f'{folder / "recipe.json"} describes no run of wrn-timm train or finetune')
    return run


def model_card(folder: str | Path, metrics: dict[str, Any] | None = None) -> str:
    """Text of the card (README.md) of a weights folder, from its `config.json`, `metrics.json` and `recipe.json`.

    Fine-tuned weights have no licence until their owner writes one into the first lines of the card, where it is kept.

    Args:
        folder: Weights folder of a training or fine-tuning run.
        metrics: Metrics to use instead of those in `metrics.json`.
    """
    folder = Path(folder)
    config, run = json.loads((folder / 'config.json').read_text(encoding='utf-8')), check_run_records(folder)
    metrics = metrics or json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    arch, cfg = config['architecture'], config['pretrained_cfg']
    tuned, wide = 'finetune' in run, arch.startswith('wrn')
    settings = metrics.get('used') or run['finetune'] if tuned else run['recipe']
    name, dataset, title, size = f"{arch}.{cfg['tag']}", metrics['dataset'], _title(metrics, run), cfg['input_size'][-1]
    licence = cfg.get('license') or owners_licence(folder / 'README.md')
    data = ModelCardData(
        library_name='timm', license=licence or None, pipeline_tag='image-classification',
        tags=['timm', *['wide-residual-network'] * wide, 'wrn_timm'],
        datasets=[dataset] if title != dataset else None, model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=dataset, dataset_name=title,
                dataset_split=_part(metrics), metric_type='accuracy', metric_name='Top-1 accuracy',
                metric_value=metrics['top1']),
        ])
    limits = _LIMITS.get(dataset) if title != dataset else None
    network, trained, usage = arch, 'trained', name
    if wide:
        network = re.sub(r'^wrn(\d+)_(\d+)', r'WRN-\1-\2', arch).replace('_', '.')
        network += ' ([Wide Residual Networks](https://arxiv.org/abs/1605.07146))'
    if tuned:
        begun = 'fine-tuned from' if settings['pretrained'] else 'trained from random weights, with the settings of'
        trained, usage = Markup(f"{begun} `{settings['model']}`"), 'local-dir:RUN/best'  # code needs no escaping
        title = run.get('data', title)  # the training data; the measured photographs may be others
    return TEMPLATES.get_template('card.md').render(
        header=data.to_yaml(), licence=licence, name=name, network=network, trained=trained, title=title, usage=usage,
        accuracy=_accuracy(name, metrics, run), size=size, mean=tuple(cfg['mean']), std=tuple(cfg['std']),
        golden=GOLDEN_FILE, training=_training(folder, metrics, run), command=_command(run), settings=settings,
        limits=limits, num_classes=config['num_classes'], wide=wide)


def first_photographs() -> list[str]:
    """First bundled photograph of each class; these are the inputs of the golden outputs."""
    return [next(walk_files(folder)) for folder in sorted(golden_photographs().iterdir()) if folder.is_dir()]


def finish_weights_folder(folder: str | Path, metrics: dict[str, Any]) -> None:
    """Write the metrics, golden logits and card of a measured weights folder.

    The golden logits are computed on photographs of Caltech 101, never on the user's own, because these photographs are
    published with the folder.

    Args:
        folder: Weights folder.
        metrics: Metrics from `validate` or `finetune`.
    """
    folder = Path(folder)
    there = folder / 'metrics.json'  # may have fields about the training that `metrics` lacks
    before = json.loads(there.read_text(encoding='utf-8')) if there.is_file() else {}
    kept = ('chosen_by', 'penalty', 'holdout_files', 'used', 'train_seconds', 'stopped')
    metrics = {k: before[k] for k in kept if k in before} | metrics
    metrics = {k: v for k, v in metrics.items() if k not in ('skipped', 'leaks')}  # they hold paths of this machine
    model = open_model(str(folder))
    config = resolve_model_data_config(model)
    size = config['input_size'][-1]
    few = max(1, _GOLDEN_PIXELS // size ** 2)  # keeps the file below the size limit for publishing
    images = torch.stack([
        pil_to_tensor(center_crop(resize(read_rgb(p), size), [size, size])) for p in first_photographs()[:few]])
    with torch.inference_mode():
        inputs = normalise(images, config['mean'], config['std'])
        logits = torch.cat([model(one) for one in inputs.split(1)])  # one at a time, to save memory
    card = model_card(folder, metrics)
    atomic_write(
        folder / GOLDEN_FILE, lambda p: np.savez_compressed(p, images=images.numpy(), logits=logits.numpy()))
    write_json(folder / 'metrics.json', metrics)
    atomic_write(folder / 'README.md', card)


def check_golden(folder: str | Path) -> float:
    """Largest difference between the golden logits of a weights folder and the current logits of its model."""
    with np.load(Path(folder) / GOLDEN_FILE) as golden:
        images, logits = (torch.from_numpy(golden[k]) for k in ('images', 'logits'))
    model = open_model(str(folder))
    config = resolve_model_data_config(model)
    with torch.inference_mode():
        return (model(normalise(images, config['mean'], config['std'])) - logits).abs().max().item()
