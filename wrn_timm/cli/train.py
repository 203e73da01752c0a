"""Train a network from scratch with a recipe.

    wrn-timm train --recipe quick --data DIR --out RUN
    wrn-timm train --recipe quick --data DIR --out RUN --model resnet18 --lr 0.05    # override the recipe's settings
    torchrun --nproc-per-node 8 -m wrn_timm.cli train --recipe cifar10 --data DIR --out RUN
"""
from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from typing import Literal

from ..names import printable
from ..recipes import RECIPES, Recipe, get_recipe
from ..train.scratch import ScratchMachine, train
from .common import STOPPED, Training, is_main_process, log_to_terminal, machine_of, reports_errors, resumable
from .options import option, parse

PURPOSES = {
    'Main options': (
        'recipe', 'data', 'out', 'model', 'epochs', 'batch_size', 'lr', 'holdout', 'seed', 'download', 'resume'),
    "Network (here and below, the default is the recipe's value)": ('stem', 'conv_drop_rate', 'sync_batchnorm'),
    'Optimisation': (
        'opt', 'momentum', 'weight_decay', 'decay_norm', 'adamw_scale', 'schedule', 'warmup_epochs', 'drop_epochs',
        'drop_factor', 'label_smoothing', 'ema_decay', 'sam_rho'),
    'Images': (
        'dataset', 'sizes', 'pad', 'flip', 'alternate_flip', 'cutout', 'trivial_augment', 'rand_augment',
        'rand_magnitude', 'auto_augment', 'mixup', 'cutmix'),
    'Machine': ('device', 'precision', 'compile', 'grad_checkpointing', 'time_budget', 'checkpoint_every'),
    'Output': ('tag', 'half', 'tracker', 'traceback'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(Training):
    """Command-line options in addition to the fields of the recipe."""
    recipe: str
    """Name of the recipe."""
    data: str = ''
    """Folder with the data set's official files, or to download them to."""
    download: bool = False
    """Download the data set into --data if it is missing."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""
    checkpoint_every: float = option(60., 'SECONDS')
    """Time between checkpoints."""
    compile: bool | None = None
    """Compile the network; by default on CUDA only. On a CPU it needs a C++ compiler and makes narrow networks up to
    twice as fast."""
    precision: Literal['auto', 'bf16', 'no'] = 'auto'
    """'auto' is bfloat16 on GPUs and CPUs that are faster in it, 'no' is float32."""
    grad_checkpointing: bool = False
    """Save memory by recomputing activations in the backward pass. The running statistics of BatchNorm are then
    updated twice per step, as in timm."""
    half: bool = False
    """Export half-precision weights (BatchNorm stays float32)."""
    tracker: str = ''
    """Experiment tracker: tensorboard, wandb, trackio or another that accelerate supports."""


def read(argv: Sequence[str]) -> tuple[TrainOptions, Recipe]:
    """Parse the command line."""
    about = f'{__doc__}\n{textwrap.fill("Recipes: " + ", ".join(RECIPES), 112)}'
    return parse(argv, ('train', about), TrainOptions, Recipe, lambda given: get_recipe(given.recipe), PURPOSES)


@reports_errors
def main(argv: Sequence[str]) -> int:
    options, recipe = read(argv)
    log_to_terminal()
    with resumable(options.out):
        folder = train(
            recipe, options.data, options.out, options.seed, options.half, machine_of(options, ScratchMachine))
    if not is_main_process():
        return 0
    if folder is None:
        return STOPPED
    print(f'weights: {printable(folder)}')
    return 0
