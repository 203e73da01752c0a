"""Where weights are found, that they are whole, and what is said when they are not there."""
import json
import shutil

import pytest
import timm
import torch
from conftest import ROOT, data_dir
from safetensors.torch import load_file, save_file
from timm.data import resolve_data_config
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import CIFAR10, CIFAR100

import wrn_timm
from wrn_timm.card import check_golden
from wrn_timm.data.small_sets import load
from wrn_timm.train.measure import evaluate, validate
from wrn_timm.weights import export_weights, sha256_of, sources, verify

RELEASED = sorted(p.name for p in (ROOT / 'weights').iterdir() if p.is_dir())
# 10,000 test images are half an hour's work for one core with a WRN-28-10, which is measured on the first 200
SMALL = [name for name in RELEASED if (ROOT / 'weights' / name / 'model.safetensors').stat().st_size < 20e6]


def export(folder, name='wrn16_1', tag='cifar10', seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model(name).eval()
    export_weights(model, folder, {'tag': tag}, **kwargs)
    return model


def test_something_real_is_released():
    assert 'wrn16_1.cifar10' in RELEASED


@pytest.mark.parametrize('name', RELEASED)
def test_released_folder_is_whole(name):
    folder = ROOT / 'weights' / name
    names = {p.name for p in folder.iterdir()}
    assert names >= {'model.safetensors', 'config.json', 'README.md', 'metrics.json', 'recipe.json', 'history.csv',
                     'curves.png', 'golden.npz'}
    assert not [n for n in names if n.endswith(('.pt', '.pth', '.bin', '.pkl', '.ckpt'))]
    verify(folder)
    config = json.loads((folder / 'config.json').read_text())
    assert config['sha256'] == sha256_of(folder / 'model.safetensors')
    assert f"{config['architecture']}.{config['pretrained_cfg']['tag']}" == name


@pytest.mark.parametrize('name', RELEASED)
def test_released_weights_give_their_golden_logits(name):
    assert check_golden(ROOT / 'weights' / name) < 1e-3


@pytest.mark.parametrize('name', SMALL)
def test_released_weights_give_the_published_accuracy_on_real_test_images(name):
    published = json.loads((ROOT / 'weights' / name / 'metrics.json').read_text())
    directory = data_dir(published['dataset'])
    assert validate(name, f"{published['dataset']}:{directory}")['top1'] == pytest.approx(published['top1'], abs=0.02)


@pytest.mark.parametrize('name', RELEASED)
def test_timms_own_configuration_and_transform_give_the_trainers_accuracy(name):
    """What a user of timm writes, on torchvision's data set, against the trainer's normalisation of the raw arrays."""
    dataset, n = name.partition('.')[2], 500 if name in SMALL else 200
    directory = data_dir(dataset)
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    official = {'cifar10': CIFAR10, 'cifar100': CIFAR100}[dataset]
    images = Subset(official(directory, train=False, transform=transform), range(n))
    with torch.inference_mode():
        hits = sum((model(x).argmax(1) == y).sum().item() for x, y in DataLoader(images, 100))
    arrays = load(dataset, directory, train=False).subset(torch.arange(n))
    assert 100 * hits / n == pytest.approx(evaluate(model, arrays, torch.device('cpu'))['accuracy'], abs=0.01)
    published = json.loads((ROOT / 'weights' / name / 'metrics.json').read_text())['top1'] / 100
    assert hits / n == pytest.approx(published, abs=4 * (published * (1 - published) / n) ** 0.5)


@pytest.mark.parametrize('name', RELEASED)
def test_released_weights_load_as_timm_users_do(name, hub):
    x = torch.randn(1, 3, 32, 32)
    model = timm.create_model(name, pretrained=True).eval()
    local = timm.create_model(f'local-dir:{ROOT / "weights" / name}', pretrained=True).eval()
    torch.testing.assert_close(model(x), local(x))
    for key in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation', 'label_names'):
        by_name, by_folder = (list(v) if isinstance(v, (list, tuple)) else v for v in (
            m.pretrained_cfg[key] for m in (model, local)))
        assert by_name == by_folder, key
    assert name in timm.list_pretrained('wrn*')
    features = timm.create_model(name, pretrained=True, features_only=True).eval()(x)
    torch.testing.assert_close(features[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    assert timm.create_model(name, pretrained=True, in_chans=1, num_classes=5)(x[:, :1]).shape == (1, 5)
    assert not hub.requests  # they are at hand


def test_environment_before_checkout_before_wheel(no_weights, tmp_path):
    places = [no_weights, tmp_path / 'nowhere' / 'weights', tmp_path / 'nowhere' / 'wrn_timm' / '_weights']
    models = [export(place / 'wrn16_1.cifar10', seed=seed) for seed, place in enumerate(places)]
    x = torch.randn(1, 3, 32, 32)
    for place, model in zip(places, models, strict=True):
        torch.testing.assert_close(timm.create_model('wrn16_1', pretrained=True).eval()(x), model(x))
        shutil.rmtree(place)


def test_order_environment_before_checkout_and_caller_before_both(no_weights, tmp_path):
    model = export(no_weights / 'wrn16_1.cifar10', seed=1)
    other = export(tmp_path / 'mine', seed=2)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(timm.create_model('wrn16_1', pretrained=True).eval()(x), model(x))
    overlay = dict(file=str(tmp_path / 'mine' / 'model.safetensors'))
    named = timm.create_model('wrn16_1', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(named(x), other(x))
    here = [w.name for w in wrn_timm.list_weights() if not w.location.startswith(('hf-hub:', 'https:'))]
    assert here == ['wrn16_1.cifar10']


def test_the_folder_of_the_environment_may_be_in_the_home(tmp_path, monkeypatch):
    model, x = export(tmp_path / 'w' / 'wrn16_1.cifar10', seed=3), torch.randn(1, 3, 32, 32)
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('WRN_TIMM_WEIGHTS', '~/w')
    torch.testing.assert_close(timm.create_model('wrn16_1', pretrained=True).eval()(x), model(x))


def test_a_damaged_file_is_refused_however_it_is_named(tmp_path):
    export(tmp_path / 'mine')
    file = tmp_path / 'mine' / 'model.safetensors'
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    overlay = dict(file=str(file))
    cfg = timm.get_pretrained_cfg('wrn16_1').to_dict() | overlay  # as timm's scripts pass the whole of it
    for given in (dict(pretrained_cfg_overlay=overlay), dict(pretrained_cfg=cfg)):
        with pytest.raises(RuntimeError, match='model.safetensors is damaged or is another file'):
            timm.create_model('wrn16_1', pretrained=True, **given)


def test_a_file_of_the_caller_comes_before_the_folder_of_the_name(tmp_path):
    export(tmp_path / 'a', seed=1)
    other = export(tmp_path / 'b', seed=2)
    x = torch.randn(1, 3, 32, 32)
    for given in (dict(file=str(tmp_path / 'b' / 'model.safetensors')), dict(state_dict=other.state_dict())):
        named = timm.create_model(f'local-dir:{tmp_path}/a', pretrained=True, pretrained_cfg_overlay=given).eval()
        torch.testing.assert_close(named(x), other(x))


def test_weights_say_at_what_size_they_are_tested(tmp_path):
    """timm's own validation takes `test_input_size` where there is one, as ImageNet weights have."""
    model = timm.create_model('wrn18_1', stem='cifar', num_classes=10)
    assert model.pretrained_cfg['test_input_size'] == (3, 288, 288)
    export_weights(model, tmp_path / 'w', {'tag': 'x', 'input_size': (3, 32, 32)})
    again = timm.create_model(f'local-dir:{tmp_path}/w', pretrained=True)
    assert resolve_data_config(model=again, use_test_size=True)['input_size'] == (3, 32, 32)
    assert tuple(again.pretrained_cfg['pool_size']) == again.forward_features(torch.zeros(1, 3, 32, 32)).shape[2:]


def test_an_account_of_another_is_not_taken_to_have_everything(no_weights, monkeypatch):
    monkeypatch.setenv('WRN_TIMM_HUB_NAMESPACE', 'acme')
    at = {w.name for w in wrn_timm.list_weights() if w.location.startswith('hf-hub:acme/')}
    assert at == set(RELEASED) and 'hf_hub_id' not in sources('wrn16_4.cifar10')


def test_list_weights_tells_place_size_hash_and_licence(no_weights):
    export(no_weights / 'wrn16_1.cifar10')
    rows = {w.name: w for w in wrn_timm.list_weights()}
    ours = rows['wrn16_1.cifar10']
    file = no_weights / 'wrn16_1.cifar10' / 'model.safetensors'
    assert (ours.location, ours.size, ours.sha256) == (str(file.parent), file.stat().st_size, sha256_of(file))
    assert rows['wrn50_2.racm_in1k'].location == 'hf-hub:timm/wide_resnet50_2.racm_in1k'
    assert rows['wrn50_2.tv_in1k'].license == 'bsd-3-clause'


def test_the_users_own_model_is_no_trouble_to_list_weights(no_weights, monkeypatch):
    before = wrn_timm.list_weights()
    entrypoints = timm.models._registry._model_entrypoints
    monkeypatch.setitem(entrypoints, 'wrn16_2_of_the_user', entrypoints['wrn16_2'])  # without a configuration
    assert 'wrn16_2_of_the_user' in timm.list_models('wrn*', include_tags=True)
    assert wrn_timm.list_weights() == before


def test_a_configuration_without_a_source_is_said(no_weights):
    with pytest.raises(RuntimeError, match='The pretrained_cfg for wrn16_1 names no weights; give it a source'):
        timm.create_model('wrn16_1', pretrained=True, pretrained_cfg=dict(num_classes=10))


def test_missing_weights_say_where_was_looked_and_what_to_set(no_weights):
    with pytest.raises(RuntimeError) as e:
        timm.create_model('wrn28_10.cifar10', pretrained=True)
    for part in ('wrn28_10.cifar10', str(no_weights), 'WRN_TIMM_WEIGHTS', 'WRN_TIMM_HUB_NAMESPACE', 'pretrained=False'):
        assert part in str(e.value)


def test_no_network_is_said(no_weights, offline):
    offline()
    with pytest.raises(RuntimeError, match=r'No weights for wrn50_2\.racm_in1k: .*timm/wide_resnet50_2\.racm_in1k '
                                           r'could not be downloaded from .*unset it to download.*WRN_TIMM_WEIGHTS'):
        timm.create_model('wrn50_2', pretrained=True, cache_dir=no_weights)


@pytest.mark.parametrize('spoil', ['cut', 'swapped'])
@pytest.mark.parametrize('how', ['by name', 'local-dir'])
def test_damaged_or_swapped_file_is_refused_with_both_hashes(no_weights, spoil, how):
    folder = no_weights / 'wrn16_1.cifar10'
    export(folder)
    file = folder / 'model.safetensors'
    before = sha256_of(file)
    if spoil == 'cut':
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    with pytest.raises(RuntimeError, match=f'sha256 {sha256_of(file)}, but config.json names {before}'):
        timm.create_model('wrn16_1' if how == 'by name' else f'local-dir:{folder}', pretrained=True)


def test_a_folder_without_a_hash_is_taken_as_it_is(no_weights):
    model = export(no_weights / 'wrn16_1.cifar10')
    (no_weights / 'wrn16_1.cifar10' / 'config.json').unlink()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(timm.create_model('wrn16_1', pretrained=True).eval()(x), model(x))


def test_damaged_files_without_a_hash_and_damaged_configurations(no_weights):
    folder = no_weights / 'wrn16_1.cifar10'
    export(folder)
    file = folder / 'model.safetensors'
    whole = file.read_bytes()
    (folder / 'config.json').unlink()
    file.write_bytes(whole[:-100])
    with pytest.raises(RuntimeError, match='model.safetensors is damaged'):
        timm.create_model('wrn16_1', pretrained=True)
    (folder / 'config.json').write_text('{"sha256": ')
    with pytest.raises(RuntimeError, match='config.json is damaged'):
        timm.create_model('wrn16_1', pretrained=True)
    assert [w.size for w in wrn_timm.list_weights() if w.name == 'wrn16_1.cifar10'] == [len(whole) - 100]


@pytest.mark.parametrize('pretrained', [False, True])
def test_unknown_tag_names_the_nearest(pretrained):
    message = "wrn28_10 has no tag 'cifar1000'; nearest: cifar100; known: cifar10, cifar100"
    with pytest.raises(RuntimeError, match=message):
        timm.create_model('wrn28_10.cifar1000', pretrained=pretrained)


def test_half_precision_keeps_batchnorm_in_float32(tmp_path):
    model = export(tmp_path / 'half', half=True)
    for key, value in load_file(tmp_path / 'half' / 'model.safetensors').items():
        if value.is_floating_point():
            assert value.dtype == (torch.float32 if 'bn' in key else torch.float16), key
    loaded = timm.create_model(f'local-dir:{tmp_path / "half"}', pretrained=True).eval()
    assert loaded.conv1.weight.dtype == model.conv1.weight.dtype == torch.float32
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), atol=1e-2, rtol=1e-2)


def test_imagenet_stem_starts_fresh_and_says_so(no_weights, caplog):
    export(no_weights / 'wrn16_1.cifar10')
    model = timm.create_model('wrn16_1', pretrained=True, stem='imagenet')
    assert 'weights of the 3x3 stem are dropped' in caplog.text
    saved = load_file(no_weights / 'wrn16_1.cifar10' / 'model.safetensors')
    torch.testing.assert_close(model.layer1[0].conv1.weight.data, saved['layer1.0.conv1.weight'])
    assert model.conv1.weight.shape == (16, 3, 7, 7)
    assert timm.create_model('wrn16_1', pretrained=True, stem='imagenet', in_chans=1).conv1.weight.shape[1] == 1


def test_small_weights_are_packed_into_the_wheel():
    bundled = (ROOT / 'pyproject.toml').read_text()
    for name in RELEASED:
        if (ROOT / 'weights' / name / 'model.safetensors').stat().st_size < 5e6:
            assert f'"weights/{name}" = "wrn_timm/_weights/{name}"' in bundled
