"""Pre-activation Wide Residual Networks for small images (the CIFAR family, depth 6N + 4).

Paper: `Wide Residual Networks` - https://arxiv.org/abs/1605.07146 (table 1, figure 1 d)

WRN-depth-k has a 3x3 stem with 16 channels and three stages of N basic blocks with 16k, 32k and 64k channels, where k
is the width. The shortcut of the first block of a stage is a 1x1 convolution of the pre-activated input, without
BatchNorm. The exception is the first stage for k = 1, which keeps the 16 channels of the stem and the identity.

The depth 6N + 4 counts two 3x3 convolutions in each of the 3N blocks, the stem, and three 1x1 shortcuts (three for
k = 1 too). WRN-28-10 has N = 4 and k = 10, WRN-16-1 has N = 2 and k = 1. In some tutorials n is the depth, in others it
is N; one takes the 10 of "WRN-28-10" for N and builds a WRN-64-4.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    LayerType,
    calculate_drop_path_rates,
    create_act_layer,
    create_classifier,
    get_norm_layer,
)
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, is_model, register_model
from timm.models._features import feature_take_indices

from .checkpoints import fit_to_model
from .weights import SOURCES, default_tag, locate, published, sources

__all__ = ['WideResNet', 'register_wrn']

STAGES = ('layer1', 'layer2', 'layer3')


def _act_after(norm: nn.Module, act_layer: LayerType) -> nn.Module:
    """Activation that overwrites the output of `norm`; nn.Identity returns its input, which must stay as it is."""
    return create_act_layer(act_layer, inplace=not isinstance(norm, nn.Identity))


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3-BN-ReLU-(dropout)-conv3x3 (paper, figure 1 d).

    BN and ReLU are separate modules, because tools that replace BatchNorm (by SyncBatchNorm or FrozenBatchNorm2d) would
    drop an activation fused into it.
    """

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            stride: int = 1,
            dilation: tuple[int, int] = (1, 1),
            conv_drop_rate: float = 0.,
            drop_path: float = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: type[nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        first, second = dilation
        self.bn1 = norm_layer(in_chs, **dd)
        self.act1 = _act_after(self.bn1, act_layer)
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=first, dilation=first, bias=False, **dd)
        self.bn2 = norm_layer(out_chs, **dd)
        self.act2 = _act_after(self.bn2, act_layer)
        self.drop = nn.Dropout(conv_drop_rate) if conv_drop_rate > 0. else nn.Identity()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=second, dilation=second, bias=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0. else nn.Identity()
        if stride != 1 or in_chs != out_chs:
            self.shortcut = nn.Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd)
        else:
            self.shortcut = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = self.conv1(out)
        out = self.conv2(self.drop(self.act2(self.bn2(out))))
        return self.drop_path(out) + shortcut


def _stem_reduction(stem: str, output_stride: int | None) -> int:
    """Check the stem and output stride, and return the reduction of the stem."""
    if stem not in ('cifar', 'imagenet'):
        raise ValueError(f"stem {stem!r} is unknown; choose 'cifar' or 'imagenet'")
    reduction = 4 if stem == 'imagenet' else 1
    if output_stride not in (None, reduction, 2 * reduction, 4 * reduction):
        raise ValueError(f'output_stride is {output_stride}; with the {stem!r} stem it can be {reduction}, '
                         f'{2 * reduction} or {4 * reduction}')
    return reduction


class WideResNet(nn.Module):
    """WRN-depth-width for images of any size (`Wide Residual Networks`, table 1).

    Args:
        depth: Depth 6N + 4, which counts the 3x3 convolutions and three 1x1 shortcuts, as in the paper.
        width: Widening factor k; 16k must be a whole number of channels.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling: '', 'avg', 'max', 'avgmax' or 'catavgmax'.
        stem: 'cifar' (3x3; stages at reductions 1, 2, 4) or 'imagenet' (7x7 with stride 2, and max pooling; 4, 8, 16).
        output_stride: Largest reduction; stages beyond it are dilated instead. None for no limit.
        drop_rate: Dropout rate before the classifier.
        conv_drop_rate: Dropout rate between the convolutions of a block (paper, section 2.4: 0.3 for CIFAR, 0.4 for
            SVHN).
        drop_path_rate: Stochastic depth rate of the last block; it rises linearly from 0 in the first block.
        act_layer: Activation layer, by timm name or class.
        norm_layer: Normalisation layer, by timm name ('groupnorm1') or class (`partial(GroupNorm, num_groups=16)`).
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Shapes: images (B, in_chans, H, W) give logits (B, num_classes). `forward_features` returns the features after the
    last BN-ReLU, (B, 64k, H/4, W/4), or (B, 64k, H/16, W/16) with the ImageNet stem.

    Raises:
        ValueError: The depth is not 6N + 4, the width gives fractional channels, the stem is unknown, or it does not
            allow this output stride.
    """

    def __init__(
            self,
            depth: int = 28,
            width: float = 10,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            stem: str = 'cifar',
            output_stride: int | None = None,
            drop_rate: float = 0.,
            conv_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            act_layer: LayerType = nn.ReLU,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        num_blocks, channels = _layout(depth, width)
        in_chs, reduction = 16, _stem_reduction(stem, output_stride)
        norm_layer = get_norm_layer(norm_layer)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.stem_swapped = stem != 'cifar'
        self.grad_checkpointing = False

        if stem == 'imagenet':
            self.conv1 = nn.Conv2d(in_chans, 16, 7, stride=2, padding=3, bias=False, **dd)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, **dd)
            self.maxpool = nn.Identity()

        self.feature_info = []
        block_args = dict(conv_drop_rate=conv_drop_rate, act_layer=act_layer, norm_layer=norm_layer, **dd)
        dilation = 1
        drop_paths = calculate_drop_path_rates(drop_path_rate, [num_blocks] * 3, stagewise=True)
        for name, out_chs, stage_drop_paths in zip(STAGES, channels, drop_paths, strict=True):
            stride = 1 if name == 'layer1' else 2
            first_dilation = dilation
            if reduction == output_stride:
                stride, dilation = 1, dilation * stride
            self.add_module(name, nn.Sequential(*(
                PreActBlock(
                    out_chs if i else in_chs, out_chs, stride=1 if i else stride,
                    dilation=(dilation if i else first_dilation, dilation), drop_path=drop_path, **block_args)
                for i, drop_path in enumerate(stage_drop_paths))))
            in_chs = out_chs
            reduction *= stride
            self.feature_info.append(dict(num_chs=out_chs, reduction=reduction, module=name))

        self.num_features = in_chs
        self.bn = norm_layer(in_chs, **dd)
        self.act = _act_after(self.bn, act_layer)
        self.global_pool, self.fc = create_classifier(in_chs, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = in_chs * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialise convolutions by Kaiming normal (fan-out) as in the authors' Lua code; zero the classifier bias."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by stage (coarse) or block, in order of depth, for layer-wise learning rates."""
        return dict(
            stem=r'^conv1',
            blocks=r'^layer(\d+)' if coarse else [
                (r'^layer(\d+)\.(\d+)', None),
                (r'^bn\.', (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations.

        As in timm's networks, BatchNorm then updates its running statistics twice per step. The gradients are the same.
        """
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, `nn.Linear` or `nn.Identity`."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one for `num_classes` (0 for none); `global_pool=None` keeps the pooling."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        reference = self.conv1.weight
        self.num_classes = num_classes
        getattr(self, 'pretrained_cfg', {}).pop('label_names', None)  # those of the former classifier
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, device=reference.device, dtype=reference.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the final features and the outputs of the chosen stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Indices of the stages; an int n for the last n stages, None for all stages.
            norm: Apply the final BN-ReLU to the output of the last stage. The outputs of other stages are always raw.
            stop_early: Skip the stages after the last requested one.
            output_fmt: Output format; only 'NCHW' is supported.
            intermediates_only: Return only the list of stage outputs.

        Raises:
            ValueError: `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt {output_fmt!r} is not supported; use 'NCHW'")
        take_indices, max_index = feature_take_indices(len(STAGES), indices)
        names = STAGES[:max_index + 1] if stop_early else STAGES
        intermediates = []

        x = self.maxpool(self.conv1(x))
        for i, name in enumerate(names):
            stage = getattr(self, name)
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(self.act(self.bn(x)) if norm and name == STAGES[-1] else x)
        if intermediates_only:
            return intermediates
        if names[-1] == STAGES[-1]:
            x = self.act(self.bn(x))
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers that the stages at `indices` do not need, and return the indices as a list."""
        take_indices, max_index = feature_take_indices(len(STAGES), indices)
        prune_end = max_index < len(STAGES) - 1
        for name in STAGES[max_index + 1:]:
            setattr(self, name, nn.Sequential())
        if prune_norm or prune_end:
            self.bn, self.act = nn.Identity(), nn.Identity()
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the unpooled features after the last BN-ReLU from images (B, in_chans, H, W)."""
        x = self.maxpool(self.conv1(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        else:
            x = self.layer1(x)
            x = self.layer2(x)
            x = self.layer3(x)
        return self.act(self.bn(x))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool, apply dropout and classify; `pre_logits` stops before the classifier."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)  # TorchScript takes no integer
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _layout(depth: int, width: float) -> tuple[int, tuple[int, int, int]]:
    """Check depth and width, and return the blocks per stage and the channels of the three stages."""
    if depth < 10 or (depth - 4) % 6:
        n = max(1, (depth - 4) // 6)
        nearest = f'{6 * n + 4}' if depth < 10 else f'{6 * n + 4}, {6 * n + 10}'
        raise ValueError(f'depth {depth} is not 6N+4; nearest: {nearest}')
    if width <= 0 or (16 * width) % 1:
        below = max(1, int(16 * width))
        nearest = f'{below / 16:g}' if width <= 0 else f'{below / 16:g}, {(below + 1) / 16:g}'
        raise ValueError(
            f'width {width:g} gives {16 * width:g} channels in the first stage, which must be a whole number '
            f'above 0; nearest: {nearest}')
    return (int(depth) - 4) // 6, (int(16 * width), int(32 * width), int(64 * width))


CIFAR10_LABELS = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
CIFAR100_LABELS = tuple(
    'apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can '
    'castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin '
    'elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster '
    'man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck '
    'pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk '
    'skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger '
    'tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm'.split())


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1605.07146', 'paper_name': 'Wide Residual Networks',
        'origin_url': 'https://github.com/szagoruyko/wide-residual-networks',
        **kwargs,
    }


# Tags of every network of the family, named after the data set that the weights were trained on.
TAGS = {
    'cifar10': _cfg(label_names=CIFAR10_LABELS),
    'cifar100': _cfg(
        num_classes=100, label_names=CIFAR100_LABELS,
        mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
}


def _pytorchcv_cfg(**kwargs: Any) -> dict[str, Any]:
    """Configuration of pytorchcv's weights; mean and std are the same for all data sets (`cifar10_cls_dataset.py`)."""
    return _cfg(
        std=(0.2023, 0.1994, 0.2010), license='mit', origin_url='https://github.com/osmr/imgclsmob', **kwargs)


# Tags of the networks for which pytorchcv published weights.
PYTORCHCV_TAGS = {
    'pcv_cifar10': _pytorchcv_cfg(label_names=CIFAR10_LABELS),
    'pcv_cifar100': _pytorchcv_cfg(num_classes=100, label_names=CIFAR100_LABELS),
    'pcv_svhn': _pytorchcv_cfg(label_names=tuple('0123456789')),
}

default_cfgs = {}


def _create_wrn(variant: str, pretrained: bool = False, **kwargs: Any) -> WideResNet:
    cfg, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None) or {}
    own = any(overlay.get(k) for k in SOURCES)
    if cfg is None and (own or not pretrained):
        cfg = 'cifar10'  # not the default tag, which may stand for other people's weights
        none = ('label_names', 'tag', 'license', 'origin_url') if own else ('label_names',)
        overlay = dict.fromkeys(none) | overlay
    if pretrained and kwargs.get('features_only'):
        kwargs['num_classes'] = 0  # no advice on the classifier of the checkpoint
    source = locate(variant, pretrained, cfg, overlay, kwargs.get('cache_dir'))
    return build_model_with_cfg(
        WideResNet, variant, pretrained,
        **source,
        pretrained_filter_fn=fit_to_model,
        feature_cfg=dict(out_indices=(0, 1, 2)),
        **kwargs,
    )


def register_wrn(depth: int, width: float) -> str:
    """Register WRN-depth-width with timm, and return its name for `timm.create_model`.

    A network that is already registered is left unchanged.

    Raises:
        ValueError: The depth is not 6N + 4, the width gives fractional channels, or the name belongs to another
            network.
    """
    _layout(depth, width)
    depth = int(depth)
    name = f'wrn{depth}_{width:g}'.replace('.', '_')
    if name in default_cfgs:
        return name
    if is_model(name):
        raise ValueError(
            f'{name} is the name of another network (ImageNet); build this one with '
            f'wrn_timm.WideResNet(depth={depth}, width={width:g})')

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> WideResNet:
        return _create_wrn(name, pretrained, **{'depth': depth, 'width': width, **kwargs})

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f'WRN-{depth}-{width:g}: {(depth - 4) // 6} blocks per stage, widening factor {width:g}.'
    globals()[name] = entrypoint
    cfgs = TAGS | {tag: cfg for tag, cfg in PYTORCHCV_TAGS.items() if f'{name}.{tag}' in published()}
    cfgs = {tag: {**cfg, **sources(f'{name}.{tag}')} for tag, cfg in cfgs.items()}  # timm lists tags with a source
    default = default_tag(name, cfgs)
    # timm would put the first tag with a source before the default (*), unless the default comes last
    cfgs = {f'{name}.{tag}': cfg for tag, cfg in cfgs.items() if tag != default} | {f'{name}.{default}*': cfgs[default]}
    default_cfgs.update(generate_default_cfgs(cfgs))
    register_model(entrypoint)
    return name


# (depth, width) of the networks in the paper (tables 2 to 6), and of others measured since then.
VARIANTS = (
    (16, 1), (16, 2), (16, 4), (16, 8), (16, 10),
    (22, 2), (22, 8), (22, 10),
    (28, 1), (28, 2), (28, 4), (28, 8), (28, 10), (28, 12),
    (34, 10), (34, 20),
    (40, 1), (40, 2), (40, 4), (40, 8), (40, 10),
    (52, 1), (70, 16),
)
for _depth, _width in VARIANTS:
    register_wrn(_depth, _width)
