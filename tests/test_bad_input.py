"""What goes wrong in fine-tuning, each case with a message that names it, no traceback and nothing lost."""
import json
import os
import re
import shutil
import sys

import processes
import pytest
import timm
from conftest import SAMPLE, files_of_at_most
from PIL import Image

from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import validate as validate_script
from wrn_timm.recipes import FinetuneConfig
from wrn_timm.train.finetune import _settings, finetune
from wrn_timm.train.machine import Machine
from wrn_timm.train.prepare import prepare_split
from wrn_timm.train.run import RunDir, check_place
from wrn_timm.weights import export_weights, open_model


@pytest.fixture
def data(tmp_path):
    """Two classes of eight photographs."""
    root = tmp_path / 'data'
    for name in ('ketch', 'pizza'):
        (root / name).mkdir(parents=True)
        for p in sorted((SAMPLE / name).iterdir())[:8]:
            shutil.copy(p, root / name)
    return root


def tune(data, weights, out, *argv):
    try:
        return finetune_script.main([
            '--data', str(data), '--model', str(weights), '--out', str(out), '--device', 'cpu', '--input-size', '32',
            '--epochs', '1', '--messages', 'quiet', *argv])
    except SystemExit as e:  # a wrong option
        return e.code


def class_of_the_test_part_alone(data):
    for name in ('ketch', 'pizza'):
        shutil.move(data / name, data / 'train' / name)
    shutil.copytree(data / 'train', data / 'test')
    shutil.copytree(SAMPLE / 'watch', data / 'test' / 'watch')


def one_image_in_a_class(data):
    (data / 'watch').mkdir()
    shutil.copy(SAMPLE / 'watch' / 'image_0001.jpg', data / 'watch')


def one_class(data):
    shutil.rmtree(data / 'ketch')


def no_images(data):
    for name in ('ketch', 'pizza'):
        for file in (data / name).iterdir():
            file.write_text('no image')


def csv_of_missing_files(data):
    (data / 'list.csv').write_text('path,label\n' + ''.join(f'gone{i}.jpg,{i % 2}\n' for i in range(9)))
    return data / 'list.csv'


def csv_without_labels(data):
    (data / 'list.csv').write_text('path\nketch/image_0001.jpg\n')
    return data / 'list.csv'


def csv_with_another_class_to_test_on(data):
    rows = [f'{name}/image_{i:04d}.jpg,{name},train' for name in ('ketch', 'pizza') for i in (1, 2)]
    (data / 'list.csv').write_text('\n'.join(['path,label,split', *rows, 'ketch/image_0003.jpg,watch,test\n']))
    return data / 'list.csv'


def a_file(data):
    return data / 'ketch' / 'image_0001.jpg'


def empty_folder(data):
    (data.parent / 'empty').mkdir()
    return data.parent / 'empty'


def a_folder_of_loose_images(data):
    loose = data.with_name('loose')
    loose.mkdir()
    for path in data.glob('*/*'):
        shutil.copy(path, loose / f'{path.parent.name}_{path.name}')
    return loose


def no_csv(data):
    return data.with_name('no.csv')


def nothing_there(data):
    return data / 'nowhere'


def no_caltech(data):
    return f'caltech101:{data}'


def as_it_is(data):
    return data


# what is seen to be wrong before anything is looked at
WRONG_OPTIONS = (
    "split 'half' is unknown; choose first30 or random30", 'epochs is 0; it must be at least 1',
    'label_smoothing is 1.0; it must be from 0 to 0.999', 'holdout is -1.0; it must be from 0 to 0.9',
    'stem imagenet needs an input_size', 'image_memory is nan; it must be at least 0',
    'time_budget is nan; it must be at least 0', 'lr is nan; it must be at least 1e-09',
    'opt nesterov is SGD with Nesterov momentum, so momentum 0 is not possible',
    'weight_decay is nan; it must be finite and at least 0', 'mixup is inf; it must be finite and at least 0',
    'color_jitter is -1; it must be finite and at least 0', 'patience needs held-out files',
    'seeds is 0; it must be at least 1', 'workers is -1; it must be at least 0')


@pytest.mark.parametrize(('prepare', 'argv', 'message'), [
    (class_of_the_test_part_alone, (), 'classes in test but not in train: watch; add images of them to train'),
    (one_image_in_a_class, (), 'classes with a single image cannot be split: watch'),
    (one_class, (), 'holds one class only (pizza); at least two are needed'),
    (no_images, (), 'classes without images in'),
    (csv_of_missing_files, (), 'gone0.jpg does not exist'),
    (csv_without_labels, (), 'has no column label; its first line must name'),
    (nothing_there, (), 'no folder at'),
    (no_caltech, (), 'no 101_ObjectCategories with the class folders'),
    (as_it_is, ('--split', 'random30'), '30 training files per class and at least one for testing need 31'),
    (as_it_is, ('--split', 'half'), "split 'half' is unknown; choose first30 or random30"),
    (as_it_is, ('--split', 'gone.csv'), 'gone.csv'),
    (as_it_is, ('--epochs', '0'), 'epochs is 0; it must be at least 1'),
    (as_it_is, ('--label-smoothing', '1'), 'label_smoothing is 1.0; it must be from 0 to 0.999'),
    (as_it_is, ('--holdout', '-1'), 'holdout is -1.0; it must be from 0 to 0.9'),
    (as_it_is, ('--stem', 'imagenet', '--input-size', '0'), 'stem imagenet needs an input_size'),
    (as_it_is, ('--image-memory', 'nan'), 'image_memory is nan; it must be at least 0'),
    (as_it_is, ('--time-budget', 'nan'), 'time_budget is nan; it must be at least 0'),
    (as_it_is, ('--lr', 'nan'), 'lr is nan; it must be at least 1e-09'),
    (as_it_is, ('--weight-decay', 'nan'), 'weight_decay is nan; it must be finite and at least 0'),
    (as_it_is, ('--momentum', '0'), 'opt nesterov is SGD with Nesterov momentum, so momentum 0 is not possible'),
    (as_it_is, ('--model', 'GREY'), 'the model takes images of 1 channel, but photographs have three'),
    (as_it_is, ('--mixup', 'inf'), 'mixup is inf; it must be finite and at least 0'),
    (as_it_is, ('--color-jitter', '-1'), 'color_jitter is -1; it must be finite and at least 0'),
    (as_it_is, ('--patience', '3', '--holdout', '0'), 'patience needs held-out files'),
    (as_it_is, ('--seeds', '0'), 'seeds is 0; it must be at least 1'),
    (as_it_is, ('--workers', '-1'), 'workers is -1; it must be at least 0'),
    (as_it_is, ('--auto-augment', 'foo'), "auto_augment 'foo' is not a timm policy"),
    (as_it_is, ('--model', 'no/where'), 'no weights folder at no/where'),
    (as_it_is, ('--model', 'wrn16_1.cifar'), "wrn16_1 has no tag 'cifar'; nearest: cifar10"),
    (as_it_is, ('--model', 'wrn16_l'), 'timm knows no model wrn16_l; nearest: wrn16_'),
    (as_it_is, ('--model', 'resnet18', '--no-pretrained', '--stem', 'imagenet'), 'resnet18 has no option stem'),
    (as_it_is, ('--model', 'vit_tiny_patch16_224', '--no-pretrained'), 'takes only images of 224 px'),
    (as_it_is, ('--device', 'tpu'), "device is 'tpu'; choose 'cpu'"),
    (a_file, (), 'no folder at'),
    (empty_folder, (), 'holds no class folders'),
    (a_folder_of_loose_images, (), 'put the images of each class into a folder of its own, or list them in a CSV'),
    (no_csv, (), 'no file at'),
    (csv_with_another_class_to_test_on, (), 'classes in test but not in train: watch'),
    (as_it_is, ('--resume',), 'holds no run to resume'),
    (as_it_is, ('--lr', '1e30', '--epochs', '2'), 'Try a smaller learning rate (--lr)'),
])
def test_what_cannot_be_trained(data, weights, tmp_path, capsys, prepare, argv, message):
    source = prepare(data) or data
    if 'GREY' in argv:
        export_weights(timm.create_model('wrn16_1', in_chans=1), tmp_path / 'grey', {'tag': 'grey'})
        argv = ('--model', str(tmp_path / 'grey'))
        capsys.readouterr()  # timm has warned of the mean
    assert tune(source, weights, tmp_path / 'run', *argv) == (2 if message in WRONG_OPTIONS else 1)
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error and 'Traceback' not in error
    if '1e30' not in argv:
        assert not (tmp_path / 'run').exists()


NOT_UTF8 = os.fsdecode(b'\xe9t\xe9')


def zero_bytes(data):
    (data / 'pizza' / 'empty.jpg').write_bytes(b'')
    return 'empty.jpg is not an image'


def cut_off(data):
    file = data / 'pizza' / 'image_0001.jpg'
    file.write_bytes(file.read_bytes()[:2000])
    return 'image_0001.jpg cannot be read: image file is truncated'


def too_large(data):
    Image.new('1', (20_000, 20_000)).save(data / 'pizza' / 'large.png')
    return 'large.png cannot be read: Image size (400000000 pixels) exceeds limit'


def a_line(data):
    Image.new('1', (400_000, 1)).save(data / 'pizza' / 'line.png')
    return 'line.png cannot be read: it is 400,000 x 1 pixels'


def looping_link(data):
    (data / 'pizza' / 'up').symlink_to(data, target_is_directory=True)
    return 'links to a folder that contains it'


def link_to_itself(data):
    (data / 'pizza' / 'self.jpg').symlink_to(data / 'pizza' / 'self.jpg')
    return 'self.jpg cannot be read'


def odd_names(data):
    for name in ('a b', 'comma, "quote"', "l'été 鳥", '<b>$x$', 'two\nlines'):
        shutil.copytree(SAMPLE / 'watch', data / name)
        (data / name / f'{name}.txt').write_text('no image')
    if sys.platform == 'linux':  # where names are bytes, and these are not UTF-8
        shutil.copytree(SAMPLE / 'watch', data / NOT_UTF8)
        shutil.copy(data / 'a b' / 'image_0001.jpg', data / 'a b' / os.fsdecode(b'\xe9.jpg'))
        (data / 'a b' / os.fsdecode(b'\xe9.txt')).write_text('no image')
    return '.txt is not an image'


LEFT_OUT = [zero_bytes, cut_off, too_large, a_line, looping_link, link_to_itself, odd_names]


@pytest.mark.parametrize('prepare', LEFT_OUT)
def test_what_is_left_out_and_named(data, prepare):
    message = prepare(data)
    _, found = prepare_split(FinetuneConfig(), data)
    assert any(message in reason for reason in found['bad'])
    assert any(line.startswith('left out, ') and message in line for line in found['summary'])
    if prepare != looping_link:
        with pytest.raises(ValueError, match='files? cannot be read'):
            prepare_split(FinetuneConfig(), data, Machine(on_bad='fail'))


def test_a_run_with_all_of_these(data, weights, tmp_path):
    messages = [prepare(data) for prepare in LEFT_OUT]
    assert tune(data, weights, tmp_path / 'run') == 0
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    for message in messages:
        assert any(message in reason for reason in metrics['skipped'])
    assert len(metrics['per_class']) == 7 + (sys.platform == 'linux')
    assert open_model(str(tmp_path / 'run' / 'best')).pretrained_cfg['label_names'] == sorted(metrics['per_class'])
    assert '&lt;b&gt;$x$' in (tmp_path / 'run' / 'report.html').read_text(encoding='utf-8')
    validating = ['--model', str(tmp_path / 'run'), '--data', f'folder:{data}', '--device', 'cpu']
    assert validate_script.main(validating) == 1  # as predict ends
    (tmp_path / 'run' / 'metrics.json').unlink()  # as killed while the report was written
    assert tune(data, weights, tmp_path / 'run', '--resume') == 0
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['per_class'] == metrics['per_class']


@pytest.mark.skipif(sys.platform != 'linux', reason='where names are bytes')
def test_safetensors_opens_no_path_that_is_not_utf8(data, weights, tmp_path, capsys):
    """Which is said before a run is begun there."""
    assert tune(data, weights, tmp_path / NOT_UTF8 / 'run') == 1
    error = capsys.readouterr().err
    assert r'\udce9t\udce9/run is not UTF-8, which safetensors cannot open; choose another --out' in error
    assert not (tmp_path / NOT_UTF8).exists()
    shutil.copytree(weights, tmp_path / NOT_UTF8)
    assert tune(data, tmp_path / NOT_UTF8, tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert 'which safetensors cannot open: rename it' in error and 'damaged' not in error


def test_a_run_that_is_there_is_left_as_it_is(data, weights, tmp_path, capsys):
    assert tune(data, weights, tmp_path / 'run') == 0
    before = (tmp_path / 'run' / 'metrics.json').read_bytes()
    assert tune(data, weights, tmp_path / 'run') == 1
    assert 'already holds a run; choose another --out, or continue with --resume' in capsys.readouterr().err
    assert tune(data, weights, tmp_path / 'run', '--resume', '--lr', '0.01') == 1
    assert 'was started with other settings (finetune.lr: was 0.05, now 0.01)' in capsys.readouterr().err
    assert (tmp_path / 'run' / 'metrics.json').read_bytes() == before


@pytest.mark.parametrize('on_bad', ['skip', 'fail'])
def test_files_removed_while_training_runs(data, weights, tmp_path, on_bad):
    removed = []

    def remove(row):
        if row['epoch'] == 1:
            for line in (tmp_path / 'run' / 'split.csv').read_text().splitlines():
                part, _, name = line.split(',')
                if part in ('train', 'test') and part not in [p for p, _ in removed]:
                    removed.append((part, str(data / name)))
                    os.remove(data / name)

    config = FinetuneConfig(model=weights, input_size=32, epochs=4, batch_size=4, holdout=0.1)
    if on_bad == 'fail':
        with pytest.raises(ValueError, match='does not exist'):
            finetune(config, data, tmp_path / 'run', Machine(image_memory=0, on_bad=on_bad), remove)
        assert list((tmp_path / 'run' / 'checkpoints').glob('epoch-*.pt'))
    else:
        metrics = finetune(config, data, tmp_path / 'run', Machine(image_memory=0, on_bad=on_bad), remove)
        assert metrics['skipped'] == [f'{path} does not exist' for _, path in removed] and metrics['images'] == 3


def test_what_a_run_needs_is_checked_before_the_data_is_read(weights, tmp_path, capsys):
    """Of data that is not there nothing is said: the place of the run comes first."""
    run = tmp_path / 'run'
    run.mkdir()
    (run / 'history.csv').write_text('epoch\n1\n')
    assert tune('nowhere', weights, run) == 1
    assert 'already holds a run' in capsys.readouterr().err
    (tmp_path / 'seeds' / 'seed-2').mkdir(parents=True)
    (tmp_path / 'seeds' / 'seed-2' / 'metrics.json').write_text('{}')
    assert tune('nowhere', weights, tmp_path / 'seeds', '--seeds', '3') == 1
    assert 'seed-2 already holds a run' in capsys.readouterr().err
    assert tune('nowhere', weights, '/proc/run') == 1
    assert '/proc/run cannot be written to' in capsys.readouterr().err
    with pytest.raises(OSError, match='take up to 1000000000000 MB, but only .* MB are free at'):
        check_place(tmp_path / 'new' / 'run', 10 ** 18)
    assert not (tmp_path / 'new').exists()


def test_a_download_that_fails_says_how_to_do_without(weights, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    assert tune(f'caltech101:{tmp_path}', weights, tmp_path / 'run', '--download') == 1
    error = capsys.readouterr().err
    assert 'failed: ' in error and 'caltech-101.zip elsewhere, unpack it' in error and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('text', 'message'), [
    ('{', 'scan.json is damaged: Expecting'), ('[]', 'it is not a JSON object'), ('\xff', 'scan.json is damaged: '),
    ('{"bad": "x"}', "its bad is 'x'; it must be a list of strings"), ('{"summary": [1]}', 'its summary is [1]'),
    ('{"leaks": [["a"]]}', "its leaks is [['a']]; it must be a list of pairs of paths"),
])
def test_a_run_whose_scan_is_damaged(data, weights, tmp_path, capsys, text, message):
    (tmp_path / 'run').mkdir()
    config = FinetuneConfig(model=weights, input_size=32, epochs=1)
    RunDir(tmp_path / 'run', _settings(config, str(data)))
    (tmp_path / 'run' / 'scan.json').write_text(text, encoding='latin-1')
    assert tune(data, weights, tmp_path / 'run', '--resume') == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and message in error


def test_no_place_to_write(data, weights, tmp_path, capsys):
    (tmp_path / 'file').write_text('')
    assert tune(data, weights, tmp_path / 'file' / 'run') == 1
    assert str(tmp_path / 'file') in capsys.readouterr().err


def test_disk_full_at_a_checkpoint(data, weights, tmp_path, capsys):
    """Files may not grow over 1 MB: the weights fit, the checkpoint with its momentum does not."""
    with files_of_at_most(1_000_000):
        assert tune(data, weights, tmp_path / 'run') == 1
    error = capsys.readouterr().err
    assert 'Traceback' not in error and 'cannot be written' in error and 'MB are free there' in error
    assert not list((tmp_path / 'run' / 'checkpoints').iterdir())
    assert tune(data, weights, tmp_path / 'run', '--resume') == 0
    open_model(str(tmp_path / 'run' / 'best'))


def tune_in_little_memory(data, out, *argv):
    """WRN-16-1 at 192 px takes some 37 MB an image in training, so that eight do not fit and four do."""
    return processes.run(
        'finetune', '--data', data, '--out', out, '--device', 'cpu', '--model', 'wrn16_1.cifar10', '--split', '50-50',
        '--input-size', '192', '--epochs', '1', '--holdout', '0', '--messages', 'quiet', '--precision', 'no', *argv,
        errors=f'{out}.errors', memory=250_000_000)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits the memory of a process as Linux does')
def test_out_of_memory_names_a_batch_size_that_fits(data, tmp_path):
    status, errors = tune_in_little_memory(data, tmp_path / 'run', '--batch-size', '8')
    assert status == 1 and 'Traceback' not in errors
    found = re.search('out of memory on cpu at batch size 8; '
                      'use --batch-size ([124]) --accumulate ([248]) for the same effect', errors)
    assert found, errors
    status, errors = tune_in_little_memory(
        data, tmp_path / 'again', '--batch-size', found[1], '--accumulate', found[2])
    assert status == 0, errors


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits the memory of a process as Linux does')
def test_a_batch_size_that_fits_is_found(data, tmp_path):
    """Through training, measuring and the report."""
    status, errors = tune_in_little_memory(data, tmp_path / 'run', '--batch-size', 'auto')
    assert status == 0, errors
    assert json.loads((tmp_path / 'run' / 'metrics.json').read_text())['images'] == 8
    assert (tmp_path / 'run' / 'report.html').is_file()
