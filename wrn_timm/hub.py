"""A weights folder as a repository of the Hugging Face Hub: its card and golden logits, and how it gets there."""
from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from timm.data import resolve_model_data_config
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

from .data.folders import read_rgb
from .download import hub_fault
from .train.finetune import FinetuneConfig
from .train.recipes import RECIPES
from .train.rundir import atomic_write
from .train.validate import normalised, open_model
from .weights import WEIGHTS_FILE, verify, version_tag

__all__ = [
    'PAPER_ERROR', 'check_folder', 'check_golden', 'contents', 'finish_weights_folder', 'model_card', 'preview', 'publish']

GOLDEN_FILE = 'golden.npz'  # a second .safetensors in the folder confuses timm up to 1.0.26
GOLDEN_TOLERANCE = 1e-3  # of a logit; another CPU or GPU adds in another order
FILES = (
    WEIGHTS_FILE, 'config.json', 'README.md', 'metrics.json', 'recipe.json', 'history.csv', 'curves.png', GOLDEN_FILE)
SIZE_LIMIT = 5_000_000  # bytes of any file but the weights

# Test error in %: arXiv 1605.07146 v4, table 5 where it has the network (mean/std preprocessing), else table 4.
PAPER_ERROR = {
    'wrn40_1.cifar10': 6.85, 'wrn40_1.cifar100': 30.89, 'wrn40_2.cifar10': 5.33, 'wrn40_2.cifar100': 26.04,
    'wrn40_4.cifar10': 4.53, 'wrn40_4.cifar100': 21.18, 'wrn16_8.cifar10': 4.27, 'wrn16_8.cifar100': 20.43,
    'wrn28_10.cifar10': 4.00, 'wrn28_10.cifar100': 19.25, 'wrn40_8.cifar10': 4.66, 'wrn28_12.cifar10': 4.33,
    'wrn28_12.cifar100': 20.43, 'wrn22_8.cifar10': 4.38, 'wrn22_8.cifar100': 21.22, 'wrn22_10.cifar10': 4.44,
    'wrn22_10.cifar100': 20.75, 'wrn16_10.cifar10': 4.56, 'wrn16_10.cifar100': 21.59,
}
_IN_TABLE_5 = ('wrn40_4', 'wrn16_8', 'wrn28_10')

_TITLES = {'cifar10': 'CIFAR-10', 'cifar100': 'CIFAR-100', 'svhn': 'SVHN'}
_TINY_IMAGES = ('taken from Tiny Images, whose collection from the web was not curated; its authors state no licence, '
                'and its images are not here')
_LIMITS = {
    'cifar10': f'CIFAR-10 has ten classes of animals and vehicles at 32x32 pixels, {_TINY_IMAGES}.',
    'cifar100': f'CIFAR-100 has a hundred classes at 32x32 pixels, {_TINY_IMAGES}; its classes baby, boy, girl, man '
                f'and woman carry the biases of that collection.',
}
_OUTSIDE = 'The network says nothing reliable of pictures of other things, or of another kind, until it is fine-tuned.'
_CITATION = '''@inproceedings{zagoruyko2016wide,
  title={Wide Residual Networks},
  author={Zagoruyko, Sergey and Komodakis, Nikos},
  booktitle={British Machine Vision Conference},
  year={2016}
}'''


def _command(run: dict[str, Any]) -> str:
    """The command that repeats a training run."""
    if 'finetune' in run:
        return f"python scripts/finetune.py --model {run['finetune']['model']} --data DIR --out RUN"
    for name, recipe in RECIPES.items():
        recipe = json.loads(json.dumps(dataclasses.asdict(recipe)))
        differ = [k for k, v in run['recipe'].items() if recipe.get(k) != v]  # a field of later days has its default
        if set(differ) <= {'model'}:
            model = f" --model {run['recipe']['model']}" if differ else ''
            return f"python scripts/train.py --recipe {name}{model} --data DIR --out RUN --seed {run['seed']}"
    return f"the recipe below, by wrn_timm at commit {run['environment']['commit']}"


def model_card(folder: str | Path, metrics: dict[str, Any] | None = None) -> str:
    """The card (README.md) of a weights folder, from its `config.json`, `metrics.json` and `recipe.json`.

    Args:
        folder: Weights folder, of `train.py` or `finetune.py`.
        metrics: In place of those in `metrics.json`.
    """
    folder = Path(folder)
    config, run = (json.loads((folder / f'{name}.json').read_text()) for name in ('config', 'recipe'))
    metrics = metrics or json.loads((folder / 'metrics.json').read_text())
    settings = run.get('recipe') or run['finetune']
    arch, cfg = config['architecture'], config['pretrained_cfg']
    name = f"{arch}.{cfg['tag']}"
    dataset = metrics['dataset']
    title = _TITLES.get(dataset, dataset)
    history = (folder / 'history.csv').read_text().splitlines()
    last = dict(zip(history[0].split(','), history[-1].split(','), strict=True))
    size = cfg['input_size'][-1]
    data = ModelCardData(
        library_name='timm', license=cfg.get('license') or 'apache-2.0', pipeline_tag='image-classification',
        tags=['timm', 'wide-residual-network', 'wrn_timm'], datasets=[dataset] if dataset in _TITLES else None,
        model_name=name,
        eval_results=[
            EvalResult(
                task_type='image-classification', dataset_type=dataset, dataset_name=title,
                dataset_split=metrics['split'], metric_type='accuracy', metric_name='Top-1 accuracy',
                metric_value=metrics['top1']),
        ])
    recipe = '\n'.join(f'| {k} | {v} |' for k, v in settings.items())
    env = run['environment']
    top5 = f"; top-5 {metrics['top5']:.2f} %" if metrics.get('top5') is not None else ''
    speed = f" at {float(last['images_per_second']):.0f} images/s (last epoch)" if 'images_per_second' in last else ''
    limits = f"\n## Limits\n{_LIMITS[dataset]} {_OUTSIDE}\n" if dataset in _LIMITS else ''
    return f'''---
{data.to_yaml()}
---
# {name}

{arch.replace('wrn', 'WRN-').replace('_', '-')} ([Wide Residual Networks](https://arxiv.org/abs/1605.07146)) trained \
on {title}, for [timm](https://github.com/huggingface/pytorch-image-models) through `wrn_timm`.

```python
import wrn_timm
import timm
from PIL import Image

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
logits = model(transform(Image.open("photo.jpg").convert("RGB"))[None])
```

## Accuracy
Top-1 **{metrics['top1']:.2f} %** (error {100 - metrics['top1']:.2f} %){top5}; expected calibration error \
{metrics['ece']:.2f} %. Measured by `scripts/validate.py` on {metrics['images']:,} images of {title} \
({metrics['split']}), from the weights as they lie here; one seed, \
{'averaged' if settings.get('ema_decay') else 'last'} weights of the last epoch; nothing was chosen by the test set.

Preprocessing: RGB, {size}x{size}, scaled to 0..1, mean {tuple(cfg['mean'])}, std {tuple(cfg['std'])}.

## Training
{float(last['seconds']) / 60:.0f} minutes{speed} on {env['hardware']}, seed {run.get('seed', settings.get('seed'))}, \
{last['epoch']} epochs; torch {env['torch']}, timm {env['timm']}, commit `{env['commit']}`.

```
{_command(run)}
```

![curves](curves.png)

| field | value |
|---|---|
{recipe}
{limits}
## Citation
```
{_CITATION}
```
'''


def finish_weights_folder(folder: str | Path, metrics: dict[str, Any], photographs: list[str]) -> None:
    """Write what a measured weights folder has beside its weights: metrics, golden logits and the card.

    Args:
        folder: Weights folder.
        metrics: From `validate`.
        photographs: Image files of a free licence, cut to the model's input size for the golden test.
    """
    folder = Path(folder)
    model = open_model(str(folder))
    size = resolve_model_data_config(model)['input_size'][-1]
    images = torch.stack([
        pil_to_tensor(center_crop(resize(read_rgb(p), size), [size, size])) for p in photographs])
    with torch.inference_mode():
        logits = model(normalised(images, model))
    card = model_card(folder, metrics)
    atomic_write(
        folder / GOLDEN_FILE, lambda p: np.savez_compressed(p, images=images.numpy(), logits=logits.numpy()))
    atomic_write(folder / 'metrics.json', json.dumps(metrics, indent=2) + '\n')
    atomic_write(folder / 'README.md', card)


def check_golden(folder: str | Path) -> float:
    """Largest difference between the logits that a weights folder keeps and those that its model gives now."""
    with np.load(Path(folder) / GOLDEN_FILE) as golden:
        images, logits = (torch.from_numpy(golden[k]) for k in ('images', 'logits'))
    model = open_model(str(folder))
    with torch.inference_mode():
        return (model(normalised(images, model)) - logits).abs().max().item()
