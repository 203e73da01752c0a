"""Loader of small images, which are kept on the training device as uint8 and augmented there in batches."""
from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .small_sets import ImageArrays

__all__ = ['DeviceLoader']


def _reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Map indices that reach into a reflected border (without repeating the edge pixel) to indices into the image."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


class DeviceLoader:
    """Loader of shuffled, augmented and normalised batches, without host round trips.

    Random numbers depend only on (seed, epoch, step), so that a run resumed at any step sees the same batches.

    Args:
        data: The training images.
        batch_size: Images per batch. An incomplete last batch is dropped.
        device: Device on which the images are kept and augmented.
        pad: Width in pixels of the reflected border for random cropping (section 3 of the paper); 0 for none.
        flip: Mirror each image with probability 1/2.
        alternate_flip: Instead mirror each image in every second epoch, starting with a random half of them in the
            first (arXiv:2404.00498).
        cutout: Side in pixels of the square set to the mean (arXiv:1708.04552); 0 for none.
        augment: Policy of `data.augment`, applied after crop and flip; None for none.
        seed: Seed of the run.
        rank: Rank of this process, which takes every `world_size`-th image of each batch.
        world_size: Number of processes that share a batch. The batches do not depend on it.

    Raises:
        ValueError: The data set is smaller than one batch, or a batch cannot be divided among the processes.
    """

    def __init__(
            self,
            data: ImageArrays,
            batch_size: int,
            device: torch.device | str,
            pad: int = 4,
            flip: bool = True,
            alternate_flip: bool = False,
            cutout: int = 0,
            augment: torch.nn.Module | None = None,
            seed: int = 0,
            rank: int = 0,
            world_size: int = 1,
    ):
        if len(data) < batch_size:
            raise ValueError(f'batch size {batch_size} is larger than the {len(data)} training images')
        if batch_size % world_size:
            raise ValueError(f'batch size {batch_size} cannot be divided among {world_size} processes')
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.augment = augment and augment.to(self.device)
        self.batch_size, self.pad, self.flip, self.cutout, self.seed = batch_size, pad, flip, cutout, seed
        self.alternate_flip = alternate_flip
        self.size = data.images.shape[-2:]
        self.images = data.images.to(self.device)
        self.labels = data.labels.to(self.device)
        self.scale = torch.tensor(data.std, device=self.device)[:, None, None].mul(255).reciprocal()
        self.shift = -torch.tensor(data.mean, device=self.device)[:, None, None].mul(255) * self.scale
        self._generator = torch.Generator(self.device)
        self._flipped_first = torch.randint(2, (len(data),), generator=self._seeded(0, -2), device=self.device)

    def __len__(self) -> int:
        """Steps per epoch."""
        return len(self.labels) // self.batch_size

    def epoch(
            self, epoch: int, first_step: int = 0, size: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Iterate over the batches of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            first_step: Step to begin with.
            size: Side in pixels to which images are resized after augmentation; None keeps their size.

        Yields:
            Float images (B, 3, size, size) in channels_last, and int64 labels (B,).
        """
        order = torch.randperm(len(self.labels), generator=self._seeded(epoch, -1), device=self.device)
        for step in range(first_step, len(self)):
            index = order[step * self.batch_size:(step + 1) * self.batch_size]
            images = self._augment(index, epoch, self._seeded(epoch, step))
            if size not in (None, self.size[0]):
                images = F.interpolate(images, (size, size), mode='bilinear', antialias=True)
            yield (images.contiguous(memory_format=torch.channels_last),
                   self.labels[index[self.rank::self.world_size]])

    def _seeded(self, epoch: int, step: int) -> torch.Generator:
        return self._generator.manual_seed(((self.seed * 100_003 + epoch) * 1_000_003 + step + 1) % 2 ** 63)

    def _augment(self, index: torch.Tensor, epoch: int, g: torch.Generator) -> torch.Tensor:
        h, w = self.size

        def draw(high: int) -> torch.Tensor:
            """Draw one number per image of the whole batch, so that it does not depend on the number of processes."""
            return torch.randint(high, (self.batch_size, 1), generator=g, device=self.device)[mine]

        mine = slice(self.rank, None, self.world_size)
        index = index[mine]
        n = len(index)
        rows = torch.arange(h, device=self.device).expand(n, h)
        cols = torch.arange(w, device=self.device).expand(n, w)
        if self.alternate_flip:
            cols = torch.where(((self._flipped_first[index] + epoch) % 2).bool()[:, None], w - 1 - cols, cols)
        elif self.flip:
            cols = torch.where(draw(2).bool(), w - 1 - cols, cols)
        if self.pad:
            rows = _reflected(rows + draw(2 * self.pad + 1) - self.pad, h)
            cols = _reflected(cols + draw(2 * self.pad + 1) - self.pad, w)
        # One gather crops and flips. Its NHWC result is channels_last once permuted.
        x = self.images[index[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        if self.augment:
            x = self.augment(x, lambda high: draw(high)[:, 0])
        x = x * self.scale + self.shift
        if self.cutout:
            half = self.cutout // 2
            y0, x0 = draw(h) - half, draw(w) - half
            ys, xs = torch.arange(h, device=self.device), torch.arange(w, device=self.device)
            inside = ((ys >= y0) & (ys < y0 + self.cutout))[:, :, None] & \
                ((xs >= x0) & (xs < x0 + self.cutout))[:, None, :]
            x = x.masked_fill(inside[:, None], 0.)
        return x
