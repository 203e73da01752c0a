"""Fast inference and export: against the network as it stands, on photographs."""
import json

import onnx
import pytest
import timm
import torch
from conftest import SAMPLE, randomise
from torch import nn

import wrn_timm
from wrn_timm.cli import export as export_script
from wrn_timm.data.images import read_rgb
from wrn_timm.export import fold_batchnorm, inference_forms, optimize, run_exported
from wrn_timm.weights import eval_transform, export_weights, open_model


def norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture(scope='module')
def trained():
    return open_model('wrn16_1.cifar10')


@pytest.fixture(scope='module')
def photographs(trained):
    transform = eval_transform(trained)
    return torch.stack([transform(read_rgb(p)) for p in sorted(SAMPLE.glob('*/image_0001.jpg'))])


@torch.no_grad()
def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize('name,kwargs,left', [
    ('wrn16_1', {}, 7),  # of 13: bn1 of six blocks and the last one read what others read too
    ('wrn16_2', {}, 6),  # a shortcut that is a convolution frees bn1 of the first block
    ('wrn16_2', dict(stem='imagenet'), 7),  # its max pool stands between
    ('wrn18_1_5', {}, 0),
    ('wrn50_2', {}, 0),
])
@torch.no_grad()
def test_folding_keeps_the_logits(name, kwargs, left):
    model = randomise(timm.create_model(name, **kwargs))
    folded = fold_batchnorm(model)
    assert len(norms(folded)) == left and type(folded) is type(model)
    x = torch.randn(2, 3, 32, 40)
    assert largest_difference(folded(x), model(x)) < 1e-5
    assert largest_difference(fold_batchnorm(model.double())(x.double()), model(x.double())) < 1e-13


@torch.no_grad()
def test_folding_leaves_the_model_alone_and_keeps_the_features():
    model = randomise(timm.create_model('wrn16_2', features_only=True))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    folded, x = fold_batchnorm(model), torch.randn(1, 3, 32, 32)
    for a, b in zip(folded(x), model(x), strict=True):
        assert largest_difference(a, b) < 1e-5
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    whole = randomise(timm.create_model('wrn16_2'))
    torch.testing.assert_close(
        fold_batchnorm(whole).forward_features(x), whole.forward_features(x), atol=1e-4, rtol=1e-4)


class Shared(nn.Module):
    """A convolution that two read, one that is called twice, and a BatchNorm that two convolutions feed."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(3) for _ in range(3))

    def forward(self, x):
        y = self.conv1(x)
        y = self.bn1(y) + y
        y = self.conv2(self.bn2(self.conv2(y)))
        return self.bn3(self.conv3(y)) + self.bn3(self.conv4(y))


@torch.no_grad()
def test_nothing_is_folded_that_something_else_reads():
    model, x = randomise(Shared()), torch.randn(2, 3, 8, 8)
    folded = fold_batchnorm(model)
    assert norms(folded) == ['bn1', 'bn2', 'bn3']
    torch.testing.assert_close(folded(x), model(x))


def test_a_model_that_cannot_be_traced_is_named():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match='^torch.fx cannot trace Branches: .*control flow'):
        fold_batchnorm(Branches())


def test_every_form_gives_the_logits(trained, photographs):
    forms = inference_forms(trained, photographs, dtypes=(torch.float32, torch.bfloat16))
    assert set(forms) == {'plain', 'float32', 'float32 compiled', 'bfloat16', 'bfloat16 compiled'}
    for name, form in forms.items():
        out = form(photographs)
        assert out.dtype == torch.float32 and not out.requires_grad
        assert largest_difference(out, trained(photographs)) < (3e-2 if 'bfloat16' in name else 1e-5)
    smaller = photographs[:3, :, :24]
    assert largest_difference(forms['float32'](smaller), trained(smaller)) < 1e-5


def test_the_fastest_form_is_chosen(trained, photographs):
    fast = optimize(trained, photographs, compile=False)
    assert set(fast.images_per_second) == {'plain', 'float32'}
    assert fast.images_per_second[fast.form] == max(fast.images_per_second.values())


def test_optimize_of_features(photographs):
    model = timm.create_model('wrn16_1', pretrained=True, features_only=True).eval()
    fast = optimize(model, photographs, compile=False, rounds=1)
    for a, b in zip(fast(photographs), model(photographs), strict=True):
        assert largest_difference(a, b) < 1e-5


def test_onnxruntime_takes_part_where_it_is_asked_for(trained, photographs):
    forms = inference_forms(trained, photographs, compile=False, onnx=True)
    assert set(forms) == {'plain', 'float32', 'onnxruntime'}
    for images in (photographs, photographs[:3, :, :24].double().to(memory_format=torch.channels_last)):
        out = forms['onnxruntime'](images)
        assert out.dtype == images.dtype and largest_difference(out, trained(images.float())) < 1e-5
    fast = optimize(trained, photographs, compile=False, onnx=True, rounds=1)
    assert set(fast.images_per_second) == set(forms)
    with pytest.raises(ValueError, match='onnx runs on the CPU, but the images are on meta'):
        optimize(trained, photographs.to('meta'), onnx=True)


def test_optimize_goes_on_without_a_compiler(trained, photographs, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))
    torch.compiler.reset()
    with torch._inductor.config.patch({'cpp.cxx': ('no-such-compiler',)}):
        fast = optimize(trained, photographs, rounds=1)
    assert set(fast.images_per_second) == {'plain', 'float32'}
    assert 'torch.compile failed' in caplog.text
    with pytest.raises(ValueError, match='dtypes has torch.int8; choose from'):
        optimize(trained, photographs, dtypes=(torch.int8,))


@pytest.mark.parametrize('to', ['onnx', 'pt2', 'ts'])
def test_exported_file_gives_the_logits_of_photographs(to, trained, photographs, tmp_path, capsys):
    out = tmp_path / 'new' / f'wrn.{to}'
    args = ['--model', 'wrn16_1.cifar10', '--to', to, '--out', str(out)]
    assert export_script.main(args) == 0
    assert 'differ from the network' in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # one file, nothing beside it
    for images in (photographs, photographs[:1, :, :24], photographs[:3].repeat(1, 1, 2, 3)):
        assert largest_difference(run_exported(out, images), trained(images)) < 1e-5
    with pytest.raises(SystemExit):
        export_script.main(args)
    assert 'already exists' in capsys.readouterr().err


@pytest.mark.parametrize('to', ['onnx', 'pt2', 'ts'])
def test_exported_backbone_gives_the_feature_maps(to, photographs, tmp_path, capsys):
    out = tmp_path / f'backbone.{to}'
    args = ['--model', 'wrn16_1.cifar10', '--features', '--to', to, '--out', str(out)]
    assert export_script.main(args) == 0
    assert 'its maps differ from the network' in capsys.readouterr().out
    backbone = timm.create_model('wrn16_1', pretrained=True, features_only=True).eval()
    for images in (photographs, photographs[:1, :, :24]):
        for a, b in zip(run_exported(out, images), backbone(images), strict=True):
            assert largest_difference(a, b) < 1e-5
    if to == 'onnx':
        assert [o.name for o in onnx.load(out).graph.output] == backbone.feature_info.module_name()


def test_a_network_of_one_image_size_is_not_exported(tmp_path):
    model = timm.create_model('vit_tiny_patch16_224', depth=1)
    with pytest.raises(ValueError, match='VisionTransformer takes images of one size only'):
        wrn_timm.export.to_onnx(model, tmp_path / 'x.onnx')


@pytest.mark.parametrize('to', ['pt2', 'onnx', 'ts'])
@pytest.mark.parametrize('kwargs', [{}, dict(stem='cifar', in_chans=1)])
def test_an_imagenet_network_is_exported_for_every_size(kwargs, to, tmp_path):
    if to == 'pt2' and not kwargs and torch.__version__ < (2, 9):
        pytest.skip('torch 2.6 cannot export the max pool for every size')
    model = randomise(timm.create_model('wrn18_1_5', **kwargs))
    export_weights(model, tmp_path / 'weights', {'tag': 'test'})
    out = tmp_path / f'wrn.{to}'
    args = ['--model', str(tmp_path / 'weights'), '--to', to, '--out', str(out)]
    assert export_script.main(args) == 0
    smallest = 2 * model.feature_info[-1]['reduction']
    for size in ((1, smallest, smallest), (3, 72, 96)):
        images = torch.randn(size[0], model.in_chans, *size[1:])
        assert largest_difference(run_exported(out, images), model(images)) < 1e-5


def test_exported_file_carries_preprocessing_and_class_names(trained, tmp_path):
    files = {to: tmp_path / f'wrn.{to}' for to in ('onnx', 'pt2', 'ts')}
    for to, file in files.items():
        wrn_timm.export.EXPORTERS[to](trained, file)
    extra = {'pt2': {'config.json': ''}, 'ts': {'config.json': ''}}
    torch.export.load(files['pt2'], extra_files=extra['pt2'])
    torch.jit.load(files['ts'], _extra_files=extra['ts'])
    configs = [{p.key: p.value for p in onnx.load(files['onnx']).metadata_props}['config'],
               *(e['config.json'] for e in extra.values())]
    for config in map(json.loads, configs):
        assert config['mean'] == [0.4914, 0.4822, 0.4465] and config['input_size'] == [3, 32, 32]
        assert config['label_names'][3] == 'cat' and (config['color'], config['range']) == ('RGB', [0, 1])


def test_exported_files_name_no_classes_of_a_classifier_that_was_replaced(tmp_path):
    model = timm.create_model('wrn16_1', pretrained=True, num_classes=3)
    wrn_timm.export.to_torchscript(model, tmp_path / 'other.ts')
    loaded, x = torch.jit.load(tmp_path / 'other.ts'), torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded.double()(x.double()).float(), model.eval()(x))  # it can be cast and moved
    extra = {'config.json': ''}
    torch.jit.load(tmp_path / 'other.ts', _extra_files=extra)
    assert json.loads(extra['config.json'])['label_names'] is None


def test_a_new_classifier_of_as_many_classes_has_no_names(tmp_path):
    model = timm.create_model('wrn16_1', pretrained=True, drop_rate=0)  # an integer, as people write it
    model.reset_classifier(10)
    wrn_timm.export.to_torchscript(model, tmp_path / 'new.ts')
    extra = {'config.json': ''}
    torch.jit.load(tmp_path / 'new.ts', _extra_files=extra)
    assert json.loads(extra['config.json'])['label_names'] is None


@pytest.mark.parametrize('wrap', [torch.compile, torch.nn.DataParallel])
def test_a_model_in_a_wrapper_is_exported(trained, tmp_path, wrap):
    wrn_timm.export.to_torchscript(wrap(trained), tmp_path / 'a.ts')
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.load(tmp_path / 'a.ts')(x), trained.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('factor', [1.001, float('nan')])
def test_an_exported_file_that_gives_something_else_is_not_kept(tmp_path, capsys, monkeypatch, factor):
    monkeypatch.setattr(export_script, 'run_exported', lambda path, images: factor * run_exported(path, images))
    assert export_script.main(['--model', 'wrn16_1.cifar10', '--to', 'ts', '--out', str(tmp_path / 'a.ts')]) == 1
    assert 'its output differs from the network' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_clear_errors(tmp_path, capsys, trained):
    with pytest.raises(SystemExit):
        export_script.main(['--model', 'wrn16_1.cifar10', '--to', 'onnx', '--out', 'wrn.pt2'])
    assert '--to onnx writes a .onnx file, but --out is wrn.pt2' in capsys.readouterr().err
    assert export_script.main(['--model', 'wrn16_1.cifar', '--to', 'ts', '--out', str(tmp_path / 'a.ts')]) == 1
    assert "wrn16_1 has no tag 'cifar'; nearest: cifar10" in capsys.readouterr().err
    assert not (tmp_path / 'a.ts').exists()
    with pytest.raises(ValueError, match=r'the suffix of .*a\.bin is not one of \.onnx, \.pt2, \.ts'):
        run_exported('a.bin', torch.randn(1, 3, 32, 32))
