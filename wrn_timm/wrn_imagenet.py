"""Wide Residual Networks for ImageNet, built on timm's ResNet.

Paper: `Wide Residual Networks` - https://arxiv.org/abs/1605.07146 (section 3.4, tables 7 and 8)

The blocks are post-activation, and the stem is the usual 7x7 one with 64 channels. Bottleneck networks widen the inner
3x3 convolution. Networks of basic blocks widen both convolutions, and thus the output of every stage.

With `stem='cifar'`, a network has a 3x3 stem with stride 1 and no pooling, for images of about 32 pixels.
"""

import dataclasses
from typing import Any

import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, get_arch_pretrained_cfgs, register_model
from timm.models._pretrained import PretrainedCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .checkpoints import fit_to_model
from .weights import SOURCES, locate

__all__ = []


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1605.07146', 'paper_name': 'Wide Residual Networks',
        'origin_url': 'https://github.com/szagoruyko/wide-residual-networks',
        **kwargs,
    }


def _hosted_by_timm(arch: str, timm_arch: str) -> dict[str, PretrainedCfg]:
    """timm's pretrained configurations of the same network, each with the full name of its Hub repository."""
    return {
        f'{arch}.{cfg.tag}': dataclasses.replace(
            cfg, architecture=None, tag=None, url=None, hf_hub_id=f'timm/{name}',
            paper_ids='arXiv:1605.07146', paper_name='Wide Residual Networks')
        for name, cfg in get_arch_pretrained_cfgs(timm_arch).items()
    }


default_cfgs = generate_default_cfgs({
    **_hosted_by_timm('wrn50_2', 'wide_resnet50_2'),
    **_hosted_by_timm('wrn101_2', 'wide_resnet101_2'),
    **_hosted_by_timm('wrn18_1', 'resnet18'),
    **_hosted_by_timm('wrn34_1', 'resnet34'),
    'wrn50_4.untrained': _cfg(),
    'wrn152_2.untrained': _cfg(),
    'wrn200_2.untrained': _cfg(),
    'wrn18_1_5.untrained': _cfg(),
    'wrn18_2.untrained': _cfg(),
    'wrn18_3.untrained': _cfg(),
    'wrn34_1_5.untrained': _cfg(),
    'wrn34_2.untrained': _cfg(),
})


def _resnet(stem: str = 'imagenet', in_chans: int = 3, output_stride: int | None = None, **kwargs: Any) -> ResNet:
    """Build timm's ResNet with either stem.

    Raises:
        ValueError: The stem is unknown, or it does not allow this output stride.
    """
    if stem not in ('cifar', 'imagenet'):
        raise ValueError(f"stem {stem!r} is unknown; choose 'cifar' or 'imagenet'")
    strides = {8 // (4 if stem == 'cifar' else 1) * 2 ** i: 8 * 2 ** i for i in range(3)}  # our output stride: timm's
    if output_stride not in (None, *strides):
        raise ValueError(f'output_stride is {output_stride}; with the {stem!r} stem it can be '
                         f'{" or ".join(", ".join(map(str, strides)).rsplit(", ", 1))}')
    model = ResNet(in_chans=in_chans, output_stride=strides.get(output_stride, 32), **kwargs)
    if stem == 'cifar':
        old = model.conv1.weight
        model.conv1 = nn.Conv2d(
            in_chans, len(old), 3, padding=1, bias=False, device=old.device, dtype=old.dtype)
        nn.init.kaiming_normal_(model.conv1.weight, mode='fan_out', nonlinearity='relu')
        model.maxpool = nn.Identity()
        model.stem_swapped = True
        for stage in model.feature_info:
            stage['reduction'] //= 2 if stage['module'] == 'act1' else 4
    return model


def _create_wrn_imagenet(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNet:
    cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None) or {}
    if cfg is None and any(overlay.get(k) for k in SOURCES):  # the user's own weights, with the licence of nobody else
        overlay = {'tag': None, 'license': None, 'origin_url': None, **overlay}
    if pretrained and kwargs.get('features_only'):
        kwargs['num_classes'] = 0  # no advice on the classifier of the checkpoint
    source = locate(variant, pretrained, cfg, overlay, kwargs.get('cache_dir'))
    return build_model_with_cfg(_resnet, variant, pretrained, pretrained_filter_fn=fit_to_model, **source, **kwargs)


def _bottleneck(variant: str, pretrained: bool, width: int, layers: tuple[int, ...], **kwargs: Any) -> ResNet:
    model_args = dict(block=Bottleneck, layers=layers, base_width=64 * width)
    return _create_wrn_imagenet(variant, pretrained, **(model_args | kwargs))


def _basic(variant: str, pretrained: bool, width: float, layers: tuple[int, ...], **kwargs: Any) -> ResNet:
    model_args = dict(block=BasicBlock, layers=layers, channels=tuple(int(c * width) for c in (64, 128, 256, 512)))
    return _create_wrn_imagenet(variant, pretrained, **(model_args | kwargs))


@register_model
def wrn50_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-50-2-bottleneck (table 8), the network that timm and torchvision call wide_resnet50_2."""
    return _bottleneck('wrn50_2', pretrained, 2, (3, 4, 6, 3), **kwargs)


@register_model
def wrn50_4(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-50-4-bottleneck."""
    return _bottleneck('wrn50_4', pretrained, 4, (3, 4, 6, 3), **kwargs)


@register_model
def wrn101_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-101-2-bottleneck, the network that timm and torchvision call wide_resnet101_2."""
    return _bottleneck('wrn101_2', pretrained, 2, (3, 4, 23, 3), **kwargs)


@register_model
def wrn152_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-152-2-bottleneck."""
    return _bottleneck('wrn152_2', pretrained, 2, (3, 8, 36, 3), **kwargs)


@register_model
def wrn200_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-200-2-bottleneck."""
    return _bottleneck('wrn200_2', pretrained, 2, (3, 24, 36, 3), **kwargs)


@register_model
def wrn18_1(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-18-1 (table 7), also known as ResNet-18."""
    return _basic('wrn18_1', pretrained, 1, (2, 2, 2, 2), **kwargs)


@register_model
def wrn18_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-18-1.5 (table 7)."""
    return _basic('wrn18_1_5', pretrained, 1.5, (2, 2, 2, 2), **kwargs)


@register_model
def wrn18_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-18-2 (table 7)."""
    return _basic('wrn18_2', pretrained, 2, (2, 2, 2, 2), **kwargs)


@register_model
def wrn18_3(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-18-3 (table 7)."""
    return _basic('wrn18_3', pretrained, 3, (2, 2, 2, 2), **kwargs)


@register_model
def wrn34_1(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-34-1 (table 7), also known as ResNet-34."""
    return _basic('wrn34_1', pretrained, 1, (3, 4, 6, 3), **kwargs)


@register_model
def wrn34_1_5(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-34-1.5 (table 7)."""
    return _basic('wrn34_1_5', pretrained, 1.5, (3, 4, 6, 3), **kwargs)


@register_model
def wrn34_2(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """WRN-34-2 (tables 7 and 8)."""
    return _basic('wrn34_2', pretrained, 2, (3, 4, 6, 3), **kwargs)
