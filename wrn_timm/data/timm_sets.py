"""Data sets that timm reads by name (`hfds/...`, `wds/...`), from the Hub or too large for one disk."""
from __future__ import annotations

import functools
import io
import itertools
import logging
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets import DatasetFolder

from ..names import some
from .images import as_rgb, check_shape, read_rgb

__all__ = ['NamedImages', 'is_named']

_logger = logging.getLogger(__name__)

_DECODED = ('hfids/', 'wds/')  # streams of decoded images
_PREFIXES = ('hfds/', 'hfids/', 'tfds/', 'wds/', 'torch/')


def is_named(source: str) -> bool:
    """Whether this source is the name of one of timm's data sets."""
    return source.startswith(_PREFIXES) and not Path(source).exists()


class NamedImages:
    """A split of one of timm's data sets, used in place of `ImageFiles`. Its images have no paths.

    Args:
        source: timm's name of the data set, with `:DIR` if it needs a folder: `hfds/user/name`, `wds/name:DIR`.
        split: Name of the split in the data set.
        training: Shuffle the data set if it is streamed.
        download: Download the data set if it is missing and supports downloading.
        classes: Class names; None takes those of the data set.
        keys: Columns of the images and of the labels, as timm's `input_key` and `target_key`; '' for timm's default.

    Raises:
        ValueError: timm cannot open the split, a column is missing, the classes are unknown, or the labels of the split
            are hidden.
    """

    def __init__(
            self,
            source: str,
            split: str,
            training: bool = False,
            download: bool = False,
            classes: Sequence[str] | None = None,
            keys: tuple[str, str] = ('', ''),
    ):
        name, _, root = source.partition(':')
        more = {k: v for k, v in zip(('input_key', 'target_key'), keys, strict=True) if v}
        if name.startswith(_DECODED):
            more['input_img_mode'] = ''  # converted here, like files; timm would ignore rotation and transparency
        try:
            self.dataset = create_dataset(
                name, root=root or None, split=split, is_training=training, download=download, **more)
        except (ImportError, AssertionError, KeyError, TypeError, ValueError, RuntimeError, OSError) as e:
            remedy = '. Its size is not recorded; give it as hfds/...' if 'num_samples' in str(e) else ''
            raise ValueError(
                f'{source}: timm cannot open the split {split!r}: {type(e).__name__}: {e}{remedy}') from e
        if isinstance(self.dataset, ImageDataset):
            self.dataset.load_bytes = True  # decoded here, like files; timm would replace a bad image with the next one
        elif isinstance(self.dataset, DatasetFolder):
            self.dataset.loader = read_rgb
        self.source, self.split = source, split
        self._check_columns()
        self.classes = tuple(classes or _classes(self.dataset))
        if not self.classes:
            raise ValueError(f'{source} does not say how many classes it has; give --num-classes')
        self.streamed = isinstance(self.dataset, IterableDataset)
        if not self.streamed:
            self._check_first_label()

    def _check_columns(self) -> None:
        """Reject a data set of the Hub whose images or labels are in other columns, or whose labels are no indices."""
        reader = getattr(self.dataset, 'reader', None)
        if self.source.startswith('hfids/') and reader.builder.info.features:
            names, keys, first = list(reader.builder.info.features), (reader.input_key, reader.target_key), None
        elif self.source.startswith('hfds/') and reader and len(reader):
            first, keys = reader.dataset[0], (reader.image_key, reader.label_key)
            names = [n for n, v in first.items() if n != keys[0] or v is not None]  # `datasets` adds a missing column
        else:
            return
        if missing := [key for key in keys if key.partition('/')[0] not in names]:  # timm's a/b is b in the column a
            raise ValueError(f'{self.source} has no column {missing[0]}, only {some(names)}; give --input-key for the '
                             f'images and --target-key for the labels')
        label = first and functools.reduce(operator.getitem, keys[1].split('/'), first)
        if first and label is None:
            raise ValueError(f'{self.source}: the first image of the split {self.split!r} has no label; choose other '
                             f'--parts')
        if first and not isinstance(label, int):
            raise ValueError(f'{self.source}: the column {keys[1]} holds {label!r}, which is not the index of a class; '
                             f'choose another --target-key')

    def _check_first_label(self) -> None:
        """Reject a split with hidden labels, as many test splits have, before training."""
        try:
            label = _read(self, 0)[1]
        except ValueError:  # the image is left out later
            return
        if not 0 <= label < len(self.classes):
            raise ValueError(f'{self.source}: the first image of the split {self.split!r} has the label {label}, which '
                             f'is none of the {len(self.classes)} classes; choose other --parts')

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, i: int) -> str:
        """Name of an image."""
        return f'{self.source} {self.split} {i}'

    def read(self, i: int) -> Image.Image:
        """Read an image as RGB.

        Raises:
            ValueError: The image cannot be read, or the data set is a stream.
        """
        if self.streamed:
            raise ValueError(f'{self.source} is a stream; its images cannot be read individually')
        return _read(self, i)[0]

    def as_dataset(self, transform: Any) -> Dataset:
        """Return a data set of (transform(RGB image), label), with the index as well if it is a stream."""
        return _Stream(self, transform) if self.streamed else _Indexed(self, transform)


def _read(images: NamedImages, i: int) -> tuple[Image.Image, int]:
    try:
        image, label = images.dataset[i]
        if not isinstance(image, bytes):
            check_shape(image.size)
            return as_rgb(image), int(label)
    except Exception as e:  # timm's readers can raise anything
        raise ValueError(f'{images.name(i)} cannot be read: {e}') from e
    return read_rgb(io.BytesIO(image), name=images.name(i)), int(label)


class _Indexed(Dataset):
    def __init__(self, images: NamedImages, transform: Any):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        image, label = _read(self.images, i)
        return self.transform(image), label


class _Stream(IterableDataset):
    def __init__(self, images: NamedImages, transform: Any):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that determines the order."""
        self.images.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, int, int]]:
        images = iter(self.images.dataset)
        for i in itertools.count():
            try:
                image, label = next(images)
            except StopIteration:
                return
            except Exception as e:  # timm's readers can raise anything, and cannot go on
                raise ValueError(f'{self.images.name(i)} cannot be read: {e}; a stream cannot leave it out, but '
                                 f'hfds/ can') from e
            try:
                check_shape(image.size)
                image = as_rgb(image)
            except Exception as e:  # decoders raise almost anything for damaged images
                _logger.warning('left out: %s: %s', self.images.name(i), e)
            else:
                yield self.transform(image), int(label), i


def _classes(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, 'reader', None)
    if number := getattr(reader, 'class_to_idx', None) or getattr(dataset, 'class_to_idx', None):
        return tuple(str(c) for c in sorted(number, key=number.get))
    if names := getattr(dataset, 'classes', None):
        return tuple(map(str, names))
    return tuple(map(str, range(getattr(reader, 'info', None) and reader.info.get('num_classes') or 0)))
