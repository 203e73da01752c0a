"""A few common corruptions of small images, to see what a network does with worse pictures than it learnt from.

They are this package's own, and not CIFAR-10-C: other operations, other strengths, other numbers.
"""
from __future__ import annotations

import torch
from torchvision.transforms.v2 import functional as tv

__all__ = ['CORRUPTIONS', 'corrupt']

CORRUPTIONS = {'noise': (8, 16, 32), 'blur': (0.5, 1., 1.5), 'jpeg': (75, 50, 25)}
"""Standard deviation in grey levels of Gaussian noise, in pixels of a Gaussian blur, and quality of a JPEG file."""


def corrupt(images: torch.Tensor, kind: str, strength: float, seed: int = 0) -> torch.Tensor:
    """Corrupted copies of uint8 images (N, 3, H, W).

    Args:
        images: What to corrupt.
        kind: One of `CORRUPTIONS`.
        strength: In the unit of its kind.
        seed: Of the noise.

    Raises:
        ValueError: The kind is unknown.
    """
    if kind == 'noise':
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        return (images + strength * noise).round().clamp(0, 255).byte()
    if kind == 'blur':
        return tv.gaussian_blur(images, 2 * round(3 * strength) + 1, [strength])
    if kind == 'jpeg':
        return torch.stack([tv.jpeg(image, int(strength)) for image in images])
    raise ValueError(f"corruption {kind!r} is unknown; choose one of {', '.join(CORRUPTIONS)}")
