"""Weights of bad will or bad luck: what is refused, by every way a weights folder can come."""
import hashlib
import json
import os
import random
import re

import pytest
import timm
import torch
from conftest import SAMPLE
from safetensors.torch import load_file, save_file

from wrn_timm.checkpoints import fit_to_model
from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import predict as predict_script
from wrn_timm.hub import publish
from wrn_timm.schemas import check_config
from wrn_timm.weights import HEADER_LIMIT, export_weights, open_model, verify
from wrn_timm.wrn import WideResNet

NAME = 'wrn16_1.cifar10'
WAYS = ('by name', 'local-dir', 'hf-hub')


@pytest.fixture
def folder(no_weights):
    """A sound weights folder, found by name."""
    export_weights(timm.create_model('wrn16_1'), no_weights / NAME, {'tag': 'cifar10'})
    return no_weights / NAME


@pytest.fixture
def load(folder, hub, tmp_path):
    def load(way):
        if way == 'hf-hub':
            hub.commit(f'acme/{NAME}', {p.name: p.read_bytes() for p in folder.iterdir()})
            return timm.create_model(f'hf-hub:acme/{NAME}', pretrained=True, cache_dir=tmp_path / 'cache')
        return timm.create_model(NAME if way == 'by name' else f'local-dir:{folder}', pretrained=True)
    return load


def change_config(folder, **changes):
    file = folder / 'config.json'
    config = json.loads(file.read_text())
    config['pretrained_cfg'] |= changes.pop('pretrained_cfg', {})
    file.write_text(json.dumps(config | changes))


def write(folder, data):
    """Put a weights file into a folder, with its hash: whoever made the one can make the other."""
    (folder / 'model.safetensors').write_bytes(data)
    change_config(folder, sha256=hashlib.sha256(data).hexdigest())


def split(data):
    length = int.from_bytes(data[:8], 'little')
    return data[8:8 + length], data[8 + length:]


def joined(header, body, length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(header) if length is None else length).to_bytes(8, 'little') + header + body


def duplicate(header, body):
    """A tensor named twice, at the same place: integers the second time."""
    first = b'"fc.bias":' + json.dumps(json.loads(header)['fc.bias']).encode()
    return joined(header.rstrip()[:-1] + b',' + first.replace(b'F32', b'I32') + b'}', body)


def without(header, body):
    """The last tensor left out, name and values."""
    tensors = json.loads(header)
    last = max((k for k in tensors if k != '__metadata__'), key=lambda k: tensors[k]['data_offsets'])
    start, _ = tensors.pop(last)['data_offsets']
    return joined(tensors, body[:start])


def other(**fields):
    def change(header, body):
        tensors = json.loads(header)
        tensors['layer1.0.conv1.weight'] |= fields
        return joined(tensors, body)
    return change


ATTACKS = {
    'shorter header than said': (lambda h, b: joined(h, b, len(h) + 50), 'is damaged'),
    'longer header than said': (lambda h, b: joined(h, b, len(h) - 50), 'is damaged'),
    'header of 8 EiB': (lambda h, b: joined(h, b, 2 ** 63), 'its header says it is 9,223,372,036,854,775,808 bytes'),
    'header over the limit': (lambda h, b: joined(h + b' ' * HEADER_LIMIT, b), 'the limit is 1,048,576'),
    'header of nothing but brackets': (lambda h, b: joined(b'[' * 500_000, b), 'is damaged'),
    'no header': (lambda h, b: b'', 'is damaged'),
    'tensor named twice': (duplicate, 'names a tensor, or a field of one, twice'),
    'tensor missing': (without, 'is not in the checkpoint'),
    'integers': (other(dtype='I32'), r'layer1.0.conv1.weight is torch.int32, not torch.float32'),
    'type of another size': (other(dtype='F64'), 'is damaged'),
    'transposed': (other(shape=[3, 3, 16, 16]), r'layer1.0.conv1.weight is \(3, 3, 16, 16\), not \(16, 16, 3, 3\)'),
    'overlapping': (other(data_offsets=[0, 16 * 16 * 9 * 4]), 'is damaged'),
}


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('attack', ATTACKS)
def test_a_file_that_lies_is_refused(load, folder, way, attack):
    spoil, message = ATTACKS[attack]
    write(folder, spoil(*split((folder / 'model.safetensors').read_bytes())))
    with pytest.raises(RuntimeError, match=message):
        load(way)


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """A malicious pickle's bytes and the folder that it would make; it is seen to work."""
    trace = tmp_path / 'trace'
    torch.save({'fc.bias': Evil(str(trace))}, tmp_path / 'evil.pth')
    torch.load(tmp_path / 'evil.pth', weights_only=False)
    trace.rmdir()
    return (tmp_path / 'evil.pth').read_bytes(), trace


@pytest.mark.parametrize('way', WAYS)
def test_a_pickle_is_not_read(load, folder, way, evil):
    data, trace = evil
    for name in ('pytorch_model.bin', 'model.pth'):
        (folder / name).write_bytes(data)
    load(way)  # by the safetensors file beside it
    write(folder, data)
    with pytest.raises(RuntimeError, match='is damaged'):
        load(way)
    (folder / 'model.safetensors').unlink()
    with pytest.raises((RuntimeError, FileNotFoundError), match='No weights for|holds no model.safetensors|is damaged'):
        load(way)
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file=str(folder / 'model.pth')))
    assert not trace.exists()


@pytest.mark.parametrize('way', ('local-dir', 'hf-hub'))
def test_a_configuration_cannot_point_elsewhere(load, folder, way, evil, tmp_path):
    data, trace = evil
    (tmp_path / 'evil.pth').write_bytes(data)
    (folder / 'pytorch_model.bin').write_bytes(data)
    change_config(folder, pretrained_cfg={
        'file': '../../evil.pth', 'hf_hub_filename': '../../pytorch_model.bin', 'tag': '../../evil',
        'url': str(tmp_path / 'evil.pth'), 'custom_load': 'hf'})
    loaded = load(way).state_dict()
    for key, value in load_file(folder / 'model.safetensors').items():
        torch.testing.assert_close(loaded[key], value)
    assert not trace.exists()


def test_paths_that_climb_out(load, folder, hub, evil, monkeypatch):
    with pytest.raises(RuntimeError, match="wrn16_1 has no tag '../../evil'"):
        timm.create_model('wrn16_1', pretrained=True, pretrained_cfg='../../evil')
    change_config(folder, pretrained_cfg={'tag': '../../evil'})
    with pytest.raises(ValueError, match='cannot be published'):
        publish(folder, 'acme')
    assert hub.requests == []


def tiny():
    torch.manual_seed(0)
    model = WideResNet(depth=10, width=1 / 16)
    model.pretrained_cfg = {'num_classes': 10}
    return model


def damaged(data, count):
    """`count` copies of a file with a flipped bit (half of them), cut, grown, or with bytes that are another's."""
    rng = random.Random(0)
    header = 8 + int.from_bytes(data[:8], 'little')
    for i in range(count):
        copy = bytearray(data)
        at = rng.randrange(header if i % 2 else len(data))  # half of the damage in the header
        size = rng.randrange(1, 65)
        kind = 0 if i % 4 < 2 else rng.randrange(1, 6)
        if kind == 0:
            copy[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del copy[at:]
        elif kind == 2:
            copy += rng.randbytes(size)
        elif kind == 3:
            copy[at:at + size] = bytes(len(copy[at:at + size]))
        elif kind == 4:
            copy[at:at + size] = rng.randbytes(len(copy[at:at + size]))
        else:
            copy[at:at] = rng.randbytes(size)
        if bytes(copy) != data:
            yield bytes(copy)


def test_2000_damaged_files(tmp_path):
    """With its hash each is refused. Without, a damaged value cannot be told from a true one; damage to the header can.

    Any error but those two is a crash, and fails the test.
    """
    model, file = tiny(), tmp_path / 'model.safetensors'
    save_file(model.state_dict(), file)
    whole, own = file.read_bytes(), model.state_dict()
    body, sha256 = split(whole)[1], hashlib.sha256(whole).hexdigest()
    assert verify(tmp_path, sha256) == file
    copies = list(damaged(whole, 2100))
    refused = refused_without = 0
    for data in copies:
        file.write_bytes(data)
        try:
            verify(tmp_path, sha256)
        except RuntimeError as e:
            assert 'is damaged or is another file: sha256' in str(e)
            refused += 1
        try:
            state_dict = fit_to_model(load_file(verify(tmp_path)), model)
            model.load_state_dict(state_dict)
        except RuntimeError:
            refused_without += 1
        else:
            assert not data.endswith(body) or all(torch.equal(state_dict[k], own[k]) for k in own)
    assert refused == len(copies) >= 2000
    assert len(copies) / 2 < refused_without < len(copies)


def test_damaged_configurations_do_no_harm(tmp_path):
    file = tmp_path / 'model.safetensors'
    save_file(tiny().state_dict(), file)
    text = json.dumps({'sha256': hashlib.sha256(file.read_bytes()).hexdigest(), 'num_classes': 10}).encode()
    for copy in damaged(len(text).to_bytes(8, 'little') + text, 200):
        (tmp_path / 'config.json').write_bytes(copy[8:])
        try:
            assert verify(tmp_path) == file
        except RuntimeError as e:
            assert 'is damaged' in str(e)


@pytest.fixture
def others(tmp_path):
    """A sound weights folder of a network that is not ours."""
    export_weights(timm.create_model('test_resnet', num_classes=2), tmp_path / 'test_resnet.mine', {'tag': 'mine'})
    return tmp_path / 'test_resnet.mine'


def flipped(file):
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def cut_without_a_hash(file):
    cut(file)
    config = json.loads((file.parent / 'config.json').read_text())
    del config['sha256']
    (file.parent / 'config.json').write_text(json.dumps(config))


def pickled(file):
    torch.save(load_file(file), file.with_name('pytorch_model.bin'))
    file.unlink()


@pytest.mark.parametrize(('spoil', 'message'), [
    (flipped, 'is damaged or is another file: sha256'), (cut, 'is damaged or is another file: sha256'),
    (cut_without_a_hash, 'model.safetensors is damaged: '),
    (pickled, 'holds no model.safetensors; pytorch_model.bin is a pickle, and pickles are not read')])
def test_weights_of_any_network_are_verified(others, no_weights, spoil, message, tmp_path, capsys):
    photograph = str(SAMPLE / 'ketch' / 'image_0001.jpg')
    assert predict_script.main(['--model', str(others), '--device', 'cpu', photograph]) == 0
    spoil(others / 'model.safetensors')
    finetune = ['--data', str(SAMPLE), '--out', str(tmp_path / 'run'), '--device', 'cpu', '--messages', 'quiet']
    for main, argv in ((predict_script.main, ['--device', 'cpu', photograph]), (finetune_script.main, finetune)):
        for name in (str(others), f'local-dir:{others}'):
            assert main(['--model', name, *argv]) == 1
            error = capsys.readouterr().err
            assert error.startswith('error: ') and message in error
    if spoil != pickled:  # found by its name, as ours are
        others.rename(no_weights / others.name)
        with pytest.raises(RuntimeError, match='is damaged'):
            open_model('test_resnet.mine')
    assert open_model(str(no_weights / others.name if spoil != pickled else others), pretrained=False).num_classes == 2


def test_the_pickle_is_rewritten_as_the_message_says(others, monkeypatch):
    whole = open_model(str(others)).state_dict()
    pickled(others / 'model.safetensors')
    with pytest.raises(FileNotFoundError) as refused:
        open_model(str(others))
    code = re.search(r'with (safetensors\.torch\.save_file\(.*\))$', str(refused.value))[1]
    monkeypatch.chdir(others)
    exec(f'import safetensors.torch, torch\n{code}')
    change_config(others, sha256=None)
    for key, value in open_model(str(others)).state_dict().items():
        torch.testing.assert_close(value, whole[key])


WRONG = ('x', -1, 1.5, [], {}, [1], ['a', 1], 10 ** 30, float('nan'), [[1]], '\x1b[2J')
CONFIGURATIONS = [  # (field, values that it cannot have, what it must be)
    ('architecture', (None, '', 'resnet', 0, ['wrn16_1'], '../wrn16_1', '\x1b[2J'), 'architecture'),
    ('num_classes', (None, *WRONG), 'num_classes is '),
    ('model_args', (None, 'x', 1, [], [1], True), 'model_args is .*; it must be an object'),
    ('pretrained_cfg', (None, 'x', 1, [], [1], True), 'pretrained_cfg is .*; it must be an object'),
    ('sha256', ('x', 1, [], 'A' * 64), 'sha256 is .*; it must be 64 hexadecimal digits'),
    ('label_names', ('x', 1, {'a': 1}, [1, 2], ['a'], ['a', 'b', 'c']), 'label_names is .*|it names . classes; its'),
    ('pretrained_cfg.input_size', (None, *WRONG, [3, 0, 32], [3, 32], [3, 10 ** 5, 10 ** 5]), 'input_size is '),
    ('pretrained_cfg.mean', ('x', 1, [float('nan')] * 3, ['a'] * 3, [0.5, 0.5]), 'mean (is|has)'),
    ('pretrained_cfg.std', ('x', 1, [0, 0, 0], [float('inf')] * 3, [1, 1]), 'std (is|has)'),
    ('pretrained_cfg.interpolation', ('x', 1, [1], {}), 'interpolation is .*; it must be nearest, bilinear'),
    ('pretrained_cfg.crop_pct', ('x', 0, -1, 1e-9, float('nan'), [1]), r'crop_pct is .* from 0\.1 to 2'),
    ('pretrained_cfg.fixed_input_size', ('x', 1), 'fixed_input_size is .*; it must be true or false'),
    ('pretrained_cfg.first_conv', (1, [1], {}), 'first_conv is .*; it must be a name or a list of names'),
    ('pretrained_cfg.label_offset', ('x', 1.5, []), 'label_offset is .*; it must be a whole number'),
    ('pretrained_cfg.state_dict', ({}, {'fc.bias': [1]}), 'state_dict is .*; it must be left out'),
    ('model_args.num_classes', (-1, 'x', 10 ** 30), 'model_args.num_classes is '),
    ('model_args.drop_rate', ('x', 2), 'model_args.drop_rate is '),
    ('model_args.features_only', (True,), 'features_only is True; it must be left out'),
    ('model_args.unknown', (1,), r'is not valid for \w+: TypeError: .*unknown'),
]


@pytest.mark.parametrize('architecture', ['wrn16_1', 'test_resnet'])
@pytest.mark.parametrize(('field', 'values', 'message'), CONFIGURATIONS, ids=[field for field, *_ in CONFIGURATIONS])
def test_configurations_of_ill_will(tmp_path, capsys, architecture, field, values, message):
    folder = tmp_path / 'folder'
    export_weights(timm.create_model(architecture, num_classes=2), folder, {'tag': 'x'})
    whole = json.loads((folder / 'config.json').read_text())
    *above, name = field.split('.')
    for value in values:
        config = json.loads(json.dumps(whole))
        (config[above[0]] if above else config)[name] = value
        (folder / 'config.json').write_text(json.dumps(config))
        assert predict_script.main(['--device', 'cpu', '--model', str(folder), 'x.jpg']) == 1
        out, error = capsys.readouterr()
        assert not out and error.startswith('error: ') and str(folder / 'config.json') in error
        assert re.search(message, error) and '\x1b' not in error, error
    (folder / 'config.json').write_text('{"sha256": "x"}')
    with pytest.raises(RuntimeError, match='its sha256 is'):
        open_model(str(folder))
    (folder / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='config.json names the architecture None; nearest: none'):
        open_model(str(folder))
    for name in (tmp_path, f'local-dir:{tmp_path}'):
        with pytest.raises(FileNotFoundError, match='neither a weights folder nor a finished run'):
            open_model(str(name))


def test_configurations_of_good_will(tmp_path):
    """What timm's own models say of themselves, and the form of before, with everything at the top."""
    for name in ('resnet18.a1_in1k', 'vit_base_patch16_clip_224.openai_ft_in12k_in1k', 'inception_v3.tv_in1k',
                 'levit_128s.fb_dist_in1k', 'convnext_tiny.in12k_ft_in1k_384', 'wrn16_1.cifar100', 'wrn50_2.racm_in1k'):
        cfg = json.loads(json.dumps(timm.get_pretrained_cfg(name).to_dict()))
        check_config({'architecture': name.partition('.')[0], 'num_classes': cfg['num_classes'], 'pretrained_cfg': cfg})
        check_config({'architecture': name.partition('.')[0], **cfg})
