"""Publishing and loading by way of a Hub on the loopback address: huggingface_hub and timm as they are."""
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import HOME, ROOT, forget_sessions
from huggingface_hub import HfApi

from wrn_timm import weights as weights_module
from wrn_timm.card import model_card
from wrn_timm.cli import publish as publish_script
from wrn_timm.cli.train import read
from wrn_timm.hub import check_folder, publish
from wrn_timm.recipes import RECIPES
from wrn_timm.weights import list_weights, sha256_of, version_tag

RELEASED = sorted(p.name for p in (ROOT / 'weights').iterdir() if p.is_dir())
NAME = 'wrn16_1.cifar10'
WEIGHTS = ROOT / 'weights' / NAME
X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


def files_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def hashes(files):
    """For comparisons, whose failure pytest can then show."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()
            if name not in ('README.md', '.gitattributes')}


@pytest.fixture
def folder(tmp_path):
    """A copy of a released folder, to be spoilt."""
    return shutil.copytree(WEIGHTS, tmp_path / NAME)


@pytest.fixture
def load(no_weights, tmp_path):
    """Loads a repository by the name of its account into a cache of the test's own."""
    def load(hub_id=f'acme/{NAME}', cache='cache'):
        overlay = dict(hf_hub_id=hub_id)
        return timm.create_model(
            'wrn16_1', pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / cache).eval()
    return load


@pytest.fixture(scope='module')
def logits():
    """Of the released weights, as they lie in the checkout."""
    with torch.inference_mode():
        return timm.create_model(f'local-dir:{WEIGHTS}', pretrained=True).eval()(X)


@pytest.fixture(scope='module', autouse=True)
def unreachable(tmp_path_factory):
    """A process that asks a Hub where nobody listens. The client tries for 23 seconds, so it is started first."""
    code = 'import timm, wrn_timm; timm.create_model("wrn50_2", pretrained=True)'
    env = {**os.environ, 'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path_factory.mktemp('home'))}
    command = [sys.executable, '-c', code]
    with subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


OTHER_SIDE = '''
import json, sys
import numpy, timm, torch, wrn_timm
x = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
out = {}
with torch.inference_mode():
    for name in sys.argv[2:]:
        for way in (name, f"hf-hub:acme/{name}"):
            out[way] = timm.create_model(way, pretrained=True).eval()(x)
numpy.savez(sys.argv[1], **out)
'''


def test_publish_every_folder_and_load_on_a_machine_without_it(hub, tmp_path, capsys):
    assert publish_script.main(['--all', '--namespace', 'acme']) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RELEASED) == len(hub.repositories)
    for name in RELEASED:
        repository = hub.repositories[f'acme/{name}']
        there = repository.commits[repository.resolve('main')]
        assert hashes(there) == hashes(files_of(ROOT / 'weights' / name))
        assert f'create_model("hf-hub:acme/{name}", pretrained=True)' in there['README.md'].decode()
        tag = version_tag(sha256_of(ROOT / 'weights' / name / 'model.safetensors'))
        assert repository.tags == {tag: repository.resolve('main')}

    shutil.copytree(ROOT / 'wrn_timm', tmp_path / 'site' / 'wrn_timm')  # and no weights beside it
    env = {**os.environ, 'PYTHONPATH': str(tmp_path / 'site'), 'HF_HOME': str(tmp_path / 'home'), 'HF_TOKEN': '',
           'WRN_TIMM_HUB_NAMESPACE': 'acme'}
    done = subprocess.run([sys.executable, '-c', OTHER_SIDE, tmp_path / 'logits.npz', *RELEASED], env=env, cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / 'logits.npz') as found, torch.inference_mode():
        for name in RELEASED:
            expected = timm.create_model(name, pretrained=True).eval()(X).numpy()
            for way in (name, f'hf-hub:acme/{name}'):
                np.testing.assert_allclose(found[way], expected, atol=1e-5)


def test_another_model_of_the_same_name_is_not_replaced(hub, folder):
    first = publish(folder, 'acme')
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['label_names'] = ['bee', *config['pretrained_cfg']['label_names'][1:]]
    (folder / 'config.json').write_text(json.dumps(config))
    before = dict(hub.repositories[f'acme/{NAME}'].commits)
    with pytest.raises(ValueError, match=r'another model, which predicts airplane, .*; this one predicts bee, .*--tag'):
        publish(folder, 'acme')
    assert hub.repositories[f'acme/{NAME}'].commits == before and first.rpartition('/')[2] in before
    assert publish_script.main([str(folder), '--namespace', 'acme', '--tag', 'bees']) == 0
    card = hub.repositories['acme/wrn16_1.bees']
    assert b'hf-hub:acme/wrn16_1.bees' in card.commits[card.resolve('main')]['README.md']


@pytest.mark.parametrize('config, classes', [
    ({'architecture': 'resnet50', 'num_classes': 7, 'mean': [0., 0., 0.]}, '7 classes'),  # as timm once wrote it
    ({'model_type': 'resnet', 'id2label': {'0': 'ant', '1': 'bee'}}, 'unknown classes'),  # as transformers writes it
])
def test_models_of_other_libraries_are_not_replaced(hub, folder, tmp_path, config, classes):
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'model.safetensors').write_bytes(b'theirs')
    api = HfApi(endpoint=hub.url)
    api.create_repo(f'acme/{NAME}')
    api.upload_folder(repo_id=f'acme/{NAME}', folder_path=tmp_path, allow_patterns=['config.json', '*.safetensors'])
    with pytest.raises(ValueError, match=rf'holds another model, which predicts {classes}; this one predicts airplane'):
        publish(folder, 'acme')
    there = hub.repositories[f'acme/{NAME}']
    assert there.commits[there.resolve('main')]['model.safetensors'] == b'theirs'


def test_a_run_that_has_not_ended_is_not_taken_for_a_weights_folder(tmp_path):
    """Else its files would be named one by one, to be moved away."""
    (tmp_path / 'checkpoints').mkdir()
    with pytest.raises(FileNotFoundError, match='neither a weights folder nor a finished run'):
        check_folder(tmp_path)
    (tmp_path / 'seed-3').mkdir()
    with pytest.raises(FileNotFoundError, match=r'the runs of several seeds; give one of them, such as .*seed-3$'):
        check_folder(tmp_path)


def test_publishing_again_uploads_only_what_changed(hub, folder):
    first = publish(folder, 'acme')
    assert sum(method == 'PUT' for method, _ in hub.requests) == 3  # weights, golden logits, curves
    hub.requests.clear()
    assert publish(folder, 'acme') == first
    assert not [r for r in hub.requests if r[0] == 'PUT' or '/commit/' in r[1]]
    hub.requests.clear()
    card = folder / 'README.md'
    card.write_text(card.read_text().replace('## Limits', 'A word by the owner.\n\n## Limits'))
    hub.repositories[f'acme/{NAME}'].commits[first.rpartition('/')[2]]['example.jpg'] = b'of the owner'
    assert publish(folder, 'acme') != first
    assert not [r for r in hub.requests if r[0] == 'PUT']
    repository = hub.repositories[f'acme/{NAME}']
    there = repository.commits[repository.resolve('main')]
    assert b'A word by the owner.' in there['README.md'] and there['example.jpg'] == b'of the owner'
    assert list(repository.tags.values()) == [first.rpartition('/')[2]]  # the weights are the same


def refuse(handler):
    handler.fail(503)
    return True


def hang_up(handler):
    handler.close_connection = True
    return True


def once(fault):
    """A fault that happens the first time only."""
    left = [fault]
    return lambda handler: bool(left) and left.pop()(handler)


@pytest.mark.parametrize('where', ['/commit/', '/tag/'])
def test_a_publication_cut_off_goes_on(hub, folder, where):
    hub.faults[where] = once(hang_up)
    with pytest.raises(RuntimeError, match=f'acme/{NAME} is not published yet.* was interrupted: try again'):
        publish(folder, 'acme')
    hub.requests.clear()
    publish(folder, 'acme')
    assert not [r for r in hub.requests if r[0] == 'PUT']
    repository = hub.repositories[f'acme/{NAME}']
    assert len(repository.commits) == 2 and len(repository.tags) == 1


def test_other_bytes_read_back_are_refused(hub, folder):
    def other(handler):
        if handler.command == 'GET':
            handler.serve(b'x' * (folder / 'history.csv').stat().st_size, '0' * 40)
        return handler.command == 'GET'
    hub.faults['/history.csv'] = other
    with pytest.raises(RuntimeError, match='returned different bytes for history.csv'):
        publish(folder, 'acme')


def test_private_repository(hub, folder, load, logits, tmp_path, monkeypatch):
    publish(folder, 'acme', private=True)
    assert hub.repositories[f'acme/{NAME}'].private
    torch.testing.assert_close(load()(X), logits)
    monkeypatch.setenv('HF_TOKEN', '')
    with pytest.raises(RuntimeError, match=r'no access to it: .* log in with a token .*HF_TOKEN'):
        load(cache='another')
    monkeypatch.setenv('HF_TOKEN', hub.token)
    hub.repositories[f'acme/{NAME}'].private = False
    with pytest.raises(ValueError, match='already exists and is public'):
        publish(folder, 'acme', private=True)
    written = [p for root in (tmp_path, Path(HOME.name)) for p in root.rglob('*') if p.is_file()]
    assert written and not [p for p in written if hub.token.encode() in p.read_bytes()]


def test_refusals_name_what_to_do_and_never_the_token(hub, folder, tmp_path, capfd, monkeypatch):
    def error(*argv):
        assert publish_script.main([str(folder), *argv]) == 1
        out = ''.join(capfd.readouterr())
        assert token.partition('\x01')[0] not in out
        return out

    token = hub.token
    assert 'log in with a token' in error('--namespace', 'stranger')
    assert 'Repo id must' in error('--namespace', '../acme')
    token = 'hf_of_nobody'
    monkeypatch.setenv('HF_TOKEN', token)
    assert 'log in with a token' in error('--namespace', 'acme')
    monkeypatch.setenv('HF_TOKEN', token := 'hf_bad\x01token')  # which no header can hold
    assert 'is not published yet' in error('--namespace', 'acme')
    assert publish_script.main(['nowhere', '--namespace', 'acme']) == 1
    assert 'no weights folder at nowhere' in capfd.readouterr().err
    with pytest.raises(SystemExit):
        publish_script.main(['--namespace', 'acme'])
    assert hub.repositories == {} and hashes(files_of(folder)) == hashes(files_of(WEIGHTS))


def test_dry_run_shows_files_sizes_and_card_and_asks_nobody(hub, folder, capsys):
    assert publish_script.main([str(folder), '--namespace', 'acme', '--dry-run']) == 0
    out = capsys.readouterr().out
    assert '710,920  model.safetensors' in out and out.startswith(f'acme/{NAME}\n')
    assert f'create_model("hf-hub:acme/{NAME}"' in out and 'model-index:' in out
    assert hub.requests == []


def spoil_json(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def spoil_card(folder, old, new):
    (folder / 'README.md').write_text((folder / 'README.md').read_text().replace(old, new))


def spoil_golden(folder):
    with np.load(folder / 'golden.npz') as golden:
        np.savez(folder / 'golden.npz', images=golden['images'], logits=golden['logits'] + 0.01)


@pytest.mark.parametrize('spoil, message', [
    (lambda f: (f / 'pytorch_model.bin').write_bytes(b''), 'pytorch_model.bin is not part of a weights folder'),
    (lambda f: (f / 'notes').mkdir(), 'notes is not part of a weights folder'),
    (lambda f: (f / 'history.csv').write_bytes(bytes(5_000_001)), 'history.csv has 5,000,001 bytes; the limit is 5,0'),
    (lambda f: ((f / 'recipe.json').unlink(), (f / 'recipe.json').symlink_to('/etc/passwd')), 'recipe.json is a link'),
    (lambda f: (f / 'golden.npz').unlink(), r'golden.npz is missing: .*validate --write'),
    (lambda f: (f / 'golden.npz').write_bytes(b'x'), 'Error: '),
    (lambda f: (f / 'model.safetensors').write_bytes(b'x'), 'is damaged or is another file: sha256'),
    (lambda f: spoil_json(f, 'config.json', lambda c: c.pop('sha256')), 'config.json names no sha256'),
    (lambda f: (spoil_json(f, 'config.json', lambda c: c['pretrained_cfg'].pop('license')),
                spoil_card(f, 'license: apache-2.0', 'license:')), 'README.md names no licence: write yours'),
    (lambda f: spoil_json(f, 'config.json', lambda c: c.update(architecture='wrn16_2')), 'checkpoint is a WRN-16-1'),
    (lambda f: spoil_json(f, 'recipe.json', lambda c: c.pop('recipe')), 'converted weights of other authors'),
    (lambda f: spoil_json(f, 'metrics.json', lambda c: c.update(top1=99.9)), 'lacks the accuracy 99.9'),
    (spoil_golden, r'the logits differ by 0.01 from golden.npz; the limit is 0.001'),
    (lambda f: spoil_card(f, 'import wrn_timm\n', ''), 'lacks `import wrn_timm` as the first line of code'),
    (lambda f: spoil_card(f, '## Limits', ''), 'README.md lacks ## Limits'),
    (lambda f: spoil_card(f, 'license: apache-2.0', 'license: mit'), 'lacks the licence apache-2.0'),
    (lambda f: spoil_card(f, 'library_name: timm', 'library_name: [timm'), 'Error: '),
])
def test_a_folder_that_is_not_fit_is_not_published(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder)


@pytest.mark.parametrize('name', RELEASED)
def test_cards_are_up_to_date(name):
    folder = ROOT / 'weights' / name
    assert (folder / 'README.md').read_text() == model_card(folder)


def test_the_card_has_the_papers_figure_beside_ours(folder):
    spoil_json(folder, 'config.json', lambda c: c.update(architecture='wrn28_10'))
    spoil_json(folder, 'metrics.json', lambda m: m.update(top1=96.5))
    card = model_card(folder)
    assert '| these weights | 3.50 (40 epochs, one run) |' in card and '| the paper | 4.00 (table 5: ' in card
    spoil_json(folder, 'recipe.json', lambda r: r['recipe'].update(conv_drop_rate=0.3, tag='dropout_cifar10'))
    spoil_json(folder, 'config.json', lambda c: c['pretrained_cfg'].update(tag='dropout_cifar10'))
    assert '| the paper | 3.89 (table 6: dropout 0.3' in model_card(folder)
    spoil_json(folder, 'config.json', lambda c: c.update(architecture='wrn18_1_5'))
    card = model_card(folder)
    assert 'WRN-18-1.5 ([Wide' in card and '| the paper | no figure for this network |' in card


def test_the_command_of_the_card_gives_the_same_recipe(folder):
    recipe = dataclasses.replace(
        RECIPES['quick'], model='wrn40_2', lr=0.07, schedule='step', drop_epochs=(3, 5), flip=False, mixup=0.2)
    spoil_json(folder, 'recipe.json', lambda r: r.update(recipe=dataclasses.asdict(recipe), seed=3))
    command = re.search('```\nwrn-timm train --recipe (.*)\n```', model_card(folder))[1]
    name, *flags = command.partition(' --data DIR --out RUN --seed 3')[0].split()
    assert read(['--recipe', name, '--out', 'RUN', *flags])[1] == recipe


def test_list_weights_and_the_table_say_the_same(no_weights, monkeypatch):
    monkeypatch.setattr(weights_module, 'HUB_NAMESPACE', 'owner')
    table = (ROOT / 'weights' / 'README.md').read_text()
    far = {w.name: w for w in list_weights() if w.location.startswith('hf-hub:owner/')}
    assert sorted(far) == RELEASED
    monkeypatch.setenv('WRN_TIMM_WEIGHTS', str(ROOT / 'weights'))
    for near in list_weights():
        if near.name in far:
            row = next(line for line in table.splitlines() if f'[`{near.name}`]' in line)
            assert (near.size, near.sha256, near.top1, near.license) == (
                far[near.name].size, far[near.name].sha256, far[near.name].top1, far[near.name].license)
            for part in (f'**{100 - near.top1:.2f}**', f'{near.size / 1e6:.1f} MB', near.sha256[:12]):
                assert part in row
            assert far[near.name].location == f'hf-hub:owner/{near.name}@{version_tag(near.sha256)}'


def test_a_warm_cache_needs_no_network(hub, load, logits, tmp_path, offline):
    hub.commit(f'acme/{NAME}', files_of(WEIGHTS))
    load()
    hub.requests.clear()
    hub.faults['/'] = refuse
    torch.testing.assert_close(load()(X), logits)
    assert hub.requests == []
    by_repository = timm.create_model(f'hf-hub:acme/{NAME}', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    torch.testing.assert_close(by_repository(X), logits)
    offline()
    hub.requests.clear()
    for _ in range(2):
        torch.testing.assert_close(load()(X), logits)
    by_repository = timm.create_model(f'hf-hub:acme/{NAME}', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    torch.testing.assert_close(by_repository(X), logits)
    assert hub.requests == []
    with pytest.raises(RuntimeError, match='HF_HUB_OFFLINE is set and the file is not in the cache: unset it'):
        load(cache='cold')


def test_revisions(hub, load, logits):
    old = hub.commit(f'acme/{NAME}', files_of(WEIGHTS))
    hub.repositories[f'acme/{NAME}'].tags['v1'] = old
    hub.commit(f'acme/{NAME}', {'model.safetensors': b'of a later day'})
    for revision in ('v1', old):
        torch.testing.assert_close(load(f'acme/{NAME}@{revision}')(X), logits)
    with pytest.raises(RuntimeError, match='is damaged or is another file'):
        load()
    with pytest.raises(RuntimeError, match=f'acme/{NAME} has no revision v2: use one that it lists'):
        load(f'acme/{NAME}@v2')


def test_released_weights_are_pinned_whatever_the_account_has_become(hub, no_weights, tmp_path, monkeypatch, logits):
    """A thief of the account changes weights and configuration alike, and moves the tag."""
    monkeypatch.setattr(weights_module, 'HUB_NAMESPACE', 'owner')
    files = files_of(WEIGHTS)
    commit = hub.commit(f'owner/{NAME}', files)
    tag = version_tag(json.loads(files['config.json'])['sha256'])
    hub.repositories[f'owner/{NAME}'].tags[tag] = commit
    model = timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'a').eval()
    torch.testing.assert_close(model(X), logits)
    stolen = bytes(len(files['model.safetensors']))
    (tmp_path / 'model.safetensors').write_bytes(stolen)
    config = json.loads(files['config.json']) | {'sha256': sha256_of(tmp_path / 'model.safetensors')}
    commit = hub.commit(f'owner/{NAME}', {'model.safetensors': stolen, 'config.json': json.dumps(config).encode()})
    hub.repositories[f'owner/{NAME}'].tags[tag] = commit
    with pytest.raises(RuntimeError, match='but wrn_timm/released.json names'):
        timm.create_model(NAME, pretrained=True, cache_dir=tmp_path / 'b')
    with pytest.raises(RuntimeError, match='No weights for wrn52_1.cifar10: .* no Hub account is set'):
        timm.create_model('wrn52_1', pretrained=True)  # not released: no stranger's repository is asked for


def test_names_that_are_not_there(hub, load, monkeypatch):
    with pytest.raises(RuntimeError, match='There is no repository acme/nothing, or you have no access to it'):
        load('acme/nothing')
    hub.commit('acme/empty', {'config.json': b'{}'})
    with pytest.raises(RuntimeError, match='acme/empty does not have this file'):
        load('acme/empty')
    monkeypatch.setenv('WRN_TIMM_HUB_NAMESPACE', '../up')
    with pytest.raises(RuntimeError, match='Repository names have the form <account>/<architecture>.<tag>'):
        timm.create_model('wrn16_1', pretrained=True)


def test_wrong_hash_after_the_download_says_what_to_delete(hub, load, logits, tmp_path):
    files = files_of(WEIGHTS)
    hub.commit(f'acme/{NAME}', files | {'model.safetensors': files['model.safetensors'][:-1] + b'x'})
    for _ in range(2):
        with pytest.raises(RuntimeError, match='Delete .*models--acme--wrn16_1.cifar10 and load again') as e:
            load()
    hub.commit(f'acme/{NAME}', files)
    shutil.rmtree(str(e.value).partition('Delete ')[2].partition(' and load')[0])
    torch.testing.assert_close(load()(X), logits)


def test_a_repository_without_a_hash_is_held_to_the_one_the_hub_named(hub, load, logits, tmp_path):
    """As those that timm hosts: what is damaged in the cache is found."""
    hub.commit(f'acme/{NAME}', files_of(WEIGHTS) | {'config.json': b'{}'})
    torch.testing.assert_close(load()(X), logits)
    blob = next(p.resolve() for p in (tmp_path / 'cache').rglob('model.safetensors'))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(RuntimeError, match=f'but the Hub names {blob.name}. Delete'):
        load()


def cut_off(handler):
    handler.cut = 1000
    return False


def too_many(handler):
    handler.fail(429, Retry_After='0')
    return True


def broken(handler):
    handler.fail(501)  # unlike 500 and 503 not tried again, for 23 seconds
    return True


def no_hub(handler):
    handler.send(b'<html>Log in to the wireless network</html>')
    return True


def test_a_passing_fault_passes(hub, load, logits):
    """The newer clients wait and go on of themselves; with the older ones it is to be run again, as the error says."""
    hub.commit(f'acme/{NAME}', files_of(WEIGHTS))
    hub.faults['/storage/'] = once(cut_off)
    hub.faults['model.safetensors'] = once(too_many)
    for _ in range(3):
        try:
            model = load()
            break
        except RuntimeError as e:
            assert 'try again' in str(e)
    torch.testing.assert_close(model(X), logits)


def test_lasting_faults_say_what_to_do(hub, load, logits):
    """At once, because the client tries each several times."""
    faults = {
        'wait': (too_many, r'wait 0 seconds and try again'),
        'own': (broken, 'The Hub has an internal error: try again later'),
        'cut': (cut_off, 'The transfer was interrupted: try again'),
        'portal': (no_hub, f'The server at {hub.url} is not a Hub: correct'),
    }
    for account, (fault, _) in faults.items():
        hub.commit(f'{account}/{NAME}', files_of(WEIGHTS) | {'model.safetensors': account.encode() * 1000})
        hub.faults[f'/{account}/'] = fault
    hub.faults['/storage/'] = cut_off
    with ThreadPoolExecutor() as pool:
        runs = {account: pool.submit(load, f'{account}/{NAME}', account) for account in faults}
    for account, (_, message) in faults.items():
        with pytest.raises(RuntimeError, match=f'{account}/.* could not be downloaded from the Hub.*{message}'):
            runs[account].result()


def test_errors_of_another_endpoint_name_it(hub, folder, capsys):
    assert publish_script.main([str(folder), '--namespace', 'acme', '--endpoint', 'http://127.0.0.1:9']) == 1
    error = capsys.readouterr().err
    assert 'the address of the Hub is http://127.0.0.1:9 (--endpoint)' in error and hub.url not in error
    hub.faults['/'] = no_hub
    assert publish_script.main([str(folder), '--namespace', 'acme', '--endpoint', f'{hub.url}/']) == 1
    assert '$HF_ENDPOINT' not in capsys.readouterr().err


@pytest.fixture
def proxy(hub, monkeypatch):
    """The loopback server, as a proxy before itself."""
    monkeypatch.setenv('HTTP_PROXY', hub.url)
    forget_sessions()
    yield
    monkeypatch.undo()
    forget_sessions()


def test_a_proxy_that_refuses(hub, load, proxy):
    hub.faults['http://'] = lambda handler: handler.fail(407) or True
    with pytest.raises(RuntimeError, match=r'The proxy refuses access: correct \$HTTPS_PROXY'):
        load()
    assert hub.requests[0][1].startswith(f'{hub.url}/acme/')  # as proxies are asked


def test_a_hub_that_cannot_be_reached(unreachable):
    error = unreachable.communicate()[1]
    assert 'Check the network connection; the address of the Hub is http://127.0.0.1:9 ($HF_ENDPOINT)' in error
    assert 'Or put a folder called wrn50_2.racm_in1k with model.safetensors into the folder that $WRN_TIMM' in error
