"""The main job on real photographs, small: fine-tune, look, predict."""
import io
import json

import finetune as finetune_script
import predict as predict_script
import publish as publish_script
import pytest
import timm
import torch
import validate as validate_script
from conftest import SAMPLE
from PIL import Image

from wrn_timm.hub import check_golden
from wrn_timm.train.rundir import export_weights


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Untrained weights: these tests are of the path, not of the accuracy."""
    folder = tmp_path_factory.mktemp('weights') / 'wrn16_1.test'
    torch.manual_seed(0)
    export_weights(timm.create_model('wrn16_1'), folder, {'tag': 'test'})
    return str(folder)


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Three classes of twelve photographs."""
    root = tmp_path_factory.mktemp('photographs')
    for name in ('ketch', 'pizza', 'sunflower'):
        (root / name).mkdir()
        for p in sorted((SAMPLE / name).iterdir())[:12]:
            (root / name / p.name).write_bytes(p.read_bytes())
    return root


@pytest.fixture(scope='module')
def run(weights, photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'run'
    assert finetune_script.main([
        '--data', str(photographs), '--model', weights, '--out', str(out), '--device', 'cpu', '--input-size', '32',
        '--epochs', '12', '--batch-size', '8']) == 0
    return out


def test_run_directory(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['images'] == 12 and set(metrics['per_class']) == {'ketch', 'pizza', 'sunflower'}
    assert metrics['top1'] > 50  # chance is 33
    assert len((run / 'history.csv').read_text().splitlines()) == 13
    for name in ('curves.png', 'predictions.png'):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 200


def test_card_of_a_fine_tuned_run(run, photographs):
    folder = run / 'weights'
    assert validate_script.main(['--model', str(folder), '--data', f'folder:{photographs}', '--write']) == 0
    assert json.loads((folder / 'metrics.json').read_text())['split'] == 'all files'
    assert 'python scripts/finetune.py --model' in (folder / 'README.md').read_text()
    assert check_golden(folder) < 1e-5


def test_published_and_loaded_by_the_same_command_as_ours(run, hub, tmp_path, capsys):
    folder = run / 'weights'
    assert publish_script.main([str(folder), '--namespace', 'acme']) == 0
    name = f"acme/wrn16_1.{json.loads((folder / 'config.json').read_text())['pretrained_cfg']['tag']}"
    card = hub.repositories[name].commits[hub.repositories[name].resolve('main')]['README.md'].decode()
    assert f'create_model("hf-hub:{name}", pretrained=True)' in card
    assert '--input-size 32 --epochs 12 --batch-size 8 --data DIR --out RUN' in card
    model = timm.create_model(f'hf-hub:{name}', pretrained=True, cache_dir=tmp_path).eval()
    local = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), local(x))
    assert model.pretrained_cfg['label_names'] == ['ketch', 'pizza', 'sunflower']


def test_weights_are_a_weights_folder(run):
    model = timm.create_model(f'local-dir:{run / "weights"}', pretrained=True).eval()
    assert model.pretrained_cfg['label_names'] == ['ketch', 'pizza', 'sunflower']
    assert tuple(model.pretrained_cfg['input_size']) == (3, 32, 32) and model(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_predict_text_json_and_a_file_that_is_no_image(run, capsys, tmp_path):
    image = str(SAMPLE / 'pizza' / 'image_0020.jpg')
    assert predict_script.main(['--model', str(run / 'weights'), '--device', 'cpu', image]) == 0
    assert '%  ' in capsys.readouterr().out
    (tmp_path / 'x.jpg').write_text('no')
    assert predict_script.main(['--model', str(run / 'weights'), '--json', image, str(tmp_path / 'x.jpg')]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert sum(r['probability'] for r in good['top5']) == pytest.approx(1, abs=1e-4)
    assert bad['error'].endswith('x.jpg is not an image')


def test_the_same_seed_gives_the_same_run(weights, photographs, tmp_path):
    for name in ('a', 'b'):
        finetune_script.main(['--data', str(photographs), '--model', weights, '--out', str(tmp_path / name), '--device',
                              'cpu', '--input-size', '32', '--epochs', '1'])
    a, b = ((tmp_path / n / 'weights' / 'model.safetensors').read_bytes() for n in 'ab')
    assert a == b


def test_clear_errors(run, weights, photographs, tmp_path, capsys):
    def error(*argv):
        assert finetune_script.main(['--device', 'cpu', *map(str, argv)]) == 1
        return capsys.readouterr().err

    for bad in ('--epochs=0', '--label-smoothing=1', '--test-fraction=2'):
        assert 'it must be from' in error('--data', photographs, bad, '--out', tmp_path / 'run')
    message = error('--data', photographs, '--model', weights, '--out', run)
    assert 'already holds a run' in message and 'resume' not in message
    assert 'no weights folder at' in error('--data', photographs, '--model', 'no/where', '--out', tmp_path / 'run')
    assert 'already holds a run' in error('--data', photographs, '--model', weights, '--out', run)
    assert 'no folder at' in error('--data', tmp_path / 'nowhere', '--out', tmp_path / 'run')
    assert "wrn16_1 has no tag 'cifar'; nearest: cifar10" in error(
        '--data', photographs, '--model', 'wrn16_1.cifar', '--out', tmp_path / 'run1')
    assert not (tmp_path / 'run').exists()


def test_grey_palette_and_cmyk_photographs_train(photographs, weights, tmp_path):
    for i, mode in enumerate(('L', 'P', 'CMYK', 'RGBA')):
        for name, colour in (('red', (250, 0, 0)), ('blue', (0, 0, 250))):
            (tmp_path / 'data' / name).mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.new('RGB', (40, 30), colour).convert(mode).save(buffer, 'JPEG' if mode in ('L', 'CMYK') else 'PNG')
            (tmp_path / 'data' / name / f'{i}').write_bytes(buffer.getvalue())
    assert finetune_script.main(['--data', str(tmp_path / 'data'), '--model', weights, '--out', str(tmp_path / 'run'),
                                 '--device', 'cpu', '--input-size', '32', '--epochs', '1']) == 0
