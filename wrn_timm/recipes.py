"""Training settings: recipes for training from scratch, and settings for fine-tuning and for detectors."""
from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .data.splits import check_protocol

__all__ = [
    'RECIPES', 'DetectConfig', 'FinetuneConfig', 'Precision', 'Recipe', 'check_numbers', 'detect_command',
    'finetune_command', 'get_recipe', 'settings_flags', 'with_defaults']

Precision = Literal['auto', 'no', 'fp16', 'bf16']


def check_numbers(settings: Mapping[str, Any], most: float = sys.float_info.max) -> None:
    """Refuse numbers that are negative, NaN or above `most`; by default, only infinity is above it.

    Raises:
        ValueError: A number is refused; it is named.
    """
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not 0 <= value <= most:
            finite = 'finite and ' * (isinstance(value, float) and most < math.inf)
            raise ValueError(f'{name} is {value:g}; it must be {finite}at least 0')


def _check_types(settings: Any) -> None:
    """Convert paths and numpy numbers to JSON types, and refuse values that are not among a field's literals.

    Raises:
        ValueError: A value is refused; it is named with the choices.
    """
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if isinstance(value, os.PathLike):
            object.__setattr__(settings, name, os.fspath(value))
        elif hasattr(value, 'item'):
            object.__setattr__(settings, name, value.item())
        if get_origin(hint) is Literal and value not in get_args(hint):
            *others, last = map(repr, get_args(hint))
            raise ValueError(f'{name} {value!r} is unknown; choose {", ".join(others)} or {last}')


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings for training from scratch. The learning rate is updated at every step."""

    dataset: str
    """Data set: 'cifar10', 'cifar100', 'svhn' or 'synthetic'."""
    model: str
    """timm name of the model."""
    epochs: int
    """Passes over the training set."""
    stem: str = ''
    """Stem of a WRN: 'cifar' (3x3, stride 1), 'imagenet' (7x7 and pooling), or '' for the model's default."""
    batch_size: int = 128
    """Images per step, over all processes."""
    opt: Literal['nesterov', 'muon'] = 'nesterov'
    """'nesterov' is SGD with Nesterov momentum; 'muon' orthogonalises the updates of the convolutions (timm's Muon) and
    leaves the stem, the classifier and BatchNorm to AdamW."""
    lr: float = 0.1
    """Peak learning rate."""
    adamw_scale: float = 0.08
    """With 'muon', the learning rate of its AdamW part, as a fraction of `lr`."""
    schedule: Literal['cosine', 'linear', 'step'] = 'cosine'
    """'cosine' or 'linear' decay to 0, or 'step', which multiplies by `drop_factor` at each of `drop_epochs`."""
    warmup_epochs: float = 0.
    """Epochs of linear warm-up from lr / 100."""
    drop_epochs: tuple[int, ...] = ()
    """Epochs at which the 'step' schedule drops the learning rate."""
    drop_factor: float = 0.2
    """Factor by which the 'step' schedule multiplies the learning rate."""
    momentum: float = 0.9
    """Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty. With 'muon', decoupled weight decay of the convolutions, times the learning rate at every step."""
    decay_norm: bool = True
    """Apply weight decay to BatchNorm and biases too, as the paper does. 'muon' never does."""
    label_smoothing: float = 0.
    """Label smoothing."""
    ema_decay: float = 0.
    """Decay per step of the exponential moving average of the weights, which is then exported; 0 exports the last
    weights."""
    sam_rho: float = 0.
    """Radius of sharpness-aware minimization (arXiv:2010.01412), which doubles the cost; 0 for none."""
    sizes: tuple[tuple[int, float], ...] = ()
    """Smaller image sizes for the first epochs, each with its fraction of all epochs. ((16, 0.3), (24, 0.2)), on the
    command line --sizes 16 0.3 24 0.2, trains at 16 pixels, then at 24, and at full size for the remaining half."""
    pad: int = 4
    """Padding by reflection before the random crop, in pixels."""
    flip: bool = True
    """Mirror each image with probability 1/2."""
    alternate_flip: bool = False
    """Mirror each image in every second epoch instead (arXiv:2404.00498)."""
    cutout: int = 0
    """Side of the cutout square (arXiv:1708.04552), in pixels; 0 for none."""
    trivial_augment: bool = False
    """TrivialAugment: one random operation per image (arXiv:2103.10158)."""
    rand_augment: int = 0
    """RandAugment: number of random operations per image, at one strength (arXiv:1909.13719); 0 for none."""
    rand_magnitude: int = 9
    """Strength of `rand_augment`, 0 to 30."""
    auto_augment: bool = False
    """AutoAugment with its CIFAR-10 policy, or its SVHN policy for SVHN (arXiv:1805.09501)."""
    mixup: float = 0.
    """Alpha of mixup (arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.
    """Alpha of CutMix (arXiv:1905.04899). If mixup is on too, each batch uses one of the two at random."""
    conv_drop_rate: float = 0.
    """Dropout between the convolutions of a block."""
    sync_batchnorm: bool = False
    """Synchronize BatchNorm statistics across processes; on GPUs only."""
    tag: str = ''
    """Tag of the weights; '' uses the name of the data set."""
    holdout: int = 0
    """Number of training images to hold out for choosing settings; they are measured every epoch. 0 trains on all
    images."""

    def __post_init__(self):
        _check_types(self)
        for name in ('epochs', 'batch_size'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least 1')
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f'warmup_epochs is {self.warmup_epochs:g}; it must be below the {self.epochs} epochs')
        if any(size < 8 or not share > 0 for size, share in self.sizes) or sum(share for _, share in self.sizes) >= 1:
            raise ValueError(f'sizes are {self.sizes}; each needs at least 8 pixels and a share of the epochs above 0, '
                             f'and the shares must leave epochs for the full size')
        if self.opt == 'nesterov' and not self.momentum:
            raise ValueError('momentum is 0, but Nesterov momentum needs one above 0')
        if list(self.drop_epochs) != sorted(self.drop_epochs):
            raise ValueError(f'drop_epochs are {", ".join(map(str, self.drop_epochs))}; give them in order')
        if self.schedule == 'step' and not (self.drop_epochs and self.drop_epochs[-1] < self.epochs):
            dropped = ', '.join(map(str, self.drop_epochs)) or 'not given'
            raise ValueError(f'drop_epochs are {dropped}; the step schedule needs some, all below the {self.epochs} '
                             f'epochs')
        if self.alternate_flip and not self.flip:
            raise ValueError('alternate_flip needs flip: leave out --no-flip, or add --no-alternate-flip')
        if not 0 <= self.rand_magnitude <= 30:
            raise ValueError(f'rand_magnitude is {self.rand_magnitude}; it must be 0 to 30')
        if self.trivial_augment + bool(self.rand_augment) + self.auto_augment > 1:
            raise ValueError('choose one of trivial_augment, rand_augment and auto_augment')
        check_numbers(vars(self))

    def size_at(self, epoch: int, full: int) -> int:
        """Image size in pixels at an epoch (counted from 0); `full` is the size of the data set's images."""
        end = 0.
        for size, share in self.sizes:
            end += share
            if epoch < round(end * self.epochs) and epoch < self.epochs - 1:  # the last epoch is always at full size
                return size
        return full


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings for fine-tuning. The default trains all layers by SGD with Nesterov momentum and a cosine schedule."""

    model: str = 'wrn16_2.cifar100'
    """timm name with tag, or a weights folder."""
    pretrained: bool = True
    """Start from pretrained weights, not from random ones."""
    stem: str = ''
    """'imagenet' gives a 6N+4 network the 7x7 stem, for photographs of 128 px or more. The weights of its 3x3 stem are
    dropped."""
    train: Literal['all', 'gradual', 'head'] = 'all'
    """What to train: 'all' layers; 'gradual', which unfreezes from the classifier down until all layers train in the
    second half of the epochs; or 'head', the classifier alone."""
    cache: bool = True
    """With 'head', run the backbone once over the photographs, without augmentation, and fit the classifier to its
    features by L-BFGS. This needs no epochs and no learning rate. The L2 penalty is chosen by five-fold
    cross-validation, or on the held-out files if there are at least 1,000."""
    split: str = '70-30'
    """How to split data that has no test split: first30 or random30 (that many training files per class), 70-30 (per
    cent), or the split.csv of another run."""
    holdout: float | Literal['auto'] = 'auto'
    """Fraction of the training files to hold out for choosing the best epoch. With fewer than 100 held-out files, the
    last epoch is used all the same, unless the run stops early. 'auto' is 0.1 if that is at least 100 files or if
    patience needs it. Otherwise it is 0: all files are trained on, and the last epoch is used."""
    parts: tuple[str, ...] = ('train', 'validation')
    """Names of the training split, the held-out split (optional) and the test split of a timm data set (hfds/...,
    wds/...). A held-out split of at least 100 files chooses the epoch."""
    num_classes: int = 0
    """Number of classes, for a named data set that does not provide it."""
    input_key: str = ''
    """Column of the images in a timm data set, if it is not called image (as in timm)."""
    target_key: str = ''
    """Column of the labels in a timm data set, if it is not called label (as in timm)."""
    nested: bool = False
    """Make every folder that holds images a class, named by its path."""
    input_size: int = 0
    """Side of the square input, in pixels; 0 uses the input size of the weights."""
    epochs: int = 30
    """Passes over the training files."""
    batch_size: int | Literal['auto'] = 16
    """Images per step, over all processes. 'auto' finds the largest that fits, up to 256 per process, with at least
    twenty steps per epoch if that leaves 8 images per process."""
    accumulate: int = 1
    """Gradient accumulation steps."""
    opt: str = 'nesterov'
    """timm name of the optimizer. The default learning rate is for SGD; adamw and the like need about 0.001."""
    lr: float = 0.05
    """Peak learning rate of the last layers."""
    momentum: float = 0.9
    """Momentum, for the optimizers that have it."""
    weight_decay: float = 5e-4
    """Weight decay; biases and BatchNorm are not decayed."""
    layer_decay: float = 0.9
    """Factor by which the learning rate falls with each block towards the input."""
    schedule: Literal['cosine', 'step'] = 'cosine'
    """cosine decays to 0; step multiplies the learning rate by 0.1 after each third of the epochs."""
    warmup_epochs: int = 1
    """Epochs of linear warm-up from lr / 100."""
    label_smoothing: float = 0.1
    """Label smoothing."""
    class_weights: bool = False
    """Weight each class in the loss by the inverse of its number of files."""
    ema_decay: float = 0.
    """Decay per step of the exponential moving average of the weights, which is then exported; 0 exports the last
    weights."""
    augment: bool = True
    """Random crops, flips and colour jitter."""
    flip: bool = True
    """Mirror half of the training photographs. Switch it off for classes that are told apart by left and right, such as
    arrows, hands, letters or digits."""
    min_scale: float = 0.5
    """Smallest fraction of a photograph's area in a training crop."""
    color_jitter: float = 0.2
    """Strength of the colour jitter."""
    auto_augment: str = ''
    """timm augmentation policy in place of the colour jitter: rand-m9-mstd0.5, augmix-m5, original..."""
    random_erase: float = 0.
    """Probability of random erasing."""
    mixup: float = 0.
    """Alpha of mixup (arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.
    """Alpha of CutMix (arXiv:1905.04899). If mixup is on too, each batch uses one of the two at random."""
    patience: int = 0
    """Stop after this many epochs without a better held-out accuracy; 0 never stops early."""
    precision: Precision = 'auto'
    """Precision of training. 'auto' is bf16 on GPUs and CPUs that are faster in it, else fp16 on GPUs and float32
    ('no') on CPUs. Test metrics are always computed in float32."""
    seed: int = 0
    """Seed of the split, the order, the crops and the new classifier."""

    def __post_init__(self):
        _check_types(self)
        limits = {
            'epochs': (1, math.inf), 'accumulate': (1, math.inf), 'label_smoothing': (0, 0.999),
            'min_scale': (0.001, 1), 'input_size': (0, 4096), 'ema_decay': (0, 0.99999), 'random_erase': (0, 1),
            'warmup_epochs': (0, self.epochs), 'layer_decay': (0.001, 1), 'patience': (0, math.inf),
            'lr': (1e-9, math.inf), 'seed': (0, 40_000), 'mixup': (0, math.inf), 'cutmix': (0, math.inf)}
        if self.batch_size != 'auto':
            limits['batch_size'] = 1, math.inf
        if self.holdout != 'auto':
            limits['holdout'] = 0, 0.9
        for field, (low, high) in limits.items():
            if not low <= getattr(self, field) <= high:
                bound = f'at least {low}' if high == math.inf else f'from {low} to {high}'
                raise ValueError(f'{field} is {getattr(self, field)}; it must be {bound}')
        if self.patience and not self.holdout:
            raise ValueError('patience needs held-out files; give a holdout above 0')
        if self.stem == 'imagenet' and not self.input_size:
            raise ValueError('stem imagenet needs an input_size, best 128 or more; the default is for the 3x3 stem')
        if self.opt in ('nesterov', 'sgd') and not self.momentum:
            raise ValueError(f"opt {self.opt} is SGD with Nesterov momentum, so momentum 0 is not possible; choose opt "
                             f"'momentum'")
        if len(self.parts) not in (2, 3):
            raise ValueError(f'parts are {", ".join(self.parts)}; give two (training, test) or three (training, '
                             f'held-out, test)')
        if not self.split.endswith('.csv'):
            check_protocol(self.split)
        check_numbers(vars(self))

    @property
    def held_out(self) -> float | Literal['auto']:
        """`holdout` for `make_split`; early stopping needs held-out files, even if they are few."""
        return 0.1 if self.holdout == 'auto' and self.patience else self.holdout

    @property
    def cached(self) -> bool:
        """Whether the classifier is fitted to features."""
        return self.train == 'head' and self.cache

    def unused(self) -> list[str]:
        """Fields that were set but have no effect, because a classifier fitted to features does not use SGD."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in _OF_SGD if self.cached and getattr(self, name) != defaults[name]]

    def used(self) -> dict[str, Any]:
        """Fields that had an effect, without those that are switched off or that this way of training does not use."""
        idle = {'cache', 'parts', 'num_classes', 'input_key', 'target_key', 'nested'}
        if self.cached:
            idle |= {*_OF_SGD, 'augment'}
        if not self.augment:
            idle |= {'flip', 'min_scale', 'color_jitter', 'auto_augment', 'random_erase'}
        elif self.auto_augment:
            idle.add('color_jitter')
        always = ('pretrained', 'augment', 'flip', 'seed')
        return {name: value for name, value in dataclasses.asdict(self).items()
                if name not in idle and (value or name in always)}


_OF_SGD = ('epochs', 'batch_size', 'accumulate', 'opt', 'lr', 'momentum', 'weight_decay', 'layer_decay', 'schedule',
           'warmup_epochs', 'label_smoothing', 'ema_decay', 'patience', 'flip', 'min_scale', 'color_jitter',
           'auto_augment', 'random_erase', 'mixup', 'cutmix')


@dataclasses.dataclass(frozen=True)
class DetectConfig:
    """Settings for training a detector: AdamW with a short warm-up and a cosine schedule, random flips and
    colour jitter. Settings left at 0 or 'auto' are chosen from the data before training."""

    model: str = 'auto'
    """timm name of a WRN. 'auto' takes ImageNet weights (wrn18_1 on a CPU, wrn50_2 on a GPU) if they are on this
    machine or can be downloaded, and otherwise the CIFAR-100 weights of wrn16_2. With --no-pretrained it is wrn16_2
    with random weights. 'torchvision/resnet50_fpn' is torchvision's own detector on ResNet-50, from scratch, for
    comparison."""
    detector: Literal['faster_rcnn', 'retinanet'] = 'faster_rcnn'
    """Faster R-CNN or RetinaNet."""
    pretrained: bool = True
    """Start from the pretrained weights of the model, not from random ones."""
    image_size: int = 0
    """Longer side to which photographs are resized, in pixels; 0 uses their median size, limited to 320 to 640."""
    epochs: int = 0
    """Passes over the training images; 0 uses enough for 6,000 photographs in total, limited to 12 to 60."""
    batch_size: int = 0
    """Images per step; 0 uses 8, or fewer for small data sets or if GPU memory is short."""
    lr: float = 5e-4
    """Peak learning rate."""
    frozen_stages: int = 0
    """Freeze the stem and this many stages."""
    out_channels: int = 0
    """Channels of the feature pyramid; 0 uses 256, or 64 for a backbone that ends with at most 256 channels."""
    anchor_scale: float = 0.
    """Side of the anchors of each level, in multiples of its stride; 0 derives it from the sizes of the boxes."""
    rois: int = 128
    """Regions per image that the second stage of Faster R-CNN is trained on."""
    max_objects: int = 0
    """Maximum number of objects per photograph; 0 uses 100, or twice the largest number of boxes on a training image if
    that is more."""
    opt: str = 'adamw'
    """timm name of the optimizer."""
    weight_decay: float = 0.05
    """Weight decay; biases and normalisation layers are not decayed."""
    warmup_steps: int = 100
    """Steps of linear warm-up from lr / 100."""
    flip: bool = True
    """Mirror half of the training photographs. Switch it off for classes that are told apart by left and right, such as
    arrows, hands, letters or digits."""
    precision: Literal['auto', 'no', 'bf16'] = 'auto'
    """Precision of the backbone in training. 'auto' is bf16 on GPUs and CPUs that are faster in it, else float32
    ('no'). The boxes, and all test metrics, are computed in float32."""
    train_split: str = ''
    """Part of the data to train on; by default the data's own training part, or a random split."""
    test_split: str = ''
    """Part of the data to test on, once, at the end; by default the data's own test part, or a random split."""
    seed: int = 0
    """Seed of the split, the weights, the order and the augmentation."""

    def __post_init__(self):
        _check_types(self)
        lowest = dict.fromkeys(('epochs', 'batch_size', 'out_channels', 'max_objects', 'frozen_stages', 'image_size',
                                'warmup_steps', 'seed'), 0)
        for name, low in (lowest | {'rois': 4}).items():
            if getattr(self, name) < low:
                raise ValueError(f'{name} is {getattr(self, name)}; it must be at least {low}')
        if 0 < self.image_size < 32:
            raise ValueError(f'image_size is {self.image_size}; it must be at least 32, or 0')
        check_numbers(vars(self))
        for name, value in _OF_TORCHVISIONS.items() if self.model == TORCHVISION_DETECTOR else ():
            if getattr(self, name) not in (value, getattr(DetectConfig, name)):
                raise ValueError(f'{name} is {getattr(self, name)}; for {TORCHVISION_DETECTOR} it must be {value}')


TORCHVISION_DETECTOR = 'torchvision/resnet50_fpn'
_OF_TORCHVISIONS = {'detector': 'faster_rcnn', 'pretrained': False, 'frozen_stages': 0, 'out_channels': 256}


def with_defaults(settings: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Settings read from JSON, with defaults for the fields that did not exist when they were written.

    Args:
        settings: Settings as in `recipe.json`.
        kind: Dataclass of the settings.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return json.loads(json.dumps(defaults)) | dict(settings)


def settings_flags(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """Command-line flags of the settings that differ from the defaults, both as read from JSON."""
    flags = []
    for key, value in settings.items():
        name = key.replace('_', '-')
        if key not in defaults or defaults[key] != value:
            values = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
            values = [v for entry in values for v in (entry if isinstance(entry, list) else [entry])]  # sizes are pairs
            flags.append(shlex.join([f'--{"no-" * (value is False)}{name}', *map(str, values)]))
    return flags


def finetune_command(settings: Mapping[str, Any], data: str = 'DIR', out: str = 'RUN') -> str:
    """The command that repeats a fine-tuning run.

    Args:
        settings: Settings of `FinetuneConfig`, as in `recipe.json`.
        data: Training data.
        out: Run directory.
    """
    defaults = json.loads(json.dumps(dataclasses.asdict(FinetuneConfig())))
    flags = settings_flags(settings, {**defaults, 'model': ''})
    return ' '.join(['wrn-timm finetune', *flags, shlex.join(['--data', data, '--out', out])])


def detect_command(settings: Mapping[str, Any], data: str = 'DIR', out: str = 'RUN') -> str:
    """The command that repeats the training of a detector; the arguments are those of `finetune_command`."""
    flags = settings_flags(settings, json.loads(json.dumps(dataclasses.asdict(DetectConfig()))))
    return ' '.join(['wrn-timm detect', *flags, shlex.join(['--data', data, '--out', out])])


_PAPER = dict(model='wrn28_10', epochs=200, schedule='step', drop_epochs=(60, 120, 160), drop_factor=0.2)

PAPER_CIFAR10 = Recipe(dataset='cifar10', tag='paper_cifar10', **_PAPER)
"""Training exactly as in the paper, section 3: mean/std preprocessing, flips and crops, weights of the last epoch.

Expected error: 4.00 % (table 5, median of five runs). Not run here, because no GPU was available.

    wrn-timm train --recipe paper_cifar10 --data DIR --out RUN
"""

PAPER_CIFAR100 = Recipe(dataset='cifar100', tag='paper_cifar100', **_PAPER)
"""`paper_cifar10` for CIFAR-100. Expected error: 19.25 % (table 5, median of five runs). Not run here.

    wrn-timm train --recipe paper_cifar100 --data DIR --out RUN
"""

PAPER_CIFAR10_DROPOUT = Recipe(dataset='cifar10', tag='paper_cifar10_dropout', conv_drop_rate=0.3, **_PAPER)
"""`paper_cifar10` with dropout. Expected error: 3.89 % (table 6, median of five runs). Not run here.

    wrn-timm train --recipe paper_cifar10_dropout --data DIR --out RUN
"""

PAPER_CIFAR100_DROPOUT = Recipe(dataset='cifar100', tag='paper_cifar100_dropout', conv_drop_rate=0.3, **_PAPER)
"""`paper_cifar100` with dropout. Expected error: 18.85 % (table 6, median of five runs). Not run here.

    wrn-timm train --recipe paper_cifar100_dropout --data DIR --out RUN
"""

PAPER_SVHN = Recipe(
    dataset='svhn', tag='paper_svhn', model='wrn16_8', epochs=160, lr=0.01, schedule='step', drop_epochs=(80, 120),
    drop_factor=0.1, pad=0, flip=False, conv_drop_rate=0.4)
"""Training as in the paper on SVHN: train and extra (604,388 images), only scaled to 0..1, no augmentation.

Expected error: 1.54 %, and 1.81 % with `--conv-drop-rate 0` (table 6). Not run here, because the data set was not
available.

    wrn-timm train --recipe paper_svhn --data DIR --download --out RUN
"""

_GPU = dict(
    model='wrn28_10', epochs=200, batch_size=512, opt='muon', lr=0.12, weight_decay=0.02, schedule='linear',
    warmup_epochs=5, label_smoothing=0.1, ema_decay=0.998, sizes=((16, 0.2), (24, 0.2)), alternate_flip=True,
    auto_augment=True)

CIFAR10 = Recipe(dataset='cifar10', cutout=16, **_GPU)
"""For about twenty minutes on one H100 or H200; set `--epochs` to what the speed of the machine allows.

Optimizer, schedule and image sizes are taken from `cpu_cifar10`, where they were measured on small networks.
AutoAugment and cutout are the augmentation of the best published 200-epoch runs without SAM (arXiv:2010.01412, table 1:
2.3 % on CIFAR-10 and 15.8 % on CIFAR-100). Not run yet, because no GPU was available, so the expected error is unknown.

    wrn-timm train --recipe cifar10 --data DIR --out RUN --time-budget 1320
"""

CIFAR100 = Recipe(dataset='cifar100', cutout=8, **_GPU)
"""`cifar10` for CIFAR-100, with the smaller cutout that is best there (arXiv:1708.04552). Not run yet.

    wrn-timm train --recipe cifar100 --data DIR --out RUN --time-budget 1320
"""

_CPU = dict(
    model='wrn16_2', epochs=40, batch_size=256, opt='muon', lr=0.12, weight_decay=0.02, schedule='linear',
    warmup_epochs=2, label_smoothing=0.1, ema_decay=0.998, sizes=((16, 0.25), (24, 0.25)))

CPU_CIFAR10 = Recipe(dataset='cifar10', **_CPU)
"""For two CPU cores with bfloat16 instructions: Muon, smaller images first, linear decay, EMA weights.

Accuracy of WRN-16-2 on 5,000 held-out training images in %, one seed each unless stated otherwise:

- Four epochs at 32 px, learning rate 0.06, weight decay 0.01: 88.5 with batch size 128, 88.0 with 256. With learning
  rate 0.12 and batch size 128: 89.5 and 88.7 (two seeds), and 88.3 with `alternate_flip`. The same with a warmup of 0.2
  epochs instead of 0.8: 89.2 and 88.7 (two seeds), and for the first seed 88.9 with 2 pixels of padding, 89.0 without
  label smoothing, 88.8 with label smoothing 0.2, and 89.2 with momentum 0.8. With learning rate 0.15,
  `adamw_scale` 0.032 and weight decay 0.004: 88.9. With learning rate 0.2 and `adamw_scale` 0.05: 88.8. With batch size
  64 and learning rate 0.08: 88.7. SGD with learning rate 0.2, batch size 128 and weight decay 5e-4: 84.3.
- Six epochs of this recipe (`--epochs 6 --warmup-epochs 1`), which cost about as much as four at 32 px: 90.7 with
  learning rate 0.12, 89.5 with 0.08, 90.5 with 0.2.
- Two epochs, batch size 128, learning rate 0.06: 84.7 to 85.1 over four runs, in which Muon or AdamW for the stem, and
  NAdamW instead of AdamW, made no difference. With 2 pixels of padding instead of 4: 85.2.
- Two epochs, batch size 128, learning rate 0.12: 85.5; without label smoothing 84.5, with `adamw_scale` 0.02 84.8.

`wrn16_1.cifar10` and `wrn16_2.cifar10` were trained with this recipe, three seeds each; their cards give the accuracy
and the time. `wrn40_2.cifar10` was trained with `--epochs 24`, and `wrn28_10.cifar10` with `--epochs 12 --warmup-epochs
1 --sizes 16 .34 24 .34 --alternate-flip --cutout 8`; the numbers of epochs were chosen to fit the time, and no other
setting was tried at these sizes.

After 14 epochs with 5,000 images held out, WRN-16-2 reaches 92.9 % (one seed; 92.6 % with the last weights instead of
the EMA). 18 epochs with `--sizes 16 .3 20 .2 24 .2 28 .15`, which cost as much, give 92.8 %, so the exact choice of the
sizes matters little.

With `--compile` (which needs a C++ compiler), WRN-16-2 trains at 1,114 images/s at 32 px, compared with 587 in plain
bfloat16 and 261 in float32. Wide networks gain little: WRN-28-10 trains at 24 images/s either way.

    wrn-timm train --recipe cpu_cifar10 --data DIR --out RUN --compile
"""

CPU_CIFAR100 = Recipe(dataset='cifar100', **_CPU)
"""`cpu_cifar10` for CIFAR-100, with the same settings; they were not tuned on CIFAR-100.

`wrn16_2.cifar100` was trained with `--lr 0.08` (three seeds), `wrn40_2.cifar100` with `--lr 0.08 --epochs 24`, and
`wrn28_10.cifar100` with `--lr 0.08 --epochs 12 --warmup-epochs 1 --sizes 16 .34 24 .34 --alternate-flip --cutout 8`.

    wrn-timm train --recipe cpu_cifar100 --data DIR --out RUN --compile
"""

QUICK = Recipe(dataset='cifar10', **_CPU | dict(epochs=20, warmup_epochs=1))
"""`cpu_cifar10` shortened to half an hour on two CPU cores with bfloat16 instructions.

WRN-16-2 reached a test error of 6.95 % in 26 minutes (one seed). The 20 epochs were chosen to fit the time.

    wrn-timm train --recipe quick --data DIR --out RUN --compile
"""

SMOKE = Recipe(dataset='synthetic', model='wrn16_1', epochs=3, batch_size=64, ema_decay=0.9, holdout=128)
"""A few seconds on a CPU with random images, to test training, checkpoints, resuming and export.

    wrn-timm train --recipe smoke --out RUN
"""

RECIPES = {
    'paper_cifar10': PAPER_CIFAR10, 'paper_cifar100': PAPER_CIFAR100,
    'paper_cifar10_dropout': PAPER_CIFAR10_DROPOUT, 'paper_cifar100_dropout': PAPER_CIFAR100_DROPOUT,
    'paper_svhn': PAPER_SVHN, 'cifar10': CIFAR10, 'cifar100': CIFAR100,
    'cpu_cifar10': CPU_CIFAR10, 'cpu_cifar100': CPU_CIFAR100,
    'quick': QUICK, 'smoke': SMOKE,
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ValueError: There is no such recipe; the nearest is named.
    """
    if name not in RECIPES:
        nearest = difflib.get_close_matches(name, RECIPES, n=1, cutoff=0)[0]
        raise ValueError(f"recipe {name!r} is unknown; nearest: {nearest}; known: {', '.join(RECIPES)}")
    return RECIPES[name]
