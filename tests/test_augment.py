"""Batched operations against torchvision's, image by image, and policies against its tables."""
import itertools

import pytest
import torch
import torchvision.transforms as tv
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from wrn_timm.data.augment import OPERATIONS, AutoAugment, RandAugment, TrivialAugment, apply_operations

TORCHVISION = {'identity': 'Identity', 'shear_x': 'ShearX', 'shear_y': 'ShearY', 'translate_x': 'TranslateX',
               'translate_y': 'TranslateY', 'rotate': 'Rotate', 'brightness': 'Brightness', 'color': 'Color',
               'contrast': 'Contrast', 'sharpness': 'Sharpness', 'posterize': 'Posterize', 'solarize': 'Solarize',
               'autocontrast': 'AutoContrast', 'equalize': 'Equalize', 'invert': 'Invert'}
# policy, torchvision's table of (magnitudes, signed) for it
POLICIES = {
    'trivial': (TrivialAugment(), tv.TrivialAugmentWide()._augmentation_space(31)),
    'rand': (RandAugment(size=40), tv.RandAugment()._augmentation_space(31, (40, 40))),
    'auto': (AutoAugment(size=40), tv.AutoAugment()._augmentation_space(10, (40, 40))),
}


def smooth_images(n):
    """Pictures with structure, so that a wrong pixel shows."""
    coarse = torch.rand(n, 3, 5, 5) * 255
    return torch.nn.functional.interpolate(coarse, 32, mode='bicubic').clamp(0, 255).byte()


def torchvisions(image, name, value):
    return _apply_op(image, TORCHVISION[name], value, InterpolationMode.NEAREST, None)


def share_that_differs(a, b):
    """Share of values more than rounding apart: a nearest pixel may fall to the other side of a half."""
    return ((a.int() - b.int()).abs() > 2).float().mean().item()


@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize('sign', [-1, 1])
def test_each_operation_is_torchvisions(name, sign):
    magnitudes, signed = tv.TrivialAugmentWide()._augmentation_space(31).get(
        TORCHVISION[name], (torch.tensor(0.), False))
    values = magnitudes.flatten()[[0, 4, 11, 15, 22, 30] if magnitudes.ndim else [0]].float()
    values = sign * values if signed else values
    images = smooth_images(len(values))
    ours = apply_operations(images, torch.full((len(values),), OPERATIONS.index(name)), values)
    assert ours.dtype == torch.uint8
    for image, result, value in zip(images, ours, values.tolist(), strict=True):
        limit = 0.05 if name in ('rotate', 'shear_x', 'shear_y') else 0.005
        assert share_that_differs(result, torchvisions(image, name, value)) < limit, (name, value)


@pytest.mark.parametrize('policy', POLICIES)
def test_strengths_are_torchvisions(policy):
    ours, theirs = POLICIES[policy]
    for i, name in enumerate(OPERATIONS):
        if TORCHVISION[name] in theirs:
            magnitudes, signed = theirs[TORCHVISION[name]]
            assert bool(ours.signed[i]) == signed, name
            torch.testing.assert_close(ours.values[i], magnitudes.float().expand(len(ours.values[i])), msg=name)


class Script:
    """Draws written down beforehand: each a list of one number an image."""

    def __init__(self, *draws):
        self.draws = list(draws)

    def __call__(self, high):
        drawn = torch.tensor(self.draws.pop(0))
        assert drawn.max() < high
        return drawn


def test_rand_augment_is_its_operations_one_after_the_other():
    images, first, second = smooth_images(3), [8, 11, 13], [10, 6, 5]
    ours = RandAugment(2, 20)(images, Script(first, [0, 1, 1], second, [1, 0, 1]))
    magnitudes = tv.RandAugment()._augmentation_space(31, (32, 32))
    for i, image in enumerate(images):
        for operation, up in ((first[i], (0, 1, 1)[i]), (second[i], (1, 0, 1)[i])):
            values, signed = magnitudes[TORCHVISION[OPERATIONS[operation]]]
            value = float(values[20]) if values.ndim else 0.
            image = torchvisions(image, OPERATIONS[operation], -value if signed and not up else value)
        assert share_that_differs(ours[i], image) < 0.02


@pytest.mark.parametrize('policy', ['cifar10', 'svhn'])
def test_auto_augment_applies_the_published_pairs(policy):
    """Every pair, with each half applied or not by the draw against its probability."""
    pairs = tv.AutoAugment(tv.AutoAugmentPolicy(policy)).policies
    magnitudes = tv.AutoAugment()._augmentation_space(10, (32, 32))
    names = {v: k for k, v in TORCHVISION.items()}
    for first, second in itertools.product((0, 9), repeat=2):  # tenths drawn
        images = smooth_images(len(pairs))
        n = len(pairs)
        ours = AutoAugment(policy)(
            images, Script(list(range(n)), [first] * n, [1] * n, [second] * n, [1] * n))
        for pair, image, result in zip(pairs, images, ours, strict=True):
            for drawn, (operation, probability, level) in zip((first, second), pair, strict=True):
                if drawn < 10 * probability - 1e-9:
                    value = float(magnitudes[operation][0][level]) if level is not None else 0.
                    image = torchvisions(image, names[operation], value)
            assert share_that_differs(result, image) < 0.05, pair


@pytest.mark.parametrize('policy', POLICIES)
def test_policies_change_most_images_and_not_all_alike(policy):
    images = smooth_images(1).expand(64, -1, -1, -1)
    g = torch.Generator().manual_seed(0)
    out = POLICIES[policy][0](images, lambda high: torch.randint(high, (64,), generator=g))
    assert out.shape == images.shape and len(torch.unique(out.flatten(1), dim=0)) > 20
