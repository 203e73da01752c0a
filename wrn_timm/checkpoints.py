"""Convert checkpoints of other implementations.

There is one pure function per layout, chosen by a key that only this layout has.

Our layout of the 6N + 4 family is `conv1`, `layer{1,2,3}.{j}.{bn1,conv1,bn2,conv2,shortcut}`, `bn`, `fc`. The ImageNet
networks have the layout of ResNet in timm and torchvision: `conv1`, `bn1`, `layer{1..4}.{j}.{conv,bn}{1..3}`,
`downsample.{0,1}`, `fc`.
"""
from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file

from .names import counted

__all__ = ['convert_checkpoint', 'convert_state_dict', 'fit_to_model']

_logger = logging.getLogger(__name__)

StateDict = dict[str, torch.Tensor]


def _renamed(state_dict: StateDict, rules: list[tuple[str, str]]) -> StateDict:
    """Rename each key by the first rule that matches it, and keep keys that match none."""
    out = {}
    for key, value in state_dict.items():
        for pattern, target in rules:
            renamed, n = re.subn(pattern, target, key)
            if n:
                key = renamed
                break
        out[key] = value
    return out


def _stages_from_1(state_dict: StateDict) -> StateDict:
    """Rename `layer0` to `layer1` and so on, for layouts that count stages from 0."""
    return {re.sub(r'^layer(\d+)', lambda m: f'layer{int(m[1]) + 1}', k): v for k, v in state_dict.items()}


def _units_from_0(state_dict: StateDict) -> StateDict:
    """Rename `layer1.1` to `layer1.0` and so on, for layouts that count blocks from 1."""
    return {
        re.sub(r'^(layer\d+)\.(\d+)', lambda m: f'{m[1]}.{int(m[2]) - 1}', k): v for k, v in state_dict.items()}


def from_authors(state_dict: StateDict) -> StateDict:
    """Convert from the authors' functional PyTorch code: bare tensors such as `group0.block0.conv0`."""
    return _stages_from_1(_renamed(state_dict, [
        (r'^conv0$', 'conv1.weight'),
        (r'^group(\d+)\.block(\d+)\.conv0$', r'layer\1.\2.conv1.weight'),
        (r'^group(\d+)\.block(\d+)\.conv1$', r'layer\1.\2.conv2.weight'),
        (r'^group(\d+)\.block(\d+)\.convdim$', r'layer\1.\2.shortcut.weight'),
        (r'^group(\d+)\.block(\d+)\.bn0\.', r'layer\1.\2.bn1.'),
        (r'^group(\d+)\.block(\d+)\.bn1\.', r'layer\1.\2.bn2.'),
    ]))


def from_xternalz(state_dict: StateDict) -> StateDict:
    """Convert from xternalz/WideResNet-pytorch and copies that compute the same: `block1.layer.0.convShortcut.weight`.

    Raises:
        ValueError: The network computes something else, as in the code of MixMatch and FixMatch. There, the first
            blocks of stages 2 and 3 skip their first BatchNorm, which therefore keeps its initial weights.
    """
    used, skipped = (state_dict.get(f'block{i}.layer.0.bn1.weight', torch.ones(1)) for i in (1, 2))
    if used.min() < used.max() and skipped.min() == skipped.max():
        raise ValueError('the checkpoint is of a network whose stages 2 and 3 begin without BatchNorm, as in the code '
                         'of MixMatch and FixMatch (unlike the paper); it cannot be converted')
    return _renamed({k: v for k, v in state_dict.items() if not k.startswith('sub_block1.')}, [  # unused, of TRADES
        (r'^block(\d+)\.layer\.(\d+)\.convShortcut\.', r'layer\1.\2.shortcut.'),
        (r'^block(\d+)\.layer\.(\d+)\.', r'layer\1.\2.'),
        (r'^bn1\.', 'bn.'),
    ])


def from_pytorchcv_cifar(state_dict: StateDict) -> StateDict:
    """Convert from pytorchcv's CIFAR WRN.

    Its keys are like `features.stage1.unit1.body.conv1.conv.weight` and `features.post_activ.bn.weight`.
    """
    return _units_from_0(_renamed(state_dict, [
        (r'^features\.init_block\.', 'conv1.'),
        (r'^features\.stage(\d+)\.unit(\d+)\.body\.conv(\d+)\.(bn|conv)\.', r'layer\1.\2.\4\3.'),
        (r'^features\.stage(\d+)\.unit(\d+)\.identity_conv\.', r'layer\1.\2.shortcut.'),
        (r'^features\.post_activ\.bn\.', 'bn.'),
        (r'^output\.', 'fc.'),
    ]))


def from_biased_resnet(state_dict: StateDict) -> StateDict:
    """Convert from the tutorial WRN-50-2 and pytorchcv's WRN-50-2, whose convolutions have biases.

    Keys are like `features.stage1.unit1.body.conv1.conv.weight`. A bias b of the tutorial network is folded into the
    running mean of the BatchNorm that follows: BN(y + b) with mean m equals BN(y) with mean m - b. pytorchcv's network
    has no BatchNorm left, so one that only adds b is inserted.
    """
    out = dict(state_dict)
    for key in [k for k in state_dict if k.endswith('.conv.bias')]:
        bias, bn = out.pop(key), key.removesuffix('conv.bias') + 'bn.'
        if f'{bn}running_mean' in out:
            out[f'{bn}running_mean'] = out[f'{bn}running_mean'] - bias
        else:
            one = torch.ones_like(bias)
            out.update({
                f'{bn}weight': one, f'{bn}bias': bias,
                f'{bn}running_mean': 0 * one, f'{bn}running_var': one - 1e-5})  # 1e-5 is the epsilon that BN adds
    return _units_from_0(_renamed(out, [
        (r'^features\.init_block\.conv\.conv\.', 'conv1.'),
        (r'^features\.init_block\.conv\.bn\.', 'bn1.'),
        (r'^features\.stage(\d+)\.unit(\d+)\.body\.conv(\d+)\.(bn|conv)\.', r'layer\1.\2.\4\3.'),
        (r'^features\.stage(\d+)\.unit(\d+)\.identity_conv\.conv\.', r'layer\1.\2.downsample.0.'),
        (r'^features\.stage(\d+)\.unit(\d+)\.identity_conv\.bn\.', r'layer\1.\2.downsample.1.'),
        (r'^output\.', 'fc.'),
    ]))


# Converters by a key that only their layout has; native layouts need none.
LAYOUTS: dict[str, Callable[[StateDict], StateDict]] = {
    'group0.block0.conv0': from_authors,
    'block1.layer.0.conv1.weight': from_xternalz,
    'features.post_activ.bn.weight': from_pytorchcv_cifar,
    'features.init_block.conv.conv.weight': from_biased_resnet,
}


NATIVE = ('a WRN-', 'a ResNet of ')
_OUTER = ('model.', 'net.', 'network.', 'backbone.', 'encoder.')  # usual names of a network within another module


def _description(state_dict: StateDict) -> str:
    if any(re.match(r'^layer\d+\.0\.skip\.1\.', key) for key in state_dict):
        return 'a network with BatchNorm in the shortcuts, which take the raw input (unlike the paper)'
    first = state_dict.get('layer1.0.conv1.weight')
    if first is None or first.ndim != 4:
        return 'in an unknown layout'
    if 'layer1.0.bn1.weight' in state_dict and 'bn1.weight' not in state_dict:
        blocks = sum(bool(re.fullmatch(r'layer1\.\d+\.conv1\.weight', k)) for k in state_dict)
        width = first.shape[0] / 16
        return f'{NATIVE[0]}{6 * blocks + 4}-{width:g}'
    if 'layer4.0.conv1.weight' in state_dict and 'bn1.weight' in state_dict:
        blocks = [sum(bool(re.fullmatch(rf'layer{i}\.\d+\.conv1\.weight', k)) for k in state_dict) for i in range(1, 5)]
        return f'{NATIVE[1]}{"-".join(map(str, blocks))} blocks, the first with {first.shape[0]} inner channels'
    return 'in an unknown layout'


def convert_state_dict(state_dict: StateDict) -> StateDict:
    """Convert a state dict of any known layout to ours; any other state dict keeps its keys.

    Wrappers (`state_dict`, `params`, `model`...) are unpacked first, with a preference for EMA weights, as in timm. The
    prefixes of DataParallel, AveragedModel and `torch.compile` are removed, and so is that of a network within another
    module (`model.` in a LightningModule), together with what else is in that module.

    Raises:
        Any error of the converters in `LAYOUTS`.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'ema', 'state_dict', 'model_state_dict', 'params', 'model', 'net'):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    state_dict = {
        re.sub(r'(^|(?<=\.))(module|_orig_mod)\.', '', k): v.detach()
        for k, v in state_dict.items() if isinstance(k, str) and isinstance(v, torch.Tensor) and k != 'n_averaged'}
    outer = next((prefix for prefix in _OUTER if f'{prefix}conv1.weight' in state_dict), '')
    state_dict = {k.removeprefix(outer): v for k, v in state_dict.items() if k.startswith(outer)}
    convert = next((convert for key, convert in LAYOUTS.items() if key in state_dict), None)
    return convert(state_dict) if convert else state_dict


def convert_checkpoint(path: str | Path) -> StateDict:
    """Read a checkpoint of any known layout, safetensors or pickle, and return a state dict in our layout.

    A pickle is read with `weights_only=True`, so no code in it is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or its layout is unknown. The message says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is a folder; give the file in it' if path.is_dir() else f'no checkpoint at {path}')
    try:
        if path.suffix == '.safetensors':
            state_dict = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's `train.py` saves its options as one
                state_dict = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # refused pickles, damaged zip files and damaged safetensors files raise unrelated errors
        what = 'it is damaged' if path.suffix == '.safetensors' else (
            'it is damaged, or holds more than tensors (save model.state_dict(), not the model)')
        said = f'{type(e).__name__}: {str(e).partition(". ")[0]}'.removesuffix(': ')
        raise ValueError(f'{path} cannot be read as weights: {what}. {said}') from e
    if not isinstance(state_dict, dict):
        raise ValueError(f'{path} holds a {type(state_dict).__name__}, not a dictionary of tensors')
    state_dict = convert_state_dict(state_dict)
    name = _description(state_dict)
    if not name.startswith(NATIVE):
        raise ValueError(f'{path} is {name}')
    return state_dict


def fit_to_model(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Convert a state dict and check that it fits `model` (timm's `pretrained_filter_fn`).

    The classifier may have another size and the stem another number of input channels; timm adapts them. A stem chosen
    with `stem=` keeps its random weights if the checkpoint has the other stem, and a warning is logged.

    Raises:
        RuntimeError: The weights belong to another architecture. The message names it and the first keys that do not
            fit.
        Any error of `convert_state_dict`.
    """
    state_dict = convert_state_dict(state_dict)
    own = model.state_dict()
    first, own_first = state_dict.get('conv1.weight'), own.get('conv1.weight')
    if getattr(model, 'stem_swapped', False) and first is not None and first.shape[2:] != own_first.shape[2:]:
        _logger.warning(
            'The weights of the %s stem are dropped: this model has a %s stem, which starts untrained.',
            *('x'.join(map(str, w.shape[2:])) for w in (first, own_first)))
        state_dict['conv1.weight'] = own_first
        model.stem_untrained = True
    last = {k: v for k, v in own.items() if k.startswith('bn.')}
    if last and 'layer3.0.conv1.weight' in state_dict and not any(k.startswith(('bn.', 'fc.')) for k in state_dict):
        _logger.warning('The checkpoint is of a backbone: the last normalisation of this model starts untrained.')
        state_dict |= last

    def fits(key: str) -> bool:
        a, b = own[key].shape, state_dict[key].shape
        if key.startswith('fc.'):
            return len(a) == len(b)
        return a == b if key != 'conv1.weight' else a[:1] == b[:1] and a[2:] == b[2:]

    optional = re.compile(r'^fc\.|\.num_batches_tracked$')
    misfits = [f'{k} is not in the checkpoint' for k in own if k not in state_dict and not optional.search(k)]
    misfits += [f'{k} is not in the model' for k in state_dict if k not in own and not optional.search(k)]
    misfits += [
        f'{k} is {tuple(state_dict[k].shape)}, not {tuple(own[k].shape)}'
        for k in own if k in state_dict and not fits(k)]
    misfits += [
        f'{k} is {state_dict[k].dtype}, not {own[k].dtype}'
        for k in own if k in state_dict and own[k].is_floating_point() != state_dict[k].is_floating_point()
        and not k.endswith('num_batches_tracked')]
    if misfits:
        hint = ' The model has another normalisation (norm_layer).' if _has_statistics(state_dict) and not (
            _has_statistics(own)) else ''
        if len(misfits) == 1 and first is not None and first.shape[2:] in ((3, 3), (7, 7)) and not fits('conv1.weight'):
            hint = f" The checkpoint has the other stem: pass stem='{'cifar' if first.shape[2] == 3 else 'imagenet'}'."
        raise RuntimeError(
            f'The checkpoint is {_description(state_dict)}; the model is {_description(own)}. '
            f'{counted(len(misfits), "key")} {"does" if len(misfits) == 1 else "do"} not fit, first: '
            f'{"; ".join(misfits[:4])}.{hint}')
    if 'fc.weight' in state_dict and state_dict['fc.weight'].ndim == 2:
        classes = len(state_dict['fc.weight'])
        if classes != model.pretrained_cfg['num_classes'] and model.num_classes not in (0, classes):
            _logger.warning(
                'The checkpoint has %d classes, this model %d: the classifier of the checkpoint is dropped. Pass '
                'num_classes=%d to keep it.', classes, model.num_classes, classes)
        if classes != model.pretrained_cfg['num_classes']:
            model.pretrained_cfg.pop('label_names', None)
        model.pretrained_cfg['num_classes'] = classes  # timm drops the classifier if this is not the model's
    elif model.num_classes and 'fc.weight' not in state_dict:
        _logger.warning('The checkpoint has no classifier; the classifier of this model starts untrained.')
        state_dict |= {k: v for k, v in own.items() if k.startswith('fc.')}
    return state_dict


def _has_statistics(state_dict: StateDict) -> bool:
    return any(key.endswith('running_mean') for key in state_dict)
