"""TrivialAugment (arXiv:2103.10158), each image its own operation, as arithmetic on a whole batch on its device.

The operations and ranges are torchvision's `TrivialAugmentWide`. Every operation is computed for every image and one is
selected: at 32x32 pixels that costs less than the host round trips of gathering the images of each operation.
"""
import math

import torch
import torch.nn.functional as F

__all__ = ['OPERATIONS', 'trivial_augment']

OPERATIONS = (
    'identity', 'shear_x', 'shear_y', 'translate_x', 'translate_y', 'rotate', 'brightness', 'color', 'contrast',
    'sharpness', 'posterize', 'solarize', 'autocontrast', 'equalize')


def trivial_augment(
        images: torch.Tensor,
        operation: torch.Tensor,
        level: torch.Tensor,
        up: torch.Tensor,
) -> torch.Tensor:
    """Apply `OPERATIONS[operation]` to each image.

    Args:
        images: (B, 3, H, W), values 0..255, integer or float; the same type comes back.
        operation: int64 (B,), below 14.
        level: int64 (B,), 0 to 30: the strength, of 31 that span the operation's range.
        up: int64 (B,), 0 or 1: the direction, of the operations that go both ways.
    """
    x, strength, sign = images.float(), level / 30, up * 2 - 1
    m, s = (v.float()[:, None, None, None] for v in (strength, strength * sign))
    blended = 1 + 0.99 * s
    grey = (x * x.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    results = {
        'brightness': x * blended,
        'color': torch.lerp(grey, x, blended),
        'contrast': torch.lerp(grey.floor().mean((1, 2, 3), keepdim=True), x, blended),
        'sharpness': torch.lerp(_smoothed(x), x, blended),
        'posterize': _posterized(x, m),
        'solarize': torch.where(x >= 255 * (1 - m), 255 - x, x),
        'autocontrast': _autocontrast(x),
        'equalize': _equalized(x),
    }
    out = _moved(x, operation, strength, sign)
    for name, result in results.items():
        out = torch.where((operation == OPERATIONS.index(name))[:, None, None, None], result, out)
    return out.clamp(0, 255).floor().to(images.dtype)


def _moved(x: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """Shears, translations and rotations as one nearest-pixel affine map an image; black comes in from outside."""
    n, _, h, w = x.shape
    value = strength * sign

    def of(name: str) -> torch.Tensor:
        return torch.where(operation == OPERATIONS.index(name), value, 0.)

    angle = of('rotate') * math.radians(135)
    # Output to input, in pixels about the centre; torchvision's shears are about the top left corner.
    shear_x, shear_y = of('shear_x') * 0.99, of('shear_y') * 0.99
    move_x, move_y = (of('translate_x') * 32).trunc(), (of('translate_y') * 32).trunc()
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


def _posterized(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    step = torch.exp2((6 * m).round())
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
