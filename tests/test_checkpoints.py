"""Foreign layouts: converted weights give the foreign network's own output."""
import argparse
import functools
import re

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomise
from pytorchcv.model_provider import get_model
from safetensors.torch import save_file
from test_wrn import functional_params, functional_wrn

import wrn_timm
from wrn_timm.checkpoints import convert_state_dict
from wrn_timm.detection import fpn_backbone
from wrn_timm.weights import export_weights, open_model


def load(name, file, **kwargs):
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)), **kwargs).eval()


@torch.no_grad()
def assert_same(model, reference, size=32):
    x = torch.randn(2, 3, size, size)
    expected = reference(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(model(x), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)


def test_authors_layout_as_they_save_it(tmp_path):
    params = {k: v.requires_grad_() for k, v in functional_params(16, 2).items()}
    momentum = torch.optim.SGD(list(params.values()), 0.1).state_dict()
    torch.save({'params': params, 'epoch': 200, 'optimizer': momentum}, tmp_path / 'model.pt7')
    model = load('wrn16_2', tmp_path / 'model.pt7')
    assert_same(model, lambda x: functional_wrn(x, params, 16, 2))
    assert wrn_timm.convert_checkpoint(tmp_path / 'model.pt7')['layer1.0.shortcut.weight'].shape == (32, 16, 1, 1)


class XternalzBlock(nn.Module):
    """The module names of xternalz/WideResNet-pytorch on the forward of the paper."""

    def __init__(self, c, out, stride):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(out)
        self.conv1 = nn.Conv2d(c, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(c, out, 1, stride, bias=False) if c != out else None

    def forward(self, x):
        o = F.relu(self.bn1(x))
        z = self.conv2(F.relu(self.bn2(self.conv1(o))))
        return z + (self.convShortcut(o) if self.convShortcut else x)


class Xternalz(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        c = 16
        for i, out in enumerate((32, 64, 128), start=1):
            block = nn.Module()
            block.layer = nn.Sequential(XternalzBlock(c, out, 1 + (i > 1)), XternalzBlock(out, out, 1))
            self.add_module(f'block{i}', block)
            c = out
        self.bn1, self.fc = nn.BatchNorm2d(c), nn.Linear(c, 10)

    def forward(self, x):
        x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


@pytest.mark.parametrize('prefix', ['', 'module.', 'module._orig_mod.'])
def test_xternalz(tmp_path, prefix):
    reference = randomise(Xternalz())
    state_dict = {prefix + k: v for k, v in reference.state_dict().items()}
    torch.save({'state_dict': state_dict, 'best_prec1': 96.}, tmp_path / 'model_best.pth.tar')
    assert_same(load('wrn16_2', tmp_path / 'model_best.pth.tar'), reference)


def test_a_stage_that_is_there_but_not_used(tmp_path):
    """As in the code of TRADES."""
    reference = randomise(Xternalz())
    unused = {f'sub_block1.{k}': v for k, v in reference.block1.state_dict().items()}
    torch.save(reference.state_dict() | unused, tmp_path / 'trades.pth')
    assert_same(load('wrn16_2', tmp_path / 'trades.pth'), reference)


def test_first_blocks_that_skip_their_batchnorm_are_refused(tmp_path):
    """As in the code of MixMatch and FixMatch, whose keys are the same."""
    state_dict = randomise(Xternalz()).state_dict()
    for i in (2, 3):
        state_dict[f'block{i}.layer.0.bn1.weight'].fill_(1)
        state_dict[f'block{i}.layer.0.bn1.bias'].fill_(0)
    torch.save(state_dict, tmp_path / 'fixmatch.pth')
    for read in (wrn_timm.convert_checkpoint, functools.partial(load, 'wrn16_2')):
        with pytest.raises(ValueError, match='stages 2 and 3 begin without BatchNorm, as in the code of MixMatch'):
            read(tmp_path / 'fixmatch.pth')
    torch.save(Xternalz().state_dict(), tmp_path / 'untrained.pth')
    load('wrn16_2', tmp_path / 'untrained.pth')


def test_a_network_within_a_lightning_module(tmp_path):
    reference = randomise(timm.create_model('wrn16_2'))
    outer = {f'model.{k}': v for k, v in reference.state_dict().items()} | {'criterion.weight': torch.ones(10)}
    torch.save({'state_dict': outer, 'epoch': 3}, tmp_path / 'last.ckpt')
    assert_same(load('wrn16_2', tmp_path / 'last.ckpt'), reference)
    compiled = {f'model._orig_mod.{k}': v for k, v in reference.state_dict().items()}
    torch.save({'state_dict': compiled}, tmp_path / 'last.ckpt')
    assert_same(load('wrn16_2', tmp_path / 'last.ckpt'), reference)
    torch.save({'model_state_dict': reference.state_dict(), 'epoch': 3}, tmp_path / 'last.ckpt')  # PyTorch's tutorial
    assert_same(load('wrn16_2', tmp_path / 'last.ckpt'), reference)


def test_a_backbone_has_no_classifier_to_keep(tmp_path, caplog):
    torch.save(timm.create_model('wrn16_1', num_classes=100).state_dict(), tmp_path / 'mine.pth')
    own = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))
    timm.create_model('wrn16_1', features_only=True, **own)
    fpn_backbone('wrn16_1', stem='cifar', out_channels=8, **own)
    assert 'classes' not in caplog.text
    timm.create_model('wrn16_1', **own)
    assert 'The checkpoint has 100 classes, this model 10' in caplog.text


def test_the_users_own_imagenet_network_has_the_licence_of_nobody(tmp_path):
    model = randomise(timm.create_model('wrn18_1', num_classes=7))
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    mine = timm.create_model('wrn18_1', pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'mine.pth')))
    assert not {'tag', 'license', 'origin_url'} & mine.pretrained_cfg.keys()
    torch.testing.assert_close(mine.state_dict(), model.state_dict(), atol=0, rtol=0)
    export_weights(mine, tmp_path / 'folder', {})
    assert open_model(str(tmp_path / 'folder')).num_classes == 7


def test_a_backbone_by_itself(tmp_path, caplog):
    backbone = randomise(timm.create_model('wrn16_2', features_only=True))
    torch.save(backbone.state_dict(), tmp_path / 'backbone.pth')
    again = timm.create_model('wrn16_2', features_only=True, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'backbone.pth')))
    torch.testing.assert_close(again.state_dict(), backbone.state_dict(), atol=0, rtol=0)
    assert 'the last normalisation of this model starts untrained' in caplog.text
    caplog.clear()
    torch.save(timm.create_model('wrn18_1', features_only=True).state_dict(), tmp_path / 'backbone.pth')
    timm.create_model('wrn18_1', features_only=True, pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'backbone.pth')))
    assert 'normalisation' not in caplog.text


def test_the_other_stem_is_named(tmp_path):
    torch.save(timm.create_model('wrn16_1', stem='imagenet').state_dict(), tmp_path / 'x.pth')
    with pytest.raises(RuntimeError, match="1 key does not fit, .*checkpoint has the other stem: pass stem='imagenet'"):
        load('wrn16_1', tmp_path / 'x.pth')


def test_pytorchcv_cifar(tmp_path):
    reference = randomise(get_model('wrn16_10_cifar10'))
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    assert_same(load('wrn16_10', tmp_path / 'model.pth'), reference)


def test_pytorchcv_imagenet_whose_convolutions_have_biases_and_no_batchnorm(tmp_path):
    reference = randomise(get_model('wrn50_2'))
    torch.save(reference.state_dict(), tmp_path / 'model.pth')
    assert_same(load('wrn50_2', tmp_path / 'model.pth'), reference, size=224)


def test_torchvision_and_timm_names_pass_unchanged(tmp_path):
    reference = randomise(timm.create_model('wide_resnet50_2'))
    save_file(reference.state_dict(), tmp_path / 'model.safetensors')
    assert_same(load('wrn50_2', tmp_path / 'model.safetensors'), reference, size=64)


class ConvBN(nn.Module):
    """Convolution with a bias, then BatchNorm: the tutorial network's unit."""

    def __init__(self, c, out, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(c, out, kernel, stride, kernel // 2, bias=True)
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x):
        return self.bn(self.conv(x))


class TutorialUnit(nn.Module):
    def __init__(self, c, out, stride):
        super().__init__()
        mid = out // 2
        self.body = nn.Module()
        self.body.conv1, self.body.conv2 = ConvBN(c, mid, 1), ConvBN(mid, mid, 3, stride)
        self.body.conv3 = ConvBN(mid, out, 1)
        self.identity_conv = ConvBN(c, out, 1, stride) if c != out else None

    def forward(self, x):
        y = self.body.conv3(F.relu(self.body.conv2(F.relu(self.body.conv1(x)))))
        return F.relu(y + (self.identity_conv(x) if self.identity_conv else x))


class Tutorial(nn.Module):
    """The tutorial WRN-50-2: post-activation, 101 classes, every convolution with a bias."""

    def __init__(self):
        super().__init__()
        self.features = nn.Module()
        self.features.init_block = nn.Module()
        self.features.init_block.conv = ConvBN(3, 64, 7, 2)
        c = 64
        for i, (out, n) in enumerate(zip((256, 512, 1024, 2048), (3, 4, 6, 3), strict=True), start=1):
            stage = nn.Module()
            for j in range(1, n + 1):
                stage.add_module(f'unit{j}', TutorialUnit(c, out, 2 if i > 1 and j == 1 else 1))
                c = out
            self.features.add_module(f'stage{i}', stage)
        self.output = nn.Linear(c, 101)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.features.init_block.conv(x)), 3, 2, 1)
        for i in range(1, 5):
            for unit in getattr(self.features, f'stage{i}').children():
                x = unit(x)
        return self.output(x.mean((2, 3)))


def test_tutorial_biases_fold_into_batchnorm(tmp_path, caplog):
    reference = randomise(Tutorial())
    torch.save(reference.state_dict(), tmp_path / 'tutorial.pt')
    model = load('wrn50_2', tmp_path / 'tutorial.pt', num_classes=101)
    assert_same(model, reference, size=64)
    load('wrn50_2', tmp_path / 'tutorial.pt')
    assert 'has 101 classes, this model 1000: the classifier of the checkpoint is dropped' in caplog.text


def test_another_architecture_is_refused_with_what_it_is(tmp_path, caplog):
    state_dict = {'conv1.weight': torch.zeros(16, 3, 3, 3), 'layer1.0.residual.0.weight': torch.zeros(16),
                  'layer1.0.skip.0.weight': torch.zeros(64, 16, 1, 1), 'layer1.0.skip.1.weight': torch.zeros(64)}
    torch.save(state_dict, tmp_path / 'tutorial.pt')
    with pytest.raises(RuntimeError, match=r'BatchNorm in the shortcuts.*take the raw input.*the model is a WRN-16-4'
                                           r'.*first: layer1\.0\.bn1\.weight is not in the checkpoint'):
        load('wrn16_4', tmp_path / 'tutorial.pt')
    torch.save({k.replace('layer1', 'layer2'): v for k, v in state_dict.items()}, tmp_path / 'width1.pt')
    with pytest.raises(ValueError, match='width1.pt is a network with BatchNorm in the shortcuts'):
        wrn_timm.convert_checkpoint(tmp_path / 'width1.pt')
    torch.save({'epoch': 3}, tmp_path / 'none.pt')
    with pytest.raises(ValueError, match='none.pt is in an unknown layout'):
        wrn_timm.convert_checkpoint(tmp_path / 'none.pt')
    save_file(timm.create_model('wrn16_2').state_dict(), tmp_path / 'other.safetensors')
    with pytest.raises(RuntimeError, match=r'is a WRN-16-2; the model is a WRN-16-4.*is \(32, 16, 3, 3\), not \(64'):
        load('wrn16_4', tmp_path / 'other.safetensors', num_classes=5)  # strict loading is off where classes differ
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'resnet18.pt')
    with pytest.raises(RuntimeError, match=r'is a ResNet of 2-2-2-2 blocks'):
        load('wrn16_4', tmp_path / 'resnet18.pt')
    assert 'classifier is dropped' not in caplog.text
    with pytest.raises(RuntimeError, match=r'is not in the model.*The model has another normalisation \(norm_layer\)'):
        load('wrn16_2', tmp_path / 'other.safetensors', norm_layer='groupnorm1')


def test_a_checkpoint_without_a_classifier(tmp_path, caplog):
    reference = timm.create_model('wrn16_1')
    torch.save({k: v for k, v in reference.state_dict().items() if not k.startswith('fc.')}, tmp_path / 'body.pt')
    model = load('wrn16_1', tmp_path / 'body.pt')
    assert 'The checkpoint has no classifier; the classifier of this model starts untrained.' in caplog.text
    torch.testing.assert_close(model.layer3[1].conv2.weight, reference.layer3[1].conv2.weight, atol=0, rtol=0)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({'state_dict': re.compile('x')}, tmp_path / 'code.pt')
    with pytest.raises(ValueError, match=r'code.pt cannot be read as weights: .*more than tensors \(save'):
        wrn_timm.convert_checkpoint(tmp_path / 'code.pt')
    with pytest.raises(RuntimeError):
        load('wrn16_1', tmp_path / 'code.pt')


def test_damaged_and_missing_files(tmp_path):
    (tmp_path / 'cut.safetensors').write_bytes(b'\x10\0\0\0\0\0\0\0{"a":')
    (tmp_path / 'cut.pt').write_bytes(b'PK\x03\x04 nothing more')
    for name in ('cut.safetensors', 'cut.pt'):
        with pytest.raises(ValueError, match=f'{name} cannot be read as weights'):
            wrn_timm.convert_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match='no checkpoint at'):
        wrn_timm.convert_checkpoint(tmp_path / 'none.pt')
    with pytest.raises(FileNotFoundError, match='which does not exist'):
        load('wrn16_1', tmp_path / 'none.pt')
    with pytest.raises(FileNotFoundError, match='is a folder; give the file in it'):
        wrn_timm.convert_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match='which is a folder; name the file in it'):
        load('wrn16_1', tmp_path)


@pytest.mark.parametrize('name', ['wrn16_1', 'wrn18_1'])  # whose tags have a file, and a repository of the Hub
def test_an_address_that_the_caller_gives_is_the_one_that_is_read(tmp_path, name):
    reference = timm.create_model(name)
    torch.save(reference.state_dict(), tmp_path / 'other.pth')
    overlay = dict(url=(tmp_path / 'other.pth').as_uri())
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=str(tmp_path / 'cache'))
    torch.testing.assert_close(model.fc.weight, reference.fc.weight, atol=0, rtol=0)


def test_averaged_weights_of_our_own_checkpoints_are_taken(tmp_path):
    plain, averaged = ({k: torch.full_like(v, fill) for k, v in timm.create_model('wrn16_1').state_dict().items()}
                       for fill in (1, 2))
    for ema, expected in ((averaged, 2), (None, 1)):
        torch.save({'model': plain, 'ema': ema, 'epoch': 3}, tmp_path / 'best.pt')
        assert (wrn_timm.convert_checkpoint(tmp_path / 'best.pt')['conv1.weight'] == expected).all()


def test_averaged_by_torch(tmp_path):
    model = timm.create_model('wrn16_1')
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / 'swa.pth')
    fresh = timm.create_model('wrn16_1', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'swa.pth')))
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), atol=0, rtol=0)


def test_what_timms_train_script_saves(tmp_path):
    """It keeps its options beside the weights."""
    model = timm.create_model('wrn16_1')
    saved = {'state_dict': model.state_dict(), 'arch': 'wrn16_1', 'args': argparse.Namespace(lr=.1, opt='sgd')}
    torch.save(saved, tmp_path / 'model_best.pth.tar')
    found = wrn_timm.convert_checkpoint(tmp_path / 'model_best.pth.tar')
    torch.testing.assert_close(found, dict(model.state_dict()), atol=0, rtol=0)


def test_converting_twice_changes_nothing():
    once = convert_state_dict(functional_params(16, 1))
    assert convert_state_dict(once).keys() == once.keys() == {
        k for k in timm.create_model('wrn16_1').state_dict() if 'num_batches' not in k}
