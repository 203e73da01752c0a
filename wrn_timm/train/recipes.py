"""Recipes: one frozen dataclass each, named in `RECIPES`."""
from __future__ import annotations

import dataclasses

__all__ = ['RECIPES', 'Recipe', 'get_recipe']


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: SGD with Nesterov momentum and a learning rate that changes every step.

    Attributes:
        dataset: 'cifar10', 'cifar100', 'svhn' or 'synthetic'.
        model: timm name of the network.
        epochs: Passes over the training set.
        batch_size: Images a step.
        lr: Peak learning rate.
        warmup_epochs: Linear rise from lr / 100; a cosine to 0 follows.
        momentum: Nesterov momentum.
        weight_decay: L2 penalty on every parameter, BatchNorm's too, as in the paper.
        label_smoothing: Mass moved from the label to all classes.
        ema_decay: Decay a step of the averaged weights, which are the ones exported; 0 exports the last.
        pad: Reflected border for random crops, in pixels.
        flip: Mirror with probability 1/2.
        cutout: Side of the square set to the mean, in pixels.
        conv_drop_rate: Dropout between the convolutions of a block.
        holdout: Training images kept aside and measured every epoch, for choices; 0 trains on all.
    """
    dataset: str
    model: str
    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    warmup_epochs: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.
    ema_decay: float = 0.
    pad: int = 4
    flip: bool = True
    cutout: int = 0
    conv_drop_rate: float = 0.
    holdout: int = 0


RECIPES = {
    # The paper's data, augmentation and optimiser (section 3), a cosine in place of the steps, a quarter of the
    # epochs, averaged weights:
    #     python scripts/train.py --recipe quick --data DIR --out RUN
    # Two CPU cores, about 70 minutes. Accuracy: on the card of wrn16_1.cifar10, which it made (one seed).
    'quick': Recipe(dataset='cifar10', model='wrn16_1', epochs=50, warmup_epochs=2, ema_decay=0.999),
    # Random images, seconds on a CPU: shows that training, checkpoint, resume and export work.
    #     python scripts/train.py --recipe smoke --out RUN
    'smoke': Recipe(dataset='synthetic', model='wrn16_1', epochs=3, batch_size=64, ema_decay=0.9, holdout=128),
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: There is none; the names are listed.
    """
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
