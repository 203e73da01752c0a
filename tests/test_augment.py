"""Batched operations against torchvision's, image by image."""
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from wrn_timm.data.augment import OPERATIONS, trivial_augment

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
    levels = (0, 4, 11, 15, 22, 30)
    images = smooth_images(len(levels))
    operation = torch.full((len(levels),), OPERATIONS.index(name))
    ours = trivial_augment(images, operation, torch.tensor(levels), torch.full((len(levels),), (sign + 1) // 2))
    assert ours.dtype == torch.uint8
    for image, result, level in zip(images, ours, levels, strict=True):
        expected = _apply_op(
            image, TORCHVISION[name], magnitude(name, level / 30, sign), InterpolationMode.NEAREST, None)
        difference = (result.int() - expected.int()).abs()
        # a nearest pixel, or a rounding, may fall to the other side of a half
        assert (difference > 2).float().mean() < (0.05 if name in RANGES else 0.005), (name, level)

