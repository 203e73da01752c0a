"""Other people's pipelines, with their real libraries (those not installed are skipped), and the READMEs' recipes."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import ROOT, SAMPLE
from timm.data import create_transform, resolve_model_data_config
from torchvision.models.feature_extraction import create_feature_extractor

import wrn_timm  # noqa: F401
from wrn_timm.data.images import read_rgb


def stages(name, x):
    """Outputs of the stages by the network's own modules, of weights drawn from seed 0."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    outputs = []
    for stage in ('layer1', 'layer2', 'layer3', 'layer4'):
        if hasattr(model, stage):
            getattr(model, stage).register_forward_hook(lambda module, args, out: outputs.append(out))
    model(x)
    return outputs


@pytest.fixture
def x():
    return torch.randn(1, 3, 64, 64)


def assert_same(features, expected):
    for f, e in zip(features, expected, strict=True):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize('name', ['wrn16_2', 'wrn18_1_5'])
def test_torchvision_create_feature_extractor(name, x):
    expected = stages(name, x)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    names = [f'layer{i + 1}' for i in range(len(expected))]
    assert_same(create_feature_extractor(model, names)(x).values(), expected)


def test_segmentation_models_pytorch(x):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.Unet('tu-wrn18_1_5', encoder_weights=None, classes=3).eval()
    assert model.encoder.out_channels == [3, 64, 96, 192, 384, 768] and model(x).shape == (1, 3, 64, 64)
    # the 6N + 4 family has the scales 1, 2 and 4, which that library calls a depth of 2
    torch.manual_seed(0)
    small = smp.Unet('tu-wrn16_2', encoder_weights=None, encoder_depth=2, decoder_channels=(64, 32), classes=3).eval()
    assert small(x).shape == (1, 3, 64, 64)
    assert_same(small.encoder(x), stages('wrn16_2', x))


def test_transformers_backbone(x):
    transformers = pytest.importorskip('transformers')
    for name, indices in (('wrn16_2', (0, 1, 2)), ('wrn18_1_5', (1, 2, 3, 4))):
        expected = stages(name, x)
        config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=indices)
        torch.manual_seed(0)
        own = timm.create_model(name, features_only=True, out_indices=indices)
        for backbone in (transformers.TimmBackbone(config), transformers.AutoBackbone.from_config(config)):
            backbone._backbone.load_state_dict(own.state_dict())
            assert backbone.channels == [e.shape[1] for e in expected]
            assert_same(backbone.eval()(x).feature_maps, expected)


@timm.models.register_model
def strided_wrn16_2(pretrained=False, **kwargs):
    """WRN-16-2 with strides 4, 8 and 16 under a name of its own: transformers passes no other arguments to timm."""
    return timm.create_model('wrn16_2', pretrained=pretrained, stem='imagenet', **kwargs)


def trained_backbone(name, out_indices):
    """A backbone whose BatchNorm has weights and statistics that differ from their first values."""
    backbone = timm.create_model(name, features_only=True, out_indices=out_indices)
    for norm in (m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        for positive in (norm.weight, norm.running_var):
            torch.nn.init.uniform_(positive, 0.5, 1.5)
        for centred in (norm.bias, norm.running_mean):
            torch.nn.init.normal_(centred, std=0.1)
    return backbone.eval()


TINY_DETR = dict(
    d_model=32, num_queries=4, num_labels=3, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32)


@pytest.mark.parametrize(('name', 'last'), [('strided_wrn16_2', 2), ('wrn18_1', 4)])
@pytest.mark.parametrize(
    ('kind', 'levels'), [('Detr', 1), ('ConditionalDetr', 1), ('DeformableDetr', 3), ('RTDetr', 3)])
def test_transformers_detr(kind, levels, name, last, x, tmp_path):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    out_indices = list(range(last + 1 - levels, last + 1))
    own = trained_backbone(name, out_indices)
    more = {'DeformableDetr': dict(num_feature_levels=3), 'RTDetr': dict(
        encoder_in_channels=own.feature_info.channels(), feat_strides=own.feature_info.reduction(), num_denoising=0,
        encoder_hidden_dim=32, decoder_in_channels=[32] * 3)}.get(kind, {})
    # transformers 5.0 and older want the last three; 5.24 needs the configuration of the backbone alone
    config = getattr(transformers, f'{kind}Config')(
        backbone_config=transformers.TimmBackboneConfig(
            backbone=name, out_indices=out_indices, use_pretrained_backbone=False),
        **TINY_DETR, **more, use_timm_backbone=False, backbone=None, use_pretrained_backbone=False)
    detector_class = getattr(transformers, f'{kind}ForObjectDetection')
    detector = detector_class(config)
    backbone = next(m for m in detector.modules() if type(m) is type(own))
    backbone.load_state_dict(own.state_dict())

    # the frozen BatchNorm that transformers puts in place of ours gives the features of evaluation, also in training
    features = []
    backbone.register_forward_hook(lambda module, args, out: features.extend(out))
    labels = [{'class_labels': torch.tensor([0, 2]), 'boxes': torch.tensor([[.5, .5, .3, .2], [.3, .3, .2, .2]])}]
    out = detector.train()(pixel_values=x, labels=labels)
    for feature, expected in zip(features, own(x), strict=True):
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)
    assert out.logits.shape == (1, 4, 3 + (kind == 'Detr')) and out.pred_boxes.shape == (1, 4, 4)
    assert out.pred_boxes.min() >= 0 and out.pred_boxes.max() <= 1
    if levels == 1:
        assert out.encoder_last_hidden_state.shape == (1, (64 // own.feature_info.reduction()[-1]) ** 2, 32)
    out.loss.backward()
    assert out.loss.isfinite() and all(p.grad.abs().sum() > 0 for p in backbone.parameters())

    detector.eval().save_pretrained(tmp_path)
    reloaded = detector_class.from_pretrained(tmp_path).eval()
    assert_same([reloaded(x).logits, reloaded(x).pred_boxes], [detector(x).logits, detector(x).pred_boxes])


def test_transformers_detr_by_name(x):
    transformers = pytest.importorskip('transformers')
    config = transformers.DetrConfig(
        use_timm_backbone=True, backbone='wrn18_1', use_pretrained_backbone=False, **TINY_DETR)
    assert transformers.DetrForObjectDetection(config)(x).logits.shape == (1, 4, 4)


def test_anomalib_feature_extractor(x):
    extractors = pytest.importorskip('anomalib.models.components.feature_extractors')
    for name in ('wrn16_2', 'wrn18_1_5'):
        extractor = extractors.TimmFeatureExtractor(name, layers=['layer1', 'layer2', 'layer3'], pre_trained=False)
        features = extractor.eval()(x)
        assert list(features) == ['layer1', 'layer2', 'layer3']
        assert [tuple(f.shape) for f in features.values()] == [tuple(s.shape) for s in stages(name, x)[:3]]
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    patchcore = PatchcoreModel(layers=['layer2', 'layer3'], backbone='wrn16_2', pre_trained=False)
    assert patchcore.train()(x).shape[-1] == 64 + 128


def run_script(name, folder, *args):
    """One of timm's own scripts, copied away from its tree, with the timm that is installed; returns its figures."""
    if 'TIMM_SOURCE' not in os.environ:
        pytest.skip("set TIMM_SOURCE to a checkout of this version of timm, whose packages lack the scripts")
    shutil.copy(Path(os.environ['TIMM_SOURCE']) / name, folder)
    if name == 'train.py':
        command = [name, '--device-modules', 'wrn_timm']
    else:
        command = ['-c', f'import wrn_timm, runpy; runpy.run_path({name!r}, run_name="__main__")']
    done = subprocess.run(
        [sys.executable, *command, '--model', 'wrn16_1', '--device', 'cpu', '--num-classes', '2', *args], cwd=folder,
        env={**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, (str(ROOT), os.getenv('PYTHONPATH'))))},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition('--result\n')[2])


def test_timms_own_train_validate_and_benchmark(tmp_path):
    for part in ('train', 'validation'):
        for name in ('airplanes', 'ketch'):
            (tmp_path / part / name).mkdir(parents=True)
            for photograph in sorted((SAMPLE / name).iterdir())[:4]:
                shutil.copy(photograph, tmp_path / part / name)
    data = ['--data-dir', '.', '-b', '4', '--workers', '1', '--no-prefetcher']
    trained, = run_script(
        'train.py', tmp_path, *data, '--input-size', '3', '32', '32', '--epochs', '1', '--sched', 'step',
        '--warmup-epochs', '0', '--output', 'out', '--experiment', 'run')
    validated = run_script('validate.py', tmp_path, *data, '--split', 'validation', '--checkpoint',
                           'out/run/last.pth.tar')
    assert validated['top1'] == trained['validation']['top1']

    # the same checkpoint over the same files by this package's own reading of both
    model = timm.create_model('wrn16_1', num_classes=2, checkpoint_path=str(tmp_path / 'out/run/last.pth.tar')).eval()
    transform = create_transform(**resolve_model_data_config(model))
    paths = sorted((tmp_path / 'validation').glob('*/*'))
    with torch.no_grad():
        found = model(torch.stack([transform(read_rgb(p)) for p in paths])).argmax(1)
    hits = sum(('airplanes', 'ketch')[i] == p.parent.name for i, p in zip(found.tolist(), paths, strict=True))
    assert validated['top1'] == 100 * hits / len(paths)

    measured = run_script('benchmark.py', tmp_path, '--bench', 'inference', '-b', '2', '--num-warm-iter', '1',
                          '--num-bench-iter', '10')
    assert measured['infer_samples_per_sec'] > 0 and measured['param_count'] == pytest.approx(0.17, abs=0.01)


def code_by_section(readme):
    """The Python code of a README by what it shows: the bold words before it in its section, or the heading."""
    found = {}
    for heading, text in re.findall(r'^## (.*?)\n(.*?)(?=^## |\Z)', readme.read_text(), flags=re.S | re.M):
        for before, code in re.findall(r'(.*?)```python\n(.*?)```', text, flags=re.S):
            found[(re.findall(r'\*\*(.*?)\*\*', before) or [heading])[-1]] = code
    return found


RECIPES = code_by_section(ROOT / 'wrn_timm' / 'README.md')
RECIPES['Detection'] = code_by_section(ROOT / 'README.md')['Features for detection']


@pytest.mark.parametrize('name', RECIPES)
def test_readme_recipe_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = {}
    exec(RECIPES[name], ran)
    if name == 'Detection':
        assert all(loss.isfinite() for loss in ran['losses'].values())
        assert set(ran['found']) == {'boxes', 'labels', 'scores'}
    elif name == 'Export':
        assert ran['logits'].shape == (5, 10)


def test_readme_has_five_recipes():
    assert sorted(RECIPES) == ['Detection', 'Export', 'Fast inference', 'Features by name', 'Segmentation']
    assert (ROOT / 'wrn_timm' / 'README.md').read_text().count('```python') == len(RECIPES) - 1
