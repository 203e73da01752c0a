"""Other people's weights by name: the right file from the right place, checked, or a word on why not."""
import hashlib
import io
import json
import re
import zipfile

import pytest
import tables as tables_script
import timm
import torch
from conftest import SAMPLE, randomise
from pytorchcv.models.common import model_store
from pytorchcv.models.wrn_cifar import get_wrn_cifar
from test_supply_chain import Evil

import wrn_timm
from wrn_timm import download
from wrn_timm.cli import finetune as finetune_script
from wrn_timm.weights import default_tag, export_weights, more_accurate, published, released, sources

DATA = {'cifar10': 10, 'cifar100': 100, 'svhn': 10}
ARCH = 'wrn10_2'  # small, and of no other test
NAME = f'{ARCH}.pcv_cifar10'
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def saved(state_dict):
    """As torch wrote it before version 1.6."""
    file = io.BytesIO()
    torch.save(state_dict, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def zipped(files):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as out:
        for name, data in files.items():
            out.writestr(name, data)
    return archive.getvalue()


@pytest.fixture(scope='module')
def networks():
    """pytorchcv's own networks with random weights."""
    torch.manual_seed(0)
    return {data: randomise(get_wrn_cifar(num_classes, blocks=10, width_factor=2))
            for data, num_classes in DATA.items()}


@pytest.fixture(scope='module')
def pickles(networks):
    return {f'{ARCH}_{data}.pth': saved(network.state_dict()) for data, network in networks.items()}


@pytest.fixture(scope='module')
def archives(pickles):
    return {f'{file}.zip': zipped({file: data}) for file, data in pickles.items()}


@pytest.fixture
def server(hub, pickles, archives, no_weights, monkeypatch, tmp_path):
    """Serves `archives` by file name; wrn10_2 is as if published there. Torch's cache is empty."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    hub.archives = dict(archives)
    for data in DATA:
        file = f'{ARCH}_{data}.pth'
        monkeypatch.setitem(published(), f'{ARCH}.pcv_{data}', {
            'url': f'{hub.url}/theirs/{file}.zip', 'sha1': hashlib.sha1(pickles[file]).hexdigest(), 'error': 5.})
    hub.faults['/theirs/'] = lambda h: h.send(hub.archives[h.path.rpartition('/')[2]]) or True
    assert wrn_timm.register_wrn(10, 2) == ARCH
    return hub


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / 'torch').rglob('*') if p.is_file())


def assert_same(model, network):
    with torch.inference_mode():
        expected = network.eval()(X)
        assert expected.std() > 1e-3
        torch.testing.assert_close(model.eval()(X), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Address and sha1 that pytorchcv asks for, by its name of a model."""
    def ask(name):
        seen = []

        def fetch(url, path, overwrite):
            seen.append(url)
            with zipfile.ZipFile(path, 'w'):
                pass
        monkeypatch.setattr(model_store, '_download', fetch)
        monkeypatch.setattr(model_store, '_check_sha1', lambda path, sha1: seen.append(sha1) or True)
        model_store.get_model_file(name, str(tmp_path / name))
        return seen
    return ask


@pytest.mark.parametrize('data', DATA)
@pytest.mark.parametrize('arch', ['wrn16_10', 'wrn28_10', 'wrn40_8'])
def test_the_nine_are_what_pytorchcv_itself_asks_for(arch, data, asked):
    name = f'{arch}.pcv_{data}'
    entry, cfg = published()[name], timm.get_pretrained_cfg(name)
    assert [entry['url'], entry['sha1']] == asked(f'{arch}_{data}')
    assert round(100 * entry['error']) == int(model_store.get_model_metainfo(f'{arch}_{data}')[1])
    assert cfg.url == entry['url'] and name in timm.list_pretrained('wrn*')
    assert (cfg.num_classes, cfg.license, cfg.origin_url) == (DATA[data], 'mit', 'https://github.com/osmr/imgclsmob')
    assert (cfg.mean, cfg.std) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert cfg.label_names[3] == {'cifar10': 'cat', 'cifar100': 'bear', 'svhn': '3'}[data]
    assert len(set(cfg.label_names)) == DATA[data]


def test_there_are_nine():
    assert len(published()) == 9
    assert sorted(n for n in timm.list_models('wrn*.pcv_*', include_tags=True) if ARCH not in n) == sorted(published())


@pytest.mark.parametrize('data', DATA)
def test_equal_logits_by_one_download(server, networks, tmp_path, data):
    name = f'{ARCH}.pcv_{data}'
    assert_same(timm.create_model(name, pretrained=True), networks[data])
    assert cached(tmp_path) == [f'{ARCH}_{data}.pth'] and len(server.requests) == 1
    server.archives.clear()
    assert_same(timm.create_model(name, pretrained=True), networks[data])
    by_configuration = timm.get_pretrained_cfg(name)
    assert_same(timm.create_model(ARCH, pretrained=True, pretrained_cfg=by_configuration), networks[data])
    assert len(server.requests) == 1


def test_an_account_on_the_hub_is_not_asked_for_them(server, networks, monkeypatch, tmp_path):
    monkeypatch.setenv('WRN_TIMM_HUB_NAMESPACE', 'acme')
    assert sources(NAME) == {'url': published()[NAME]['url']}
    assert_same(timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'mine'), networks['cifar10'])
    assert [path for _, path in server.requests] == [f'/theirs/{ARCH}_cifar10.pth.zip']
    assert not cached(tmp_path) and (tmp_path / 'mine' / f'{ARCH}_cifar10.pth').is_file()


def test_full_timm_citizens(server, networks):
    model = timm.create_model(NAME, pretrained=True).eval()
    features = timm.create_model(NAME, pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(features(X), model.forward_intermediates(X, intermediates_only=True))
        network = networks['cifar10'].eval().features
        torch.testing.assert_close(features(X)[0], network.stage1(network.init_block(X)), atol=1e-5, rtol=1e-5)
    five = timm.create_model(NAME, pretrained=True, num_classes=5, in_chans=1)
    assert five(X[:, :1]).shape == (2, 5)
    torch.testing.assert_close(five.layer3[0].conv2.weight, model.layer3[0].conv2.weight)
    config = timm.data.resolve_model_data_config(model)
    assert (config['std'], config['input_size']) == ((0.2023, 0.1994, 0.2010), (3, 32, 32))


def without_length(data):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True
        return True
    return answer


def spoilt(archive):
    return archive[:5000] + bytes(90) + archive[5090:]


FILE = f'{ARCH}_cifar10.pth'
LIMIT = 2_000_000
# What the server does with the pickle, and what is said of it.
FAULTS = {
    'another file beside it': (
        lambda h, file: h.send(zipped({FILE: file, 'README': b''})), f'refused: it holds 2 files .* instead of {FILE}'),
    'another file': (
        lambda h, file: h.send(zipped({f'../{FILE}': file})), rf"refused: it holds 1 files \('\.\./{FILE}'\)"),
    'no file': (lambda h, file: h.send(zipped({})), 'refused: it holds 0 files'),
    'no zip': (lambda h, file: h.send(b'<html>'), 'refused: it is not a valid zip archive'),
    'damaged zip': (lambda h, file: h.send(spoilt(zipped({FILE: file}))), 'refused: it is not a valid zip archive'),
    'too large': (lambda h, file: h.send(bytes(LIMIT + 1)), 'refused: it has at least 2,000,001 bytes; the limit'),
    'too large without a word': (
        lambda h, file: without_length(bytes(2 * LIMIT))(h), r'refused: it has at least 2,0\d\d,\d\d\d bytes'),
    'too large inside': (
        lambda h, file: h.send(zipped({FILE: bytes(LIMIT + 1)})), 'refused: the file in it has 2,000,001 bytes'),
    'wrong sha1': (lambda h, file: h.send(zipped({FILE: file[:-1]})), 'refused: the file in it has sha1 .* names'),
    'gone': (lambda h, file: h.fail(404), 'The server answered 404 Not Found. The publisher has moved'),
    'busy': (lambda h, file: h.fail(503), 'The server answered 503 Service Unavailable. Try again later'),
    'cut off': (
        lambda h, file: h.send(zipped({FILE: file}), cut=70_000),
        '70,000 of .* were received. The transfer was interrupted'),
    'cut off at once': (
        lambda h, file: setattr(h, 'close_connection', True), 'The transfer was interrupted: try again'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_is_said_and_leaves_nothing(server, networks, pickles, monkeypatch, tmp_path, fault):
    monkeypatch.setattr(download, 'LIMIT', LIMIT)
    (answer, message), good = FAULTS[fault], server.faults['/theirs/']
    server.faults['/theirs/'] = lambda h: answer(h, pickles[FILE]) or True
    with pytest.raises(RuntimeError, match=f'No weights for {re.escape(NAME)}: not in .*{FILE}.zip .*{message}') as e:
        timm.create_model(NAME, pretrained=True)
    assert str(e.value).endswith(f"save the file in it as {tmp_path / 'torch/hub/checkpoints' / FILE}.")
    assert cached(tmp_path) == []
    server.faults['/theirs/'] = good
    assert_same(timm.create_model(NAME, pretrained=True), networks['cifar10'])


def test_no_network_and_no_proxy(server, monkeypatch):
    address = published()[NAME]['url'].replace(f':{server.server_port}/', ':9/')  # where nobody listens
    monkeypatch.setitem(published()[NAME], 'url', address)
    monkeypatch.setattr(timm.models._registry._model_pretrained_cfgs[NAME], 'url', address)
    with pytest.raises(RuntimeError, match='Connection refused.*Check the network connection. Or download it on'):
        timm.create_model(NAME, pretrained=True)
    monkeypatch.setenv('http_proxy', 'http://127.0.0.1:9')
    with pytest.raises(RuntimeError, match=r'Requests go through a proxy: correct \$HTTPS_PROXY'):
        timm.create_model(NAME, pretrained=True)


def test_a_cache_that_is_damaged_or_cannot_be_written(server, networks, monkeypatch, tmp_path):
    timm.create_model(NAME, pretrained=True)
    file = tmp_path / 'torch' / 'hub' / 'checkpoints' / FILE
    before = hashlib.sha1(file.read_bytes()).hexdigest()
    file.write_bytes(file.read_bytes()[:-1])
    found = hashlib.sha1(file.read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=f'{file} is damaged or is another file: sha1 {found}, .* {before}. Delete'):
        timm.create_model(NAME, pretrained=True)
    file.unlink()
    assert_same(timm.create_model(NAME, pretrained=True), networks['cifar10'])
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(RuntimeError, match=r'cannot be written \(.*\). Free some space, or choose another .* \$TORCH'):
        timm.create_model(NAME, pretrained=True)


def test_a_pickle_of_code_is_not_run(server, monkeypatch, tmp_path):
    """As if the pin itself were a thief's."""
    evil = saved({'fc.bias': Evil(str(tmp_path / 'trace'))})
    server.archives[f'{FILE}.zip'] = zipped({FILE: evil})
    monkeypatch.setitem(published()[NAME], 'sha1', hashlib.sha1(evil).hexdigest())
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        timm.create_model(NAME, pretrained=True)
    assert not (tmp_path / 'trace').exists()


def test_finetuned_by_the_script(server, tmp_path):
    data = tmp_path / 'data'
    for name in ('ketch', 'pizza'):
        (data / name).mkdir(parents=True)
        for p in sorted((SAMPLE / name).iterdir())[:6]:
            (data / name / p.name).write_bytes(p.read_bytes())
    args = ['--data', str(data), '--device', 'cpu', '--epochs', '1', '--messages', 'quiet']
    assert finetune_script.main([*args, '--model', NAME, '--out', str(tmp_path / 'run')]) == 0
    cfg = json.loads((tmp_path / 'run' / 'last' / 'config.json').read_text())['pretrained_cfg']
    assert (cfg['license'], cfg['std'], cfg['label_names']) == (None, [0.2023, 0.1994, 0.2010], ['ketch', 'pizza'])
    assert 'url' not in cfg and 'file' not in cfg
    assert timm.create_model(f"local-dir:{tmp_path / 'run' / 'last'}", pretrained=True)(X).shape == (2, 2)


def test_random_weights_and_the_callers_own_are_nobody_elses(server, tmp_path):
    """They have our statistics, though the name alone stands for other people's weights."""
    torch.save(timm.create_model(ARCH).state_dict(), tmp_path / 'mine.pth')
    mine = timm.create_model(ARCH, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'mine.pth')))
    assert not {'tag', 'license', 'origin_url'} & mine.pretrained_cfg.keys()
    assert mine.pretrained_cfg['std'] == timm.get_pretrained_cfg(f'{ARCH}.cifar10').std
    assert 'label_names' not in mine.pretrained_cfg  # ten classes, but of which data?
    named = timm.create_model(f'{ARCH}.cifar10', pretrained=True, pretrained_cfg_overlay=dict(
        file=str(tmp_path / 'mine.pth')))
    assert named.pretrained_cfg['label_names'][0] == 'airplane'
    assert timm.create_model(ARCH, pretrained=True).pretrained_cfg['license'] == 'mit'
    model = timm.create_model('wrn40_8', device='meta')
    assert (model.pretrained_cfg['tag'], model.pretrained_cfg['license']) == ('cifar10', 'apache-2.0')
    assert model.pretrained_cfg['std'] == timm.get_pretrained_cfg('wrn40_8.cifar10').std
    assert 'label_names' not in model.pretrained_cfg
    theirs = timm.create_model('wrn40_8.pcv_cifar10', device='meta')
    assert (theirs.pretrained_cfg['tag'], theirs.pretrained_cfg['license']) == ('pcv_cifar10', 'mit')


def test_default_tags(monkeypatch):
    tags = ('cifar10', 'cifar100', 'pcv_cifar10', 'pcv_cifar100', 'pcv_svhn')
    monkeypatch.setattr('wrn_timm.weights.released', lambda: {'wrn16_2.cifar10': {}, 'wrn16_10.cifar100': {}})
    assert default_tag('wrn28_10', tags) == 'pcv_cifar10'
    assert default_tag('wrn28_8', tags[:2]) == 'cifar10'
    assert default_tag('wrn16_10', tags) == 'cifar100'
    monkeypatch.setattr('wrn_timm.weights.released', lambda: {'wrn28_10.cifar100': {}, 'wrn28_10.cifar10': {}})
    assert default_tag('wrn28_10', tags) == 'cifar10'


@pytest.mark.parametrize('arch', ['wrn16_1', 'wrn16_10', 'wrn28_10', 'wrn40_8', 'wrn28_8'])
def test_timm_takes_the_default_tag(arch):
    known = {*released(), *published()}
    tags = [t for t in ('cifar10', 'cifar100', 'pcv_cifar10') if f'{arch}.{t}' in known] or ['cifar10']
    assert timm.get_pretrained_cfg(arch).tag == tags[0]


def test_weights_that_are_here_by_chance_change_no_default(no_weights):
    (no_weights / 'wrn10_3.cifar100').mkdir()
    (no_weights / 'wrn10_3.cifar100' / 'model.safetensors').touch()
    assert timm.get_pretrained_cfg(wrn_timm.register_wrn(10, 3)).tag == 'cifar10'
    assert 'wrn10_3.cifar100' in timm.list_pretrained('wrn10*')


@pytest.mark.parametrize('name, nearest', [('wrn50_4', 'wrn101_2.tv2_in1k'), ('wrn18_2', 'wrn34_1.a1_in1k')])
def test_the_nearest_of_imagenet_is_named(no_weights, name, nearest):
    with pytest.raises(RuntimeError, match=f'nearest network with weights is {nearest}'):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize('name, nearest', [
    ('wrn28_10.cifar100', 'wrn28_10.pcv_cifar100'), ('wrn16_10.cifar10', 'wrn16_10.pcv_cifar10'),
    ('wrn34_20', 'wrn28_10.pcv_cifar10'), ('wrn22_8.cifar100', 'wrn16_10.pcv_cifar100'),
    ('wrn16_1', 'wrn16_2.cifar10'),
])
def test_where_there_are_none_the_nearest_are_named(no_weights, name, nearest):
    export_weights(timm.create_model('wrn16_2'), no_weights / 'wrn16_2.cifar10', {'tag': 'cifar10'})
    with pytest.raises(RuntimeError, match=f'no Hub account is set.* nearest network with weights is {nearest}.$'):
        timm.create_model(name if '.' in name else f'{name}.cifar10', pretrained=True)


def test_ours_out_of_reach_on_the_hub_names_theirs(hub, no_weights, monkeypatch, tmp_path):
    monkeypatch.setenv('WRN_TIMM_HUB_NAMESPACE', 'acme')
    with pytest.raises(RuntimeError, match='no repository acme/wrn40_8.cifar10.* weights is wrn40_8.pcv_cifar10.$'):
        timm.create_model('wrn40_8.cifar10', pretrained=True, cache_dir=tmp_path)


def natural(name):
    """As timm sorts names: the numbers in them as numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r'(\d+)', name)]


@pytest.mark.parametrize('top1, better', [(94., 'pcv_cifar10'), (96., 'cifar10')])
def test_list_weights_shows_them_apart_and_which_is_more_accurate(server, no_weights, tmp_path, top1, better):
    ours = no_weights / f'{ARCH}.cifar10'
    export_weights(timm.create_model(ARCH), ours, {'tag': 'cifar10'})
    (ours / 'metrics.json').write_text(json.dumps({'top1': top1}))
    names = [w.name for w in wrn_timm.list_weights()]
    assert names[-12:] == sorted(published(), key=natural)
    rows = {w.name: w for w in wrn_timm.list_weights()}
    mine, theirs = rows[f'{ARCH}.cifar10'], rows[NAME]
    assert (mine.top1, mine.published_error, mine.default) == (top1, None, False)
    assert (theirs.top1, theirs.published_error, theirs.default, theirs.license) == (None, 5., True, 'mit')
    assert (theirs.location, theirs.size, theirs.sha256) == (published()[NAME]['url'], None, None)
    for row in (mine, theirs):
        assert row.more_accurate == ('' if row.name == f'{ARCH}.{better}' else f'{ARCH}.{better}')
    timm.create_model(NAME, pretrained=True)
    file = tmp_path / 'torch' / 'hub' / 'checkpoints' / FILE
    here = {w.name: w for w in wrn_timm.list_weights()}[NAME]
    assert (here.location, here.size) == (str(file), file.stat().st_size)
    assert here.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_tables_mark_the_default_and_the_more_accurate():
    rows = {re.search('`(.*?)`', row)[1]: row for row in tables_script.published_table().splitlines()[2:]}
    assert list(rows) == list(published())
    for name, row in rows.items():
        assert f"| {published()[name]['error']:.2f} |" in row and published()[name]['sha1'][:12] in row
        assert (' (default)' in row) == (timm.get_pretrained_cfg(name.partition('.')[0]).tag == name.partition('.')[2])
    known = {f'wrn28_10.{tag}': error for tag, error in (
        ('cifar10', 4.), ('cifar100', 17.), ('pcv_cifar10', 2.39), ('pcv_cifar100', 18.))}
    assert tables_script.beaten('wrn28_10.cifar10', known) == '`wrn28_10.pcv_cifar10`, 2.39'
    assert tables_script.beaten('wrn28_10.pcv_cifar100', known) == '`wrn28_10.cifar100`, 17.00'
    assert tables_script.beaten('wrn28_10.pcv_cifar10', known) == '-'
    assert more_accurate('wrn28_8.cifar10', known) == ''
