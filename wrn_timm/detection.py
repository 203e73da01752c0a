"""Detectors: a registered WRN, a feature pyramid (arXiv:1612.03144) and torchvision's Faster R-CNN or RetinaNet.

    detector = faster_rcnn('wrn50_2', num_classes=20, pretrained=True)
    losses = detector(images, targets)         # torchvision's own interface
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import timm
from timm.data import resolve_model_data_config
from timm.layers import freeze_batch_norm_2d
from timm.utils import freeze
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .wrn import WideResNet

__all__ = ['DETECTORS', 'anchor_generator', 'faster_rcnn', 'fpn_backbone', 'retinanet']

_RATIOS = (0.5, 1., 2.)  # of an anchor's height and width


def fpn_backbone(
        name: str,
        out_indices: Sequence[int] | None = None,
        out_channels: int = 256,
        pretrained: bool = False,
        frozen_norm: bool | None = None,
        frozen_stages: int = 0,
        extra_blocks: ExtraFPNBlock | None = None,
        **model_kwargs: Any,
) -> BackboneWithFPN:
    """A network's stages with a feature pyramid: a backbone for torchvision's detectors.

    Args:
        name: timm name of a WRN.
        out_indices: Levels of its `feature_info`; None for all stages from `layer1` on.
        out_channels: Channels of every level of the pyramid.
        pretrained: Start from the tag's weights.
        frozen_norm: Replace BatchNorm with `FrozenBatchNorm2d`, for small batches; None does so if `pretrained`.
        frozen_stages: Freeze the stem and the first n stages; 0 freezes nothing.
        extra_blocks: Adds levels after the last one; None adds one by max pooling.
        model_kwargs: Passed to `timm.create_model`. The 6N + 4 family gets `stem='imagenet'` by default, because at
            stride 1 a photograph of 640 pixels costs 16 times as much.

    Returns:
        The backbone. It maps images (B, 3, H, W) to a dict of levels (B, out_channels, H/stride, W/stride) with keys
        '0', '1'... In addition to torchvision's attributes it has `strides`, those of the levels taken from the
        network, and `data_config`, the preprocessing of its weights.

    Raises:
        ValueError: The network is not a WRN, has no such levels, or has fewer than `frozen_stages` stages.
    """
    cls = timm.models.model_entrypoint(name.partition('.')[0]) if timm.is_model(name) else None
    if cls is None or not cls.__module__.startswith('wrn_timm'):
        raise ValueError(f"{name} is not a network of this package; timm.list_models('wrn*') lists them")
    if cls.__module__ == WideResNet.__module__:
        model_kwargs.setdefault('stem', 'imagenet')
    model = timm.create_model(name, pretrained=pretrained, **model_kwargs)
    info = model.feature_info
    stages = [i for i, level in enumerate(info) if level['module'].startswith('layer')]
    if out_indices is not None and not (out_indices and all(-len(info) <= i < len(info) for i in out_indices)):
        raise ValueError(f'out_indices {tuple(out_indices)} of {name}: its levels are 0 to {len(info) - 1}')
    taken = stages if out_indices is None else sorted({i % len(info) for i in out_indices})
    if not 0 <= frozen_stages <= len(stages):
        raise ValueError(f'frozen_stages is {frozen_stages}; {name} has {len(stages)} stages')
    if frozen_stages:
        children = [n for n, _ in model.named_children()]
        freeze(model, children[:children.index(info[stages[frozen_stages - 1]]['module']) + 1])
    if pretrained if frozen_norm is None else frozen_norm:
        model = freeze_batch_norm_2d(model)
    backbone = BackboneWithFPN(
        model, {info[i]['module']: str(n) for n, i in enumerate(taken)}, [info[i]['num_chs'] for i in taken],
        out_channels, extra_blocks)
    backbone.strides = tuple(info[i]['reduction'] for i in taken)
    backbone.data_config = resolve_model_data_config(model)
    return backbone


def _normalisation(backbone: BackboneWithFPN) -> dict[str, list[float]]:
    return {f'image_{k}': list(backbone.data_config[k]) for k in ('mean', 'std')}


def anchor_generator(strides: Sequence[int], scale: float, octave: int = 1) -> AnchorGenerator:
    """Anchors of three shapes, in `octave` sizes per level from `scale` strides up to twice that."""
    sizes = tuple(tuple(int(scale * s * 2 ** (i / octave)) for i in range(octave)) for s in strides)
    return AnchorGenerator(sizes, (_RATIOS,) * len(strides))


def faster_rcnn(
        name: str,
        num_classes: int,
        anchor_scale: float = 8.,
        detector_kwargs: dict[str, Any] | None = None,
        **backbone_kwargs: Any,
) -> FasterRCNN:
    """torchvision's Faster R-CNN (arXiv:1506.01497) on a WRN.

    Args:
        name: timm name of a WRN.
        num_classes: Number of classes without the background. Labels of targets run from 1 to `num_classes`.
        anchor_scale: Side of the anchors, in strides of their level (8 in torchvision).
        detector_kwargs: Passed to `FasterRCNN`: `min_size`, `box_score_thresh`...
        backbone_kwargs: Passed to `fpn_backbone`.

    Raises:
        ValueError: As for `fpn_backbone`.
    """
    backbone = fpn_backbone(name, extra_blocks=LastLevelMaxPool(), **backbone_kwargs)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    return FasterRCNN(backbone, num_classes + 1, **{
        **_normalisation(backbone),
        'rpn_anchor_generator': anchor_generator(strides, anchor_scale),
        'box_roi_pool': MultiScaleRoIAlign([str(i) for i in range(len(backbone.strides))], 7, sampling_ratio=2),
        **(detector_kwargs or {})})


def retinanet(
        name: str,
        num_classes: int,
        anchor_scale: float = 4.,
        detector_kwargs: dict[str, Any] | None = None,
        out_indices: Sequence[int] | None = None,
        out_channels: int = 256,
        **backbone_kwargs: Any,
) -> RetinaNet:
    """torchvision's RetinaNet (arXiv:1708.02002) on a WRN.

    Two levels are added by convolution. Each level has anchors of `anchor_scale` strides, and of 2^(1/3) and 2^(2/3)
    times that size. Arguments and errors are those of `faster_rcnn`; `out_indices` None takes the last three levels.
    """
    backbone = fpn_backbone(
        name, (-3, -2, -1) if out_indices is None else out_indices, out_channels,
        extra_blocks=LastLevelP6P7(out_channels, out_channels), **backbone_kwargs)
    strides = [*backbone.strides, 2 * backbone.strides[-1], 4 * backbone.strides[-1]]
    return RetinaNet(backbone, num_classes + 1, **{
        **_normalisation(backbone), 'anchor_generator': anchor_generator(strides, anchor_scale, 3),
        **(detector_kwargs or {})})


DETECTORS = {'faster_rcnn': faster_rcnn, 'retinanet': retinanet}
