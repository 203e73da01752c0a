"""Object detectors: torchvision's Faster R-CNN and RetinaNet on a WRN with a feature pyramid (arXiv:1612.03144).

    detector = faster_rcnn('wrn50_2', num_classes=20, pretrained=True)
    losses = detector(images, targets)         # torchvision's own interface
    detector = open_detector('RUN')            # as trained by `wrn-timm detect`
"""
from __future__ import annotations

import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from timm.layers import freeze_batch_norm_2d
from timm.utils import freeze
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet, fasterrcnn_resnet50_fpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from .download import snapshot
from .files import atomic_write, write_json
from .recipes import TORCHVISION_DETECTOR, DetectConfig
from .schemas import check_detector, read_json
from .weights import WEIGHTS_FILE, check_weights, sha256_of, verify
from .wrn import WideResNet

__all__ = ['DETECTORS', 'DETECTOR_FILE', 'anchor_generator', 'build_detector', 'detector_folder', 'export_detector',
           'faster_rcnn', 'find_detector', 'fpn_backbone', 'open_detector', 'postprocessor', 'retinanet']

DETECTOR_FILE = 'detector.json'
_THRESHOLD = 0.5  # for detectors without test metrics
_MAX_OBJECTS = 100  # torchvision's default

_RATIOS = (0.5, 1., 2.)  # anchor height over width


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
    """Build a backbone for torchvision's detectors: a network with a feature pyramid.

    Args:
        name: timm name of a WRN. For weights in a folder, also pass `pretrained_cfg_overlay=dict(file=...)`.
        out_indices: Levels to use, as indices into `feature_info`; None for all stages from `layer1` on.
        out_channels: Number of channels of every pyramid level.
        pretrained: Load the weights of the tag.
        frozen_norm: Replace BatchNorm with `FrozenBatchNorm2d`, for small batches. None does so if `pretrained`, unless
            the stem differs from that of the weights.
        frozen_stages: Number of stages to freeze; 0 freezes nothing. The stem is frozen with them, unless it differs
            from that of the weights.
        extra_blocks: Module that adds levels after the last one; None adds one by max pooling.
        model_kwargs: Arguments of `timm.create_model`. The 6N + 4 family gets `stem='imagenet'` by default, because at
            stride 1 a photograph of 640 pixels costs 16 times as much.

    Returns:
        The backbone. It maps images (B, in_chans, H, W) to a dict of levels (B, out_channels, H/stride, W/stride) with
        keys '0', '1'... In addition to torchvision's attributes, it has `strides` (of the levels taken from the
        network) and `data_config` (the preprocessing of the weights; if they have another number of channels, every
        channel has the mean over theirs).

    Raises:
        ValueError: The network is not a WRN, has no such levels, or has fewer than `frozen_stages` stages.
    """
    if ':' in name:
        raise ValueError(f"{name} is a folder or repository; give the name of its network, pretrained=True and "
                         f"pretrained_cfg_overlay=dict(file='DIR/model.safetensors')")
    cls = timm.models.model_entrypoint(name.partition('.')[0]) if timm.is_model(name) else None
    if cls is None or not cls.__module__.startswith('wrn_timm'):
        raise ValueError(f"{name} is not a network of this package; timm.list_models('wrn*') lists them")
    if cls.__module__ == WideResNet.__module__:
        model_kwargs.setdefault('stem', 'imagenet')
    if pretrained:
        model_kwargs.setdefault('num_classes', 0)  # no advice on the classifier of the checkpoint
    model = timm.create_model(name, pretrained=pretrained, **model_kwargs)
    info = model.feature_info
    stages = [i for i, level in enumerate(info) if level['module'].startswith('layer')]
    if out_indices is not None and not (out_indices and all(-len(info) <= i < len(info) for i in out_indices)):
        raise ValueError(f'out_indices {tuple(out_indices)} of {name}: its levels are 0 to {len(info) - 1}')
    taken = stages if out_indices is None else sorted({i % len(info) for i in out_indices})
    if not 0 <= frozen_stages <= len(stages):
        raise ValueError(f'frozen_stages is {frozen_stages}; {name} has {len(stages)} stages')
    new_stem = getattr(model, 'stem_untrained', getattr(model, 'stem_swapped', False) and not pretrained)
    if frozen_stages:
        children = [n for n, _ in model.named_children()]
        first = children.index('layer1') if new_stem else 0
        freeze(model, children[first:children.index(info[stages[frozen_stages - 1]]['module']) + 1])
    if pretrained and not new_stem if frozen_norm is None else frozen_norm:
        model = freeze_batch_norm_2d(model)
    backbone = BackboneWithFPN(
        model, {info[i]['module']: str(n) for n, i in enumerate(taken)}, [info[i]['num_chs'] for i in taken],
        out_channels, extra_blocks)
    backbone.strides = tuple(info[i]['reduction'] for i in taken)
    backbone.data_config = resolve_model_data_config(model)
    if (channels := model_kwargs.get('in_chans', 3)) != len(backbone.data_config['mean']):
        backbone.data_config |= {
            k: (statistics.mean(backbone.data_config[k]),) * channels for k in ('mean', 'std')}
    return backbone


def _normalisation(backbone: BackboneWithFPN) -> dict[str, list[float]]:
    return {f'image_{k}': list(backbone.data_config[k]) for k in ('mean', 'std')}


def anchor_generator(strides: Sequence[int], scale: float, octave: int = 1) -> AnchorGenerator:
    """Create anchors of three shapes, in `octave` sizes per level from `scale` strides to below twice that."""
    sizes = tuple(tuple(int(scale * s * 2 ** (i / octave)) for i in range(octave)) for s in strides)
    return AnchorGenerator(sizes, (_RATIOS,) * len(strides))


def _roi_pool(strides: Sequence[int]) -> MultiScaleRoIAlign:
    """Create torchvision's RoI pooling with the strides of its levels already set.

    Otherwise it infers them from the first padded image and keeps them. If that image is narrow, the strides are wrong,
    and so are all later boxes.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], 7, sampling_ratio=2)
    side = 64 * max(strides)
    pool({str(i): torch.zeros(1, 1, side // s, side // s) for i, s in enumerate(strides)}, [torch.zeros(1, 4)],
         [(side, side)])
    return pool


def faster_rcnn(
        name: str,
        num_classes: int,
        anchor_scale: float = 8.,
        detector_kwargs: dict[str, Any] | None = None,
        **backbone_kwargs: Any,
) -> FasterRCNN:
    """Build torchvision's Faster R-CNN (arXiv:1506.01497) on a WRN.

    Args:
        name: timm name of a WRN.
        num_classes: Number of classes without the background. Target labels run from 1 to `num_classes`.
        anchor_scale: Side of the anchors, in strides of their level (8 in torchvision).
        detector_kwargs: Arguments of `FasterRCNN`: `min_size`, `box_score_thresh`...
        backbone_kwargs: Arguments of `fpn_backbone`.

    Raises:
        ValueError: As for `fpn_backbone`.
    """
    backbone = fpn_backbone(name, extra_blocks=LastLevelMaxPool(), **backbone_kwargs)
    strides = [*backbone.strides, 2 * backbone.strides[-1]]
    return FasterRCNN(backbone, num_classes + 1, **{
        **_normalisation(backbone),
        'rpn_anchor_generator': anchor_generator(strides, anchor_scale),
        'box_roi_pool': _roi_pool(backbone.strides),
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
    """Build torchvision's RetinaNet (arXiv:1708.02002) on a WRN.

    Two levels are added by convolution. Each level has anchors of `anchor_scale` strides, and of 2^(1/3) and 2^(2/3)
    times that size. Arguments and errors are those of `faster_rcnn`; `out_indices=None` takes the last three levels.
    """
    backbone = fpn_backbone(
        name, (-3, -2, -1) if out_indices is None else out_indices, out_channels,
        extra_blocks=LastLevelP6P7(out_channels, out_channels), **backbone_kwargs)
    strides = [*backbone.strides, 2 * backbone.strides[-1], 4 * backbone.strides[-1]]
    return RetinaNet(backbone, num_classes + 1, **{
        **_normalisation(backbone), 'anchor_generator': anchor_generator(strides, anchor_scale, 3),
        **(detector_kwargs or {})})


DETECTORS = {'faster_rcnn': faster_rcnn, 'retinanet': retinanet}


def build_detector(config: DetectConfig, classes: Sequence[str], pretrained: bool = False) -> nn.Module:
    """Build the detector of a fully resolved configuration.

    Args:
        config: Settings with model, image size, anchor scale and channels all set.
        classes: Class names; label 1 is the first. The detector keeps them as its attribute `classes`.
        pretrained: Load the weights of the backbone. Whether its BatchNorm is frozen follows from `config.pretrained`.

    Raises:
        ValueError: As for `fpn_backbone`.
    """
    # with equal limits, the longer side decides
    detector_kwargs = dict(min_size=config.image_size, max_size=config.image_size)
    most = config.max_objects or _MAX_OBJECTS
    if config.detector == 'faster_rcnn':
        detector_kwargs |= dict(box_batch_size_per_image=config.rois, box_detections_per_img=most)
    else:
        detector_kwargs |= dict(detections_per_img=most)
    if config.model == TORCHVISION_DETECTOR:
        detector = fasterrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=len(classes) + 1, **detector_kwargs,
            rpn_anchor_generator=anchor_generator((4, 8, 16, 32, 64), config.anchor_scale),
            box_roi_pool=_roi_pool((4, 8, 16, 32)))
    else:
        detector = DETECTORS[config.detector](
            config.model, len(classes), anchor_scale=config.anchor_scale, out_channels=config.out_channels,
            pretrained=pretrained, frozen_norm=config.pretrained and not _swaps_stem(config.model),
            frozen_stages=config.frozen_stages, detector_kwargs=detector_kwargs)
    detector.classes, detector.threshold = tuple(classes), _THRESHOLD
    return detector


def _swaps_stem(name: str) -> bool:
    """Whether a detector replaces the stem that the weights of this network have, as it does in the CIFAR family."""
    arch = name.partition('.')[0]
    return timm.is_model(arch) and timm.models.model_entrypoint(arch).__module__ == WideResNet.__module__


def export_detector(detector: nn.Module, folder: Path, record: dict[str, Any]) -> None:
    """Write the weights folder of a detector.

    It holds `model.safetensors`, and `detector.json` with `record` and the sha256 of the weights.

    Args:
        detector: Detector on any device.
        folder: Weights folder; created if missing.
        record: Content of `detector.json`. It must have `detect` (the fields of the `DetectConfig`) and `classes`.

    Raises:
        FloatingPointError: A weight is not finite; nothing is written.
    """
    check_weights(detector.state_dict(), folder)
    folder.mkdir(exist_ok=True)
    tensors = {k: v.contiguous() for k, v in detector.state_dict().items()}
    file = folder / WEIGHTS_FILE
    atomic_write(file, lambda p: save_file(tensors, p))
    write_json(folder / DETECTOR_FILE, record | {'sha256': sha256_of(file)})
    shutil.copymode(folder / DETECTOR_FILE, file)  # safetensors creates it with mode 0600


def find_detector(path: str | Path) -> Path | None:
    """Return the weights folder of a detector, given that folder or its run directory; None if there is none."""
    return next((f for f in (Path(path), Path(path) / 'weights') if (f / DETECTOR_FILE).is_file()), None)


def detector_folder(name: str | Path) -> Path:
    """Return the weights folder of a detector, given that folder, its run directory or a Hub repository.

    Raises:
        FileNotFoundError: There is no detector at `name`.
        RuntimeError: The repository cannot be downloaded.
    """
    if str(name).startswith('hf-hub:'):
        return snapshot(str(name).removeprefix('hf-hub:'), (WEIGHTS_FILE, DETECTOR_FILE))
    folder = find_detector(name)
    if folder is None:
        raise FileNotFoundError(f'{name} holds no detector: there is no {DETECTOR_FILE}. Give the run directory of a '
                                f'finished `wrn-timm detect`')
    return folder


def postprocessor(detector: nn.Module) -> nn.Module:
    """Return the module of a detector that has `score_thresh`, `nms_thresh` and `detections_per_img`."""
    return getattr(detector, 'roi_heads', detector)


def open_detector(name: str | Path, device: str = 'cpu') -> nn.Module:
    """Load a trained detector as torchvision's `FasterRCNN` or `RetinaNet`, in evaluation mode.

        detector = wrn_timm.open_detector('RUN')
        found, = detector([image])               # float32 (3, H, W), 0 to 1
        found['boxes'], found['scores'], [detector.classes[i - 1] for i in found['labels']]

    Args:
        name: Run directory of `wrn-timm detect`, its weights folder, or `hf-hub:ACCOUNT/NAME`.
        device: Device of the detector.

    Returns:
        The detector. Its attribute `classes` holds the class names; label 1 is the first. `threshold` is the score
        threshold with the highest F1 on the test photographs of its run; boxes below it are probably false positives.

    Raises:
        FileNotFoundError: There is no detector at `name`.
        ValueError: `detector.json` is damaged, or of another version.
        RuntimeError: The weights file is damaged, or not the one that `detector.json` names, or the repository cannot
            be downloaded.
    """
    folder = detector_folder(name)
    settings = read_json(folder / DETECTOR_FILE, check_detector)
    file = verify(folder, settings.get('sha256'), named_by=DETECTOR_FILE)
    try:
        detector = build_detector(DetectConfig(**settings['detect']), settings['classes'])
    except TypeError as e:
        raise ValueError(f'{folder / DETECTOR_FILE} does not describe a detector: {e}') from e
    threshold = settings.get('threshold')
    detector.threshold = _THRESHOLD if threshold is None else threshold
    try:
        detector.load_state_dict(load_file(file))
    except RuntimeError as e:
        raise RuntimeError(f'{file} does not hold the weights of the detector that {DETECTOR_FILE} names: '
                           f'{str(e).splitlines()[-1].strip()}') from e
    return detector.to(device).eval()
