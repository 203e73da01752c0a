"""Batched operations against torchvision's, image by image."""
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from wrn_timm.data.augment import OPERATIONS, augment, trivial_augment

RANGES = {'shear_x': .99, 'shear_y': .99, 'translate_x': 32., 'translate_y': 32., 'rotate': 135.}
TORCHVISION = {'identity': 'Identity', 'shear_x': 'ShearX', 'shear_y': 'ShearY', 'translate_x': 'TranslateX',
               'translate_y': 'TranslateY', 'rotate': 'Rotate', 'brightness': 'Brightness', 'color': 'Color',
               'contrast': 'Contrast', 'sharpness': 'Sharpness', 'posterize': 'Posterize', 'solarize': 'Solarize',
               'autocontrast': 'AutoContrast', 'equalize': 'Equalize'}


def magnitude(name, strength, sign):
    if name == 'posterize':
        return 8 - round(6 * strength)
    if name == 'solarize':
        return 255 * (1 - strength)
    return sign * strength * RANGES.get(name, .99)


def smooth_images(n):
    """Pictures with structure, so that a wrong pixel shows."""
    coarse = torch.rand(n, 3, 5, 5) * 255
    return torch.nn.functional.interpolate(coarse, 32, mode='bicubic').clamp(0, 255).byte()


@pytest.mark.parametrize('name', OPERATIONS)
@pytest.mark.parametrize('sign', [-1, 1])
def test_each_operation_is_torchvisions(name, sign):
    strengths = [i / 30 for i in (0, 4, 11, 15, 22, 30)]
    images = smooth_images(len(strengths))
    operation = torch.full((len(strengths),), OPERATIONS.index(name))
    ours = augment(images, operation, torch.tensor(strengths), torch.full((len(strengths),), sign))
    for image, result, strength in zip(images, ours, strengths, strict=True):
        expected = _apply_op(image, TORCHVISION[name], magnitude(name, strength, sign), InterpolationMode.NEAREST, None)
        difference = (result.int() - expected.int()).abs()
        # a nearest pixel, or a rounding, may fall to the other side of a half
        assert (difference > 2).float().mean() < (0.05 if name in RANGES else 0.005), (name, strength)


def test_operations_are_drawn_for_each_image_evenly():
    g = torch.Generator().manual_seed(0)
    images = smooth_images(1).expand(4000, -1, -1, -1).contiguous()
    out = trivial_augment(images, g)
    assert out.dtype == torch.uint8
    unchanged = (out == images).flatten(1).all(1).float().mean().item()
    assert 1 / 14 <= unchanged + 0.02 < 0.2  # identity, and the weakest strength of others
    assert torch.equal(out[:8], trivial_augment(images, torch.Generator().manual_seed(0))[:8])
