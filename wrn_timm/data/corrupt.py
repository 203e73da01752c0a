"""Common corruptions of small images, for measuring the robustness of a network.

Results are not comparable with CIFAR-10-C, whose operations and strengths differ.
"""
from __future__ import annotations

import io

import torch
from PIL import Image
from torchvision.transforms.v2.functional import gaussian_blur, pil_to_tensor, to_pil_image

__all__ = ['CORRUPTIONS', 'corrupt']

CORRUPTIONS = {'noise': (8, 16, 32), 'blur': (0.5, 1., 1.5), 'jpeg': (75, 50, 25)}
"""Strengths by kind: standard deviation of noise in grey levels, standard deviation of blur in pixels, JPEG quality."""


def corrupt(images: torch.Tensor, kind: str, strength: float, seed: int = 0) -> torch.Tensor:
    """Return corrupted copies of uint8 images (N, 3, H, W).

    Args:
        images: Images to corrupt.
        kind: One of `CORRUPTIONS`.
        strength: Strength, in the unit of the kind.
        seed: Seed of the noise.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind == 'noise':
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + strength * noise).round().clamp(0, 255).byte()
    if kind == 'blur':
        return gaussian_blur(images, 2 * round(3 * strength) + 1, [strength])
    if kind == 'jpeg':
        return torch.stack([_through_jpeg(image, int(strength)) for image in images])
    raise ValueError(f"corruption {kind!r} is unknown; choose one of {', '.join(CORRUPTIONS)}")


def _through_jpeg(image: torch.Tensor, quality: int) -> torch.Tensor:
    file = io.BytesIO()
    to_pil_image(image).save(file, 'JPEG', quality=quality)
    return pil_to_tensor(Image.open(file))
