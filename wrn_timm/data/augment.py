"""Batch augmentation on the device: TrivialAugment, RandAugment, AutoAugment, mixup and CutMix.

Operations, ranges and policies are those of torchvision. Every operation is computed for every image, and one result is
selected per image. At 32x32 pixels this is cheaper than the host round trips of gathering the images of each operation.
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torchvision.transforms import AutoAugment as TorchvisionAutoAugment
from torchvision.transforms import AutoAugmentPolicy, v2

__all__ = ['OPERATIONS', 'AutoAugment', 'RandAugment', 'TrivialAugment', 'apply_operations', 'mixer']

OPERATIONS = (
    'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'brightness', 'color', 'contrast',
    'sharpness', 'posterize', 'solarize', 'autocontrast', 'equalize', 'invert')
_SIGNED = OPERATIONS[1:10]

Draw = Callable[[int], torch.Tensor]
"""`draw(high)` returns a random int64 below `high` for each image of the batch."""


def apply_operations(images: torch.Tensor, operation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Apply `OPERATIONS[operation]` to each image.

    Args:
        images: Images (B, 3, H, W), integer or float, with values 0..255. The result has the same dtype.
        operation: Indices into `OPERATIONS`, int64 (B,).
        value: Strengths, float (B,), in the unit of the operation: tangent for shears, pixels for translations, degrees
            for rotations, offset from a factor of 1 for brightness, colour, contrast and sharpness, number of bits kept
            for posterize, threshold for solarize.
    """
    x, v = images.float(), value[:, None, None, None]
    factor = 1 + v
    red, green, blue = x.unbind(1)
    grey = (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]
    results = {
        'brightness': x * factor,
        'color': torch.lerp(grey, x, factor),
        'contrast': torch.lerp(grey.floor().mean((1, 2, 3), keepdim=True), x, factor),
        'sharpness': torch.lerp(_smoothed(x), x, factor),
        'posterize': _posterized(x, v),
        'solarize': torch.where(x >= v, 255 - x, x),
        'autocontrast': _autocontrast(x),
        'equalize': _equalized(x),
        'invert': 255 - x,
    }
    out = _moved(x, operation, value)
    for name, result in results.items():
        out = torch.where((operation == OPERATIONS.index(name))[:, None, None, None], result, out)
    return out.clamp(0, 255).floor().to(images.dtype)


class _Policy(torch.nn.Module):
    """Base of the policies: values of each operation at `bins` strengths, in buffers that move with the module."""

    def __init__(self, bins: int, shear: float, translate: float, rotate: float, factor: float, bits: int):
        super().__init__()
        strength = torch.linspace(0, 1, bins)
        largest = {
            'shear_x': shear, 'shear_y': shear, 'translate_x': translate, 'translate_y': translate, 'rotate': rotate,
            'brightness': factor, 'color': factor, 'contrast': factor, 'sharpness': factor}
        values = torch.stack([strength * largest.get(name, 0.) for name in OPERATIONS])
        values[OPERATIONS.index('posterize')] = 8 - (strength * bits).round()
        values[OPERATIONS.index('solarize')] = 255 * (1 - strength)
        self.register_buffer('values', values)
        self.register_buffer('signed', torch.tensor([name in _SIGNED for name in OPERATIONS]))

    def at_level(
            self,
            images: torch.Tensor,
            operation: torch.Tensor,
            level: torch.Tensor,
            up: torch.Tensor,
    ) -> torch.Tensor:
        """Apply each image's operation at its level. Signed operations are negated where `up` is 0."""
        value = self.values[operation, level]
        return apply_operations(images, operation, torch.where(self.signed[operation] & (up == 0), -value, value))


class TrivialAugment(_Policy):
    """One random operation per image at a random strength, over wide ranges (arXiv:2103.10158)."""

    def __init__(self):
        super().__init__(31, shear=0.99, translate=32, rotate=135, factor=0.99, bits=6)

    def forward(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Augment images (B, 3, H, W) with values 0..255, with random numbers from `draw`."""
        return self.at_level(images, draw(14), draw(31), draw(2))


class _StandardPolicy(_Policy):
    def __init__(self, bins: int, size: int):
        super().__init__(bins, shear=0.3, translate=150 / 331 * size, rotate=30, factor=0.9, bits=4)


class RandAugment(_StandardPolicy):
    """A few random operations per image, all at the same strength (arXiv:1909.13719).

    Args:
        operations: Number of operations applied in sequence.
        magnitude: Strength of the operations, 0 to 30.
        size: Side of the images in pixels. Translations are relative to it.
    """

    def __init__(self, operations: int = 2, magnitude: int = 9, size: int = 32):
        super().__init__(31, size)
        self.operations, self.magnitude = operations, magnitude

    def forward(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Augment images (B, 3, H, W) with values 0..255, with random numbers from `draw`."""
        for _ in range(self.operations):
            operation = draw(14)
            images = self.at_level(images, operation, torch.full_like(operation, self.magnitude), draw(2))
        return images


class AutoAugment(_StandardPolicy):
    """One of the learned operation pairs per image, each operation with its own probability (arXiv:1805.09501).

    Args:
        policy: Name of the policy: 'cifar10' (also for CIFAR-100, as in the paper), 'svhn' or 'imagenet'.
        size: Side of the images in pixels. Translations are relative to it.
    """

    def __init__(self, policy: str = 'cifar10', size: int = 32):
        super().__init__(10, size)
        names = {name.replace('_', ''): i for i, name in enumerate(OPERATIONS)}
        pairs = [
            [(names[operation.lower()], round(10 * probability), level or 0) for operation, probability, level in pair]
            for pair in TorchvisionAutoAugment(AutoAugmentPolicy(policy)).policies]
        self.register_buffer('pairs', torch.tensor(pairs))  # (pairs, 2, [operation, probability in tenths, level])

    def forward(self, images: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Augment images (B, 3, H, W) with values 0..255, with random numbers from `draw`."""
        for operation, tenths, level in self.pairs[draw(len(self.pairs))].permute(1, 2, 0):
            operation = torch.where(draw(10) < tenths, operation, OPERATIONS.index('identity'))
            images = self.at_level(images, operation, level, draw(2))
        return images


def _moved(x: torch.Tensor, operation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Apply shears, translations and rotations as one nearest-neighbour affine map per image, filled with black."""
    h, w = x.shape[2:]

    def of(name: str) -> torch.Tensor:
        return torch.where(operation == OPERATIONS.index(name), value, 0.)

    angle = of('rotate') * (math.pi / 180)
    # Maps output to input, in pixels from the centre. torchvision shears about the top left corner.
    shear_x, shear_y = of('shear_x'), of('shear_y')
    move_x, move_y = of('translate_x').trunc(), of('translate_y').trunc()
    rows, cols = torch.meshgrid(
        torch.arange(h, device=x.device) - (h - 1) / 2, torch.arange(w, device=x.device) - (w - 1) / 2, indexing='ij')
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    top, left = rows + h / 2, cols + w / 2
    source_x = cos * cols - sin * rows + shear_x[:, None, None] * top - move_x[:, None, None]
    source_y = sin * cols + cos * rows + shear_y[:, None, None] * left - move_y[:, None, None]
    grid = torch.stack([source_x * 2 / w, source_y * 2 / h], -1)
    return F.grid_sample(x, grid, mode='nearest', padding_mode='zeros', align_corners=False)


def _smoothed(x: torch.Tensor) -> torch.Tensor:
    kernel = x.new_ones(3, 1, 3, 3)
    kernel[:, :, 1, 1] = 5
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = F.conv2d(x, kernel / 13, groups=3).round()
    return out


def _posterized(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    step = torch.exp2(8 - bits)
    return (x / step).floor() * step


def _autocontrast(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1)), x)


def _equalized(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    levels = x.long().flatten(2)
    counts = torch.zeros(n, c, 256, device=x.device).scatter_add_(2, levels, torch.ones_like(levels, dtype=x.dtype))
    last = counts.gather(2, levels.amax(2, keepdim=True))
    step = ((h * w - last) / 255).floor()
    below = counts.cumsum(2) - counts
    table = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    return torch.where(step > 0, table.gather(2, levels), levels.float()).view_as(x)


Mix = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def mixer(mixup: float, cutmix: float, classes: int) -> Mix | None:
    """Create a torchvision transform that mixes images (B, 3, H, W) and labels (B,), giving targets (B, classes).

    Args:
        mixup: Alpha of mixup (arXiv:1710.09412); 0 disables it.
        cutmix: Alpha of CutMix (arXiv:1905.04899); 0 disables it. With both, one is chosen at random for each batch.
        classes: Number of classes.
    """
    alphas = (v2.MixUp, mixup), (v2.CutMix, cutmix)
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in alphas if alpha]
    return v2.RandomChoice(kinds) if kinds else None
