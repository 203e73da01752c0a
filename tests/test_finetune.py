"""The main job on real photographs, small: fine-tune, look, predict."""
import contextlib
import copy
import csv
import dataclasses
import functools
import html.parser
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import ROOT, SAMPLE
from huggingface_hub import ModelCard
from PIL import Image
from processes import Command
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

import wrn_timm
from wrn_timm.card import check_golden, model_card
from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import predict as predict_script
from wrn_timm.cli import publish as publish_script
from wrn_timm.cli import validate as validate_script
from wrn_timm.data.folders import list_folder
from wrn_timm.data.images import ImageFiles, read_rgb
from wrn_timm.data.splits import Split, make_split
from wrn_timm.data.timm_sets import NamedImages
from wrn_timm.names import duration
from wrn_timm.recipes import FinetuneConfig
from wrn_timm.train import finetune as ft
from wrn_timm.train import finetune_loop, prepare
from wrn_timm.train.accelerator import RunAccelerator, make_accelerator
from wrn_timm.train.finetune_loop import BatchTooLarge, Finetuner, Fitted, _Unfreezing
from wrn_timm.train.linear import LinearFit, fit_linear, temperature
from wrn_timm.train.machine import Machine, fast_bfloat16
from wrn_timm.train.measure import Features, largest_batch, make_loader, predict, validate
from wrn_timm.train.probe import extract_features, knn, probe
from wrn_timm.train.report import grad_cam
from wrn_timm.train.run import RunControl, RunDir
from wrn_timm.train.transfer_results import read_transfer, record_transfer
from wrn_timm.weights import eval_transform, export_weights, open_model, sha256_of

CLASSES = ('ketch', 'pizza', 'sunflower')


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Three classes of twelve photographs."""
    root = tmp_path_factory.mktemp('photographs')
    for name in CLASSES:
        (root / name).mkdir()
        for p in sorted((SAMPLE / name).iterdir())[:12]:
            (root / name / p.name).write_bytes(p.read_bytes())
    return root


def tune(data, model, out, *argv):
    return finetune_script.main([
        '--data', str(data), '--model', str(model), '--out', str(out), '--device', 'cpu', '--input-size', '32',
        '--messages', 'quiet', *argv])


def weights_of(run, folder='last'):
    return sha256_of(run / folder / 'model.safetensors')


@pytest.fixture(scope='module')
def run(weights, photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'run'
    assert tune(photographs, weights, out, '--epochs', '10', '--batch-size', '8', '--holdout', '0.2') == 0
    return out


def test_run_directory(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['images'] == 12 and set(metrics['per_class']) == set(CLASSES)
    assert metrics['top1'] > 50  # chance is 33
    with open(run / 'history.csv') as f:
        history = list(csv.DictReader(f))
    assert len(history) == 10
    assert metrics['best_epoch'] == 10 and metrics['chosen_by'] == 'the end of the schedule'  # six files are held out
    assert weights_of(run, 'best') == weights_of(run)
    for name in ('curves.png', 'confusion.png', 'wrong.png', 'predictions.png'):
        with Image.open(run / name) as picture:
            assert min(picture.size) > 100
    with open(run / 'split.csv') as f:
        parts = [row['part'] for row in csv.DictReader(f)]
    assert {p: parts.count(p) for p in set(parts)} == {'train': 18, 'holdout': 6, 'test': 12}


def test_a_hundred_files_choose_the_epoch_and_fewer_do_not():
    history = [{'epoch': 1, 'holdout_accuracy': 60.}, {'epoch': 2, 'holdout_accuracy': 70.},
               {'epoch': 3, 'holdout_accuracy': 65.}]
    assert [Fitted(None, history, [], last=last).best_epoch() for last in (False, True)] == [2, 3]


@pytest.mark.parametrize('enough', [6, 7])
def test_the_epoch_is_chosen_where_enough_files_are_held_out(weights, photographs, tmp_path, monkeypatch, enough):
    """Six files are; where six are enough, the most accurate epoch is in `best/`, the last of a high rate is not it."""
    monkeypatch.setattr('wrn_timm.train.finetune_loop.ENOUGH_TO_CHOOSE', enough)
    assert tune(photographs, weights, tmp_path / 'run', '--epochs', '4', '--holdout', '0.2', '--lr', '0.3',
                '--schedule', 'step') == 0
    history = list(csv.DictReader((tmp_path / 'run' / 'history.csv').read_text().splitlines()))
    best = max(history, key=lambda row: (float(row['holdout_accuracy']), int(row['epoch'])))
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert metrics['best_epoch'] == (int(best['epoch']) if enough == 6 else 4)
    assert (weights_of(tmp_path / 'run', 'best') == weights_of(tmp_path / 'run')) == (metrics['best_epoch'] == 4)


def test_figures_are_those_of_the_best_weights_on_the_test_files(run, photographs):
    with open(run / 'split.csv') as f:
        test = [row for row in csv.DictReader(f) if row['part'] == 'test']
    model = timm.create_model(f'local-dir:{run / "best"}', pretrained=True).eval()
    assert tuple(model.pretrained_cfg['input_size']) == (3, 32, 32)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = model.pretrained_cfg['label_names']
    right = 0
    for row in test:
        with torch.no_grad():
            answer = model(transform(Image.open(photographs / row['path']).convert('RGB'))[None])[0].argmax()
        right += names[answer] == row['label']
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['top1'] == pytest.approx(100 * right / len(test), abs=1e-3)
    again = validate(str(run / 'best'), str(photographs), split=str(run / 'split.csv'))
    assert (again['top1'], again['ece'], again['images']) == (metrics['top1'], metrics['ece'], 12)
    assert (again['dataset'], again['split']) == (metrics['dataset'], 'split.csv')


def test_photographs_of_some_of_the_classes_are_measured(run, photographs, tmp_path):
    for name in ('sunflower', 'pizza'):
        shutil.copytree(photographs / name, tmp_path / name)
    some, every = (validate(str(run), f'folder:{folder}') for folder in (tmp_path, photographs))
    assert some['images'] == 24 and some['per_class'] == every['per_class'] | {'ketch': None}
    shutil.rmtree(tmp_path / 'pizza')
    one = validate(str(run), f'folder:{tmp_path}')
    assert one['per_class'] == {'ketch': None, 'pizza': None, 'sunflower': every['per_class']['sunflower']}


def test_a_test_part_that_lacks_a_class_and_labels_in_another_order_are_measured(run, photographs, tmp_path):
    rows = (run / 'split.csv').read_text().splitlines()
    (tmp_path / 'split.csv').write_text('\n'.join(r for r in rows if not r.startswith('test,pizza')))
    metrics = validate(str(run), str(photographs), split=str(tmp_path / 'split.csv'))
    assert metrics['per_class']['pizza'] is None and metrics['images'] == 8
    model = open_model(str(run))
    order = (2, 0, 1)
    with torch.no_grad():
        for parameter in model.fc.parameters():
            parameter.copy_(parameter[list(order)])
    export_weights(model, tmp_path / 'x', {'label_names': [CLASSES[i] for i in order], 'tag': 'x'})
    again = validate(str(tmp_path / 'x'), str(photographs))
    assert again['per_class'] == validate(str(run), str(photographs))['per_class']


def test_files_of_a_given_split_are_examined(run, photographs, tmp_path, capsys):
    data, given = shutil.copytree(photographs, tmp_path / 'data'), tmp_path / 'split.csv'
    rows = [r.split(',') for r in (run / 'split.csv').read_text().splitlines()[1:]]
    first = {part: next(path for p, _, path in reversed(rows) if p == part) for part in ('train', 'test')}
    shutil.copy(data / first['train'], data / first['test'])
    given.write_text('\n'.join(','.join(r) for r in [('part', 'label', 'path'), *rows]))
    config = FinetuneConfig(split=str(given))
    split, found = prepare.prepare_split(config, data)
    assert found['leaks'] == [(str(data / first['train']), str(data / first['test']))] and found['side'] > 100
    assert (len(split.train), len(split.holdout), len(split.test), found['split']) == (18, 6, 12, 'split.csv')
    (data / first['test']).write_bytes(b'')
    split, found = prepare.prepare_split(config, data)
    assert len(split.test) == 11 and len(found['bad']) == 1
    with pytest.raises(ValueError, match='is not an image'):
        prepare.prepare_split(config, data, Machine(on_bad='fail'))


def test_settings_that_a_given_split_leaves_without_effect(run, photographs, tmp_path, caplog):
    given = tmp_path / 'split.csv'
    given.write_text(re.sub('(?m)^holdout', 'train', (run / 'split.csv').read_text()))
    with pytest.raises(ValueError, match='patience needs held-out files, and .*split.csv has none'):
        prepare.prepare_split(FinetuneConfig(split=str(given), patience=3), photographs)
    split, _ = prepare.prepare_split(FinetuneConfig(split=str(given), holdout=0.2), photographs)
    assert split.holdout is None and '--holdout has no effect' in caplog.text
    caplog.clear()
    for part in ('train', 'val', 'test'):
        shutil.copytree(photographs, tmp_path / 'parts' / part)
    split, _ = prepare.prepare_split(FinetuneConfig(split='random5', holdout=0.2), tmp_path / 'parts')
    assert len(split.train) == len(split.holdout) == len(split.test)
    assert '--holdout has no effect: the held-out files are given by the part val' in caplog.text
    assert '--split has no effect: ' in caplog.text


@pytest.mark.parametrize(('setting', 'message'), [
    ({'train': 'heads'}, "train 'heads' is unknown; choose 'all', 'gradual' or 'head'"),
    ({'schedule': 'linear'}, "schedule 'linear' is unknown; choose 'cosine' or 'step'"),
    ({'precision': 'float16'}, "precision 'float16' is unknown"),
    ({'num_classes': -1}, 'num_classes is -1; it must be at least 0'),
])
def test_settings_that_are_none(setting, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**setting)


def test_what_weights_cannot_be_ranked_on(run, weights, photographs, tmp_path, capsys):
    args = ['--out', str(tmp_path / 'p'), '--device', 'cpu', '--probe', str(weights)]
    assert finetune_script.main([*args, '--data', str(photographs), '--split', str(run / 'split.csv')]) == 1
    assert 'give a protocol (random30, 80-20...) in place of' in capsys.readouterr().err
    assert finetune_script.main([*args, '--data', 'hfds/a/b']) == 1
    assert 'hfds/a/b is a named data set' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        finetune_script.main(['--data', str(photographs), '--probe'])
    assert 'expected at least one argument' in capsys.readouterr().err


@pytest.fixture
def no_tf32():
    """As a notebook may have said it, which makes reading torch's older setting an error."""
    conv = getattr(torch.backends.cudnn, 'conv', None)
    before = getattr(conv, 'fp32_precision', None)
    if conv:
        conv.fp32_precision = 'ieee'
    yield
    if conv:
        conv.fp32_precision = before


def test_a_run_leaves_the_process_of_its_caller_as_it_was(weights, photographs, tmp_path, no_tf32):
    """Random numbers, an Accelerator's accumulation and TensorFloat-32."""
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    before = GradientState().plugin_kwargs
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    config = FinetuneConfig(model=Path(weights), epochs=1, seed=np.int64(3))
    metrics = wrn_timm.finetune(config, photographs, tmp_path / 'run', Machine('cpu', progress=False))
    assert metrics['images'] and [random.random(), np.random.rand(), torch.rand(1).item()] == expected
    assert own.gradient_accumulation_steps == 4 and GradientState().plugin_kwargs == before
    if hasattr(torch.backends.cudnn, 'conv'):
        assert torch.backends.cudnn.conv.fp32_precision == 'ieee'
    GradientState().plugin_kwargs = {}


def test_a_run_within_its_photographs_is_refused(weights, photographs, capsys):
    assert tune(photographs, weights, photographs / 'run') == 1
    assert 'would read its plots as photographs; choose an --out outside it' in capsys.readouterr().err
    assert not (photographs / 'run').exists()


class _Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.text = [], [], ''
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'img', 'br', 'link'):
            self.open.append(tag)
        self.sources += [value for key, value in attrs if key in ('src', 'href')]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_report_is_one_whole_file(run):
    page = _Page((run / 'report.html').read_text())
    assert not page.open and 3 <= len(page.sources) <= 4
    assert all(source.startswith('data:image/png;base64,') for source in page.sources)
    metrics = json.loads((run / 'metrics.json').read_text())
    assert f"accuracy {metrics['top1']:.1f} % on 12 test files" in page.text and all(c in page.text for c in CLASSES)


def test_card_of_a_fine_tuned_run(run, photographs, tmp_path, capsys):
    """Measured on other photographs than those it was trained on, which it must not be taken for."""
    folder = tmp_path / 'best'
    shutil.copytree(run / 'best', folder)
    own, other = tmp_path / photographs.name, tmp_path / 'field_test'
    for data in (own, other):
        shutil.copytree(photographs, data)
    before = (folder / 'metrics.json').read_bytes()
    assert validate_script.main(['--model', str(folder), '--data', f'folder:{own}', '--write']) == 1
    out, error = capsys.readouterr()
    assert json.loads(out)['images'] == 36 and 'give the --split of its run, or other photographs' in error
    assert (folder / 'metrics.json').read_bytes() == before
    assert validate_script.main(['--model', str(folder), '--data', f'folder:{other}', '--write']) == 0
    assert json.loads((folder / 'metrics.json').read_text())['split'] == 'all files'
    card = (folder / 'README.md').read_text()
    assert 'wrn-timm finetune --model' in card
    assert f'on {own.name}, for [timm]' in card and f'3 classes of {own.name} only' in card
    assert 'images of field_test (all files)' in card
    assert 'weights of the last epoch' in card
    assert check_golden(folder) < 1e-5


def test_the_card_says_what_was_used_and_claims_nothing_of_others(run):
    card = (run / 'best' / 'README.md').read_text()
    table = dict(re.findall(r'^\| (\w+) \| (.*) \|$', card, flags=re.M))
    assert {k: table[k] for k in ('lr', 'input_size', 'batch_size', 'split', 'holdout', 'precision', 'model')} == {
        'lr': '0.05', 'input_size': '32', 'batch_size': '8', 'split': '70-30', 'holdout': '6 files',
        'precision': 'bf16' if fast_bfloat16('cpu') else 'float32', 'model': 'wrn16_1.test'}
    assert not {'mixup', 'ema_decay', 'stem', 'num_classes', 'parts', 'cache'} & set(table)
    with open(run / 'history.csv') as f:
        rates = [float(row['images_per_second']) for row in csv.DictReader(f)]
    rate = len(rates) / sum(1 / r for r in rates)
    assert f' at {rate:.0f} images/s (over all epochs' in card
    assert ModelCard(card).data.license is None and '\nlicense:  # for the owner to fill in' in card
    cfg = json.loads((run / 'best' / 'config.json').read_text())['pretrained_cfg']
    assert cfg['license'] is None and cfg['origin_url'] is None


def test_settings_without_effect_are_not_told():
    head = FinetuneConfig(train='head', lr=1.).used()
    assert head['train'] == 'head' and not {'lr', 'epochs', 'batch_size', 'opt', 'augment', 'mixup'} & set(head)
    plain = FinetuneConfig(augment=False, mixup=0.2, pretrained=False, seed=0).used()
    assert (plain['augment'], plain['pretrained'], plain['seed'], plain['mixup']) == (False, False, 0, 0.2)
    assert not {'min_scale', 'color_jitter', 'cutmix', 'patience'} & set(plain)


def test_the_card_of_another_network_cites_no_wide_residual_network(photographs, tmp_path):
    torch.manual_seed(0)
    export_weights(timm.create_model('test_resnet', num_classes=3), tmp_path / 'weights', {'tag': 'x'})
    assert tune(photographs, tmp_path / 'weights', tmp_path / 'cifar10', '--train', 'head') == 0
    card = (tmp_path / 'cifar10' / 'best' / 'README.md').read_text()
    assert not re.search('wide.residual', card, flags=re.I) and 'The paper of `test_resnet.x`' in card


def test_a_folder_called_as_a_known_set_is_not_taken_for_it(run, tmp_path):
    folder = shutil.copytree(run / 'best', tmp_path / 'best')
    metrics = json.loads((folder / 'metrics.json').read_text()) | {'dataset': 'cifar10'}
    card = model_card(folder, metrics)
    assert ModelCard(card).data.datasets is None and 'CIFAR-10' not in card and 'Tiny Images' not in card


def test_a_folder_without_its_recipe_is_not_finished(run, photographs, tmp_path, capsys):
    shutil.copytree(run / 'best', tmp_path / 'best')
    (tmp_path / 'best' / 'recipe.json').unlink()
    assert validate_script.main(['--model', str(tmp_path / 'best'), '--data', 'nowhere', '--write']) == 1
    assert 'best holds no recipe.json: only folders that wrn-timm train or finetune wrote' in capsys.readouterr().err


def test_published_and_loaded_by_the_same_command_as_ours(run, hub, tmp_path, capsys):
    folder = shutil.copytree(run / 'best', tmp_path / 'best')
    assert publish_script.main([str(folder), '--namespace', 'acme']) == 1
    assert 'README.md names no licence: write yours after "license:" in its first lines' in capsys.readouterr().err
    card = (folder / 'README.md').read_text()
    (folder / 'README.md').write_text(card.replace('license: ', 'license: cc-by-4.0', 1))
    assert ModelCard(model_card(folder)).data.license == 'cc-by-4.0'  # a card that is made anew keeps it
    assert publish_script.main([str(folder), '--namespace', 'acme']) == 0
    name = f"acme/wrn16_1.{json.loads((folder / 'config.json').read_text())['pretrained_cfg']['tag']}"
    card = hub.repositories[name].commits[hub.repositories[name].resolve('main')]['README.md'].decode()
    assert f'create_model("hf-hub:{name}", pretrained=True)' in card
    flags = re.search('```\nwrn-timm finetune (.*)\n```', card)[1]
    config = dataclasses.asdict(finetune_script.read(shlex.split(flags))[1])
    assert json.loads(json.dumps(config)) == json.loads((folder / 'recipe.json').read_text())['finetune']
    model = timm.create_model(f'hf-hub:{name}', pretrained=True, cache_dir=tmp_path).eval()
    local = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), local(x))
    assert model.pretrained_cfg['label_names'] == ['ketch', 'pizza', 'sunflower']


def test_photographs_far_larger_than_the_input_are_told_of(weights, tmp_path, caplog):
    """With the multiply-adds of the table of models: WRN-18-1 at 224 px 1.81 G, WRN-16-1 at 32 px 0.03 G."""
    model = timm.create_model('wrn16_1')
    advice = prepare.size_advice(model, 32, 2592)
    assert '2592 px' in advice and '--input-size 128: it takes up to 16 times' in advice
    assert '--model wrn18_1.a1_in1k' in advice
    assert int(re.search(r'224 px\) takes (\d+) times', advice)[1]) == pytest.approx(1.81 / 0.0273, rel=0.1)
    assert not prepare.size_advice(model, 32, 255) and not prepare.size_advice(model, 32, 0)
    assert '--model' not in prepare.size_advice(timm.create_model('wrn18_1', device='meta'), 224, 2592)
    for name in CLASSES:
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((300, 280), 50 + i).save(tmp_path / 'data' / name / f'{i}.jpg')
    caplog.set_level('WARNING')
    ft.finetune(FinetuneConfig(model=weights, train='head'), tmp_path / 'data', tmp_path / 'run')
    assert 'have 280 px or more on their shorter side, and the network sees 32' in caplog.text


def test_what_is_about_to_happen_and_how_long_it_takes_is_said(weights, photographs, tmp_path, caplog):
    caplog.set_level('INFO')
    ft.finetune(FinetuneConfig(model=weights, epochs=4, batch_size=3, holdout=0.1), photographs, tmp_path / 'run',
                Machine(progress=False))
    text = caplog.text
    assert 'wrn16_1.test at 32 px on cpu: 4 epochs, batch size 3' in text
    assert 'only 3 files are held out, too few to choose the best epoch (each is 33.3 points)' in text
    assert text.index('4 epochs, batch size 3') < text.index(' of training to go') < text.index('epoch  1/4')
    assert text.count('to go') == 1


def test_time_is_told_as_people_say_it():
    assert [duration(s) for s in (1, 3, 89, 90, 5399, 5400, 36000)] == [
        '1 second', '3 seconds', '89 seconds', '2 minutes', '90 minutes', '1.5 hours', '10.0 hours']


def test_help_shows_every_option_by_purpose_twelve_first(capsys):
    with pytest.raises(SystemExit) as done:
        finetune_script.main(['--help'])
    assert done.value.code == 0
    text = capsys.readouterr().out
    shown = re.findall(r'^  --([a-z-]+)', text, flags=re.M)
    fields = {f.name.replace('_', '-') for c in (finetune_script.FinetuneOptions, FinetuneConfig)
              for f in dataclasses.fields(c)}
    assert len(shown) == len(set(shown)) and set(shown) == fields
    assert len(finetune_script.PURPOSES['Main options']) == 12
    assert text.index('Main options:') < text.index('--input-size') < text.index('Optimisation:') < text.index('--mom')
    text = ' '.join(text.split())
    assert 'Peak learning rate of the last layers. (default: 0.05)' in text and str(ROOT) not in text


def test_predict_in_python_says_what_the_command_says(run, capsys):
    images = [SAMPLE / 'pizza' / f'image_00{i}.jpg' for i in ('20', '04')]
    assert predict_script.main(['--model', str(run), '--device', 'cpu', '--json', *map(str, images), 'gone.jpg']) == 1
    expected = json.loads(capsys.readouterr().out)
    found = wrn_timm.predict(run, [*images, 'gone.jpg'], device='cpu')
    assert [p.image for p in found] == [*map(str, images), 'gone.jpg']
    for photo, row in zip(found[:2], expected, strict=False):
        assert [{'label': label, 'probability': p} for label, p in photo.top] == row['top'] and not photo.error
        assert (photo.label, photo.probability) == photo.top[0]
    assert (found[2].label, found[2].probability, found[2].error) == (None, None, 'gone.jpg does not exist')
    one, = wrn_timm.predict(run, str(images[0]), top_k=1, device='cpu')
    assert one.top == found[0].top[:1]
    with pytest.raises(ValueError, match='top_k is 0; it must be at least 1'):
        wrn_timm.predict(run, images, top_k=0)
    with pytest.raises(ValueError, match='batch_size is 0; it must be at least 1'):
        wrn_timm.predict(run, images, batch_size=0)


def test_predict_names_imagenets_classes_and_needs_a_classifier(no_weights):
    model = timm.create_model('wrn18_1')
    model.fc.weight.data.zero_()
    model.fc.bias.data[285] = 9
    export_weights(model, no_weights / 'wrn18_1.a1_in1k', {'tag': 'a1_in1k'})
    image = SAMPLE / 'pizza' / 'image_0020.jpg'
    photo, = wrn_timm.predict(no_weights / 'wrn18_1.a1_in1k', image, device='cpu')
    assert photo.label == 'Egyptian cat'
    export_weights(model, no_weights / 'wrn18_1.mine', {'tag': 'mine'})  # a thousand classes of another kind
    photo, = wrn_timm.predict(no_weights / 'wrn18_1.mine', image, device='cpu')
    assert photo.label == '285'
    export_weights(timm.create_model('wrn16_1', num_classes=0), no_weights / 'headless', {'tag': 'x'})
    with pytest.raises(ValueError, match='headless has no classifier'):
        wrn_timm.predict(no_weights / 'headless', image, device='cpu')


def test_predict_csv_with_several_answers_and_without_a_model(run, capsys):
    images = [str(SAMPLE / 'pizza' / f'image_00{i}.jpg') for i in ('20', '04')]
    options = ['--device', 'cpu', '--csv', '--top-k', '2']
    assert predict_script.main(['--model', str(run), *options, *images, 'gone.jpg']) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ['image', 'label', 'probability', 'label_2', 'probability_2', 'error']
    for row in rows[:2]:
        assert {row['label'], row['label_2']} < set(CLASSES) and not row['error']
        assert float(row['probability']) >= float(row['probability_2'])
    assert rows[2]['error'] == 'gone.jpg does not exist' and not rows[2]['label_2']
    assert predict_script.main([images[0], *options, images[1]]) == 0  # on both sides of the options
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert predict_script.main([*options, images[0]]) == 0
    answer = capsys.readouterr()
    assert 'no --model is given: using wrn16_1.cifar10, which knows only airplane, ' in answer.err
    assert len(answer.out.splitlines()) == 2


def test_predict_files_folders_and_lists(run, capsys, tmp_path, monkeypatch):
    image = str(SAMPLE / 'pizza' / 'image_0020.jpg')
    model = ['--model', str(run / 'best'), '--device', 'cpu']
    assert predict_script.main(['--model', str(run), '--device', 'cpu', '--top-k', '1', image]) == 0  # its best/
    assert capsys.readouterr().out.count('%  ') == 1
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'list.csv').write_text('no image, and not called one')
    assert predict_script.main([*model, str(tmp_path / 'notes')]) == 1
    assert 'notes holds no images' in capsys.readouterr().err
    (tmp_path / 'a, "b" é.jpg').write_text('no')
    (tmp_path / 'deep').mkdir()
    for i in range(5):
        shutil.copy(SAMPLE / 'ketch' / f'image_{i + 1:04d}.jpg', tmp_path / 'deep' / f'{i}.jpg')
    assert predict_script.main([*model, '--json', '--batch-size', '2', image, str(tmp_path), 'gone.jpg']) == 1
    results = json.loads(capsys.readouterr().out)
    assert [os.path.basename(r['image']) for r in results] == [
        'image_0020.jpg', 'a, "b" é.jpg', '0.jpg', '1.jpg', '2.jpg', '3.jpg', '4.jpg', 'gone.jpg']
    assert results[1]['error'].endswith('é.jpg is not an image') and results[-1]['error'] == 'gone.jpg does not exist'
    for result in results[2:-1]:
        assert sum(r['probability'] for r in result['top']) == pytest.approx(1, abs=1e-4)
    monkeypatch.setattr('sys.stdin', io.StringIO(''.join(r['image'] + '\r\n' for r in results)))
    assert predict_script.main([*model, '--csv', '-']) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [r['image'] for r in rows] == [r['image'] for r in results]
    for row, result in zip(rows, results, strict=True):
        if row['error']:
            assert row['error'] == result['error'] and not row['label']
        else:
            assert row['label'] == result['top'][0]['label']
            assert float(row['probability']) == pytest.approx(result['top'][0]['probability'], abs=1e-4)


def test_photographs_are_not_mirrored_without_flip():
    left = Image.new('RGB', (32, 32))
    left.paste((255, 255, 255), (0, 0, 16, 32))
    model = timm.create_model('wrn16_1')
    for flip in (True, False):
        config = FinetuneConfig(flip=flip, min_scale=0.9, color_jitter=0.)
        train = prepare.preprocessing(config, model, 'x', ('a', 'b'))[0]['train']
        brighter_left = [bool(x[..., :8].mean() > x[..., -8:].mean()) for x in (train(left) for _ in range(20))]
        assert any(brighter_left) and all(brighter_left) != flip


def test_a_run_resumed_at_an_epoch_ends_as_one_that_was_not_stopped(weights, photographs, tmp_path):
    options = ('--epochs', '3', '--ema-decay', '0.9', '--auto-augment', 'rand-m9-mstd0.5', '--mixup', '0.2', '--cutmix',
               '1', '--random-erase', '0.25', '--class-weights', '--accumulate', '2', '--train', 'gradual')
    assert tune(photographs, weights, tmp_path / 'whole', *options) == 0
    assert tune(photographs, weights, tmp_path / 'parts', *options, '--time-budget', '0') == 0
    assert json.loads((tmp_path / 'parts' / 'metrics.json').read_text())['stopped'] == 'the time budget'
    begun = (tmp_path / 'parts' / 'history.csv').read_text()
    assert len(begun.splitlines()) == 2
    assert tune(photographs, weights, tmp_path / 'parts', *options, '--resume') == 0
    assert (tmp_path / 'parts' / 'history.csv').read_text().startswith(begun)  # its seconds too: not trained anew
    seconds = json.loads((tmp_path / 'parts' / 'metrics.json').read_text())['train_seconds']
    assert tune(photographs, weights, tmp_path / 'parts', *options, '--resume') == 0  # which has nothing left to do
    again = json.loads((tmp_path / 'parts' / 'metrics.json').read_text())
    *_, last = csv.DictReader((tmp_path / 'parts' / 'history.csv').read_text().splitlines())
    assert float(last['seconds']) <= min(seconds, again['train_seconds']) + 0.1  # of both sessions
    assert weights_of(tmp_path / 'whole') == weights_of(tmp_path / 'parts')
    assert weights_of(tmp_path / 'whole', 'best') == weights_of(tmp_path / 'parts', 'best')
    split = tmp_path / 'whole' / 'split.csv'
    assert split.read_text() == (tmp_path / 'parts' / 'split.csv').read_text()
    # the run's own settings, where none are named
    assert finetune_script.main(['--out', str(tmp_path / 'parts'), '--resume', '--device', 'cpu', '--messages', 'quiet',
                                 '--data', str(photographs)]) == 0
    # another run on the same files
    assert tune(photographs, weights, tmp_path / 'same', '--epochs', '1', '--split', str(split), '--seed', '9') == 0
    assert (tmp_path / 'same' / 'split.csv').read_text() == split.read_text()


def test_figures_of_a_run_in_half_precision_are_those_of_float32(weights, photographs, tmp_path):
    assert tune(photographs, weights, tmp_path / 'run', '--epochs', '1', '--precision', 'bf16') == 0
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    again = validate(str(tmp_path / 'run'), str(photographs), split=str(tmp_path / 'run' / 'split.csv'))
    assert metrics['mixed_precision'] == 'bf16'
    assert (metrics['ece'], metrics['top1']) == (again['ece'], again['top1'])


def test_a_finished_run_keeps_its_card_where_a_resume_fails(run, photographs, tmp_path, capsys):
    out, data = shutil.copytree(run, tmp_path / 'run'), shutil.copytree(photographs, tmp_path / photographs.name)
    before = {p.name: p.read_bytes() for p in (out / 'best').iterdir()}
    assert {'README.md', 'metrics.json', 'golden.npz'} <= before.keys()
    for row in csv.DictReader((out / 'split.csv').read_text().splitlines()):
        if row['part'] == 'test':
            (data / row['path']).unlink()
    assert finetune_script.main(['--out', str(out), '--resume', '--device', 'cpu', '--data', str(data)]) == 1
    assert 'no image can be read' in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (out / 'best').iterdir()} == before


def test_a_run_without_its_best_epoch_says_which_it_exports(tmp_path, caplog):
    run, model = RunDir(tmp_path / 'run', {'seed': 0}), timm.create_model('wrn16_1')
    history = [{'epoch': 1, 'holdout_accuracy': 60.}, {'epoch': 2, 'holdout_accuracy': 50.}]
    fitted = Fitted(model, history, [])
    run.save({'epoch': 1, 'step': 0, 'history': history[:1], 'model': model.state_dict(), 'ema': None}, history[:1])
    job = SimpleNamespace(control=RunControl(run), model=model, config=FinetuneConfig(), cfg={'tag': 'x'})
    assert ft._export(job, model, fitted) == 1 and not caplog.text
    (run.checkpoints / 'best.pt').unlink()
    assert ft._export(job, model, fitted) == 2
    assert 'the checkpoint of epoch 1, the best on held-out files, is lost; best/ holds epoch 2' in caplog.text


def test_figures_of_other_runs_are_not_written_over(run, photographs, weights, tmp_path, capsys):
    out = shutil.copytree(run, tmp_path / 'run')
    before = (out / 'metrics.json').read_bytes()
    for resume in ((), ('--resume',)):
        assert tune(photographs, weights, out, '--seeds', '2', *resume) == 1
        assert f'{out} holds a single run; choose another --out for several seeds' in capsys.readouterr().err
    (tmp_path / 'several').mkdir()
    (tmp_path / 'several' / 'metrics.json').write_bytes(before)
    assert tune(photographs, weights, tmp_path / 'several', '--seeds', '2', '--seed', '5') == 1
    assert 'several already holds the results of several seeds; choose another --out' in capsys.readouterr().err
    assert (out / 'metrics.json').read_bytes() == before == (tmp_path / 'several' / 'metrics.json').read_bytes()


def test_sigterm_is_answered_as_ctrl_c_is(weights, photographs, tmp_path):
    command = Command('finetune', '--data', photographs, '--model', weights, '--out', tmp_path / 'run',
                      '--input-size', '32', '--epochs', '1000', '--device', 'cpu', errors=tmp_path / 'errors')
    while command.has_not_ended() and not list(tmp_path.glob('run/checkpoints/epoch-*.pt')):
        time.sleep(0.05)
    command.process.terminate()
    status, errors = command.end()
    assert re.search(r'stopped by SIGTERM after epoch \d+; continue with --resume', errors)
    assert status == 130


@pytest.mark.parametrize(('saved', 'message'), [
    ((), 'stopped before anything was saved; to begin again, run the same command'),
    (('run',), 'stopped; continue with --resume'), (('run', 'seed-0'), 'stopped; continue with --resume')])
def test_ctrl_c_says_whether_there_is_something_to_go_on_from(
        weights, photographs, tmp_path, monkeypatch, capsys, saved, message):
    def interrupted(*args, **kwargs):
        for folder in [tmp_path.joinpath(*saved, 'checkpoints')] if saved else []:
            folder.mkdir(parents=True)
            (folder / 'epoch-0001-step-000000.pt').write_text('')
        raise KeyboardInterrupt

    monkeypatch.setattr(ft.Finetuner, 'fit', interrupted)
    assert tune(photographs, weights, tmp_path / 'run') == 130
    assert capsys.readouterr().err == f'{message}\n'


def test_no_path_of_this_machine_is_published(weights, photographs, hub, tmp_path, monkeypatch, capsys):
    """From a folder, with the split of another run, and a photograph that cannot be read."""
    shutil.copytree(photographs, tmp_path / 'data')
    (tmp_path / 'data' / CLASSES[0] / 'bad.jpg').write_text('no')
    (tmp_path / 'weights').mkdir()
    shutil.copytree(weights, tmp_path / 'weights' / 'own')
    monkeypatch.chdir(tmp_path)
    for i, (model, split) in enumerate((
            ('weights/own', '70-30'), (f'local-dir:{tmp_path}/weights/own', f'{tmp_path}/run0/split.csv'))):
        out = tmp_path / f'run{i}'
        assert tune('data', model, out, '--epochs', '1', '--split', split) == 0
        assert json.loads((out / 'recipe.json').read_text())['finetune']['model'] == model  # to resume
        for name in ('best', 'last'):
            assert json.loads((out / name / 'recipe.json').read_text())['finetune']['model'] == 'wrn16_1.test'
        written = b''.join(p.read_bytes() for p in (out / 'best').iterdir() if p.suffix in ('.json', '.md', '.csv'))
        assert b'fine-tuned from `wrn16_1.test`' in written
        for path in (tmp_path, weights, 'weights/own', 'run0/', 'bad.jpg'):
            assert os.fsencode(path) not in written
    assert tune('data', model, out, '--split', split, '--epochs', '1', '--resume') == 0
    recipe = json.loads((out / 'best' / 'recipe.json').read_text())
    recipe['finetune']['model'] = str(tmp_path)  # as earlier versions wrote it
    (out / 'best' / 'recipe.json').write_text(json.dumps(recipe))
    assert publish_script.main([str(out / 'best'), '--namespace', 'acme']) == 1
    assert f'recipe.json has a path of this machine as model: {tmp_path}; replace it' in capsys.readouterr().err
    assert not hub.requests


def test_a_run_that_failed_before_its_first_epoch_leaves_its_place_free(weights, photographs, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(ft.Finetuner, 'fit', lambda *args, **kwargs: 1 / 0)
        assert tune(photographs, weights, tmp_path / 'run', '--seed', '1') == 1
    assert (tmp_path / 'run' / 'recipe.json').is_file()
    assert tune(photographs, weights, tmp_path / 'run', '--epochs', '1') == 0
    assert json.loads((tmp_path / 'run' / 'recipe.json').read_text())['finetune']['seed'] == 0


def test_the_classifier_alone_is_fitted_without_a_learning_rate(weights, photographs, tmp_path):
    """From chance down, at any --lr, on a backbone that stays as it is; the classifier is at its loss's minimum."""
    assert tune(photographs, weights, tmp_path / 'run', '--train', 'head') == 0
    assert tune(photographs, weights, tmp_path / 'rate', '--train', 'head', '--lr', '100') == 0
    assert FinetuneConfig(train='head', lr=100).unused() == ['lr'] and not FinetuneConfig(lr=100).unused()
    assert weights_of(tmp_path / 'run') == weights_of(tmp_path / 'rate') == weights_of(tmp_path / 'run', 'best')
    history = list(csv.DictReader((tmp_path / 'run' / 'history.csv').read_text().splitlines()))
    losses = [float(row['train_loss']) for row in history]
    assert losses[0] < math.log(3) and losses == sorted(losses, reverse=True)
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    chosen = history[metrics['best_epoch'] - 1]
    assert float(chosen['penalty']) == metrics['penalty']
    assert float(chosen['holdout_accuracy']) == max(float(row['holdout_accuracy']) for row in history)

    model, before = open_model(str(tmp_path / 'run')), open_model(weights).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or name.startswith('fc.')
    with open(tmp_path / 'run' / 'split.csv') as f:
        rows = [row for row in csv.DictReader(f) if row['part'] != 'test']
    files = ImageFiles.of([(str(photographs / row['path']), row['label']) for row in rows])
    found = extract_features(model, files.as_dataset(eval_transform(model)), RunAccelerator('cpu', 'auto'))
    scale = (found.logits - found.logits.mean(0)).square().mean().sqrt()
    with torch.no_grad():  # as it was fitted
        model.fc.weight *= metrics['temperature']
        model.fc.bias *= metrics['temperature']
    loss = F.cross_entropy(model.fc(found.logits), found.labels)
    loss = loss + metrics['penalty'] / 2 * (scale * model.fc.weight).square().sum()
    assert max(g.abs().max() for g in torch.autograd.grad(loss, tuple(model.fc.parameters()))) < 1e-3


def test_card_of_a_classifier_alone(weights, photographs, tmp_path):
    assert tune(photographs, weights, tmp_path / 'run', '--train', 'head') == 0
    card = (tmp_path / 'run' / 'best' / 'README.md').read_text()
    assert 'classifier fitted to features, its L2 penalty (' in card
    assert 'penalties tried; torch' in card and ' epochs;' not in card
    owned = card.replace('license:', 'license: mit', 1)
    (tmp_path / 'run' / 'best' / 'README.md').write_text(owned)
    before = weights_of(tmp_path / 'run', 'best')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ft, 'LinearFit', None)  # it is not fitted again
        assert tune(photographs, weights, tmp_path / 'run', '--train', 'head', '--resume') == 0
    assert (tmp_path / 'run' / 'best' / 'README.md').read_text() == owned
    assert weights_of(tmp_path / 'run', 'best') == before


def test_a_classifier_that_is_no_linear_layer_is_not_fitted_to_features(monkeypatch):
    monkeypatch.setattr(timm.models.ResNet, 'get_classifier', lambda self: torch.nn.Identity())
    with pytest.raises(ValueError, match='the classifier of resnet18 is not a linear layer.*--no-cache'):
        prepare.build_model(FinetuneConfig(model='resnet18', pretrained=False, train='head'))


def test_few_files_choose_the_penalty_by_turns_and_many_held_out_ones_alone():
    g = torch.Generator().manual_seed(0)
    few, many = (Features(torch.randn(n, 4, generator=g), torch.arange(n) % 3) for n in (23, 1000))
    fit = LinearFit(few, Features(torch.randn(7, 4, generator=g), torch.arange(7) % 3), 3)
    asked = torch.cat([asked for _, asked in fit.folds])
    assert sorted(asked.tolist()) == list(range(30)) and len(fit.labels) == 30
    for known, asked in fit.folds:
        assert not set(known.tolist()) & set(asked.tolist()) and len(known) + len(asked) == 30
    (known, asked), = LinearFit(few, many, 3).folds
    assert known.tolist() == list(range(23)) and asked.tolist() == list(range(23, 1023))
    with pytest.raises(FloatingPointError, match='the features are not finite'):
        LinearFit(Features(torch.full((4, 2), math.nan), torch.arange(4) % 2), None, 2)


def test_a_penalty_is_chosen_that_serves_files_not_fitted_to():
    """Two classes that differ in one of many noisy features: hardly any penalty fits the noise, a strong one helps."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    features = torch.randn(4000, 100, generator=g)
    features[:, 0] += 1.5 * labels
    fit = LinearFit(Features(features[:100], labels[:100]), None, 2)
    best = max((row for row, _ in fit.path()), key=lambda row: row['holdout_accuracy'])

    def accuracy(penalty):
        weight, bias = fit.weight(penalty)
        return (F.linear(features[100:], weight, bias).argmax(1) == labels[100:]).float().mean().item()

    assert accuracy(best['penalty']) > accuracy(1e-5) + 0.03


@pytest.mark.parametrize('spread', [1.2, 2., 20.])  # of the classes; with 20 all files are classified correctly
def test_a_classifier_on_features_is_as_confident_as_it_is_accurate(spread):
    g = torch.Generator().manual_seed(0)
    centres, labels = spread * torch.randn(5, 32, generator=g) / 32 ** 0.5, torch.arange(3000) % 5
    features = centres[labels] + 0.3 * torch.randn(3000, 32, generator=g)
    fit = LinearFit(Features(features[:200], labels[:200]), None, 5)
    row, logits = max(fit.path(), key=lambda step: step[0]['holdout_accuracy'])
    plain, scaled = (F.linear(features[200:], *fit.weight(row['penalty'], by)).softmax(1)
                     for by in (1., temperature(logits, fit.labels)))
    assert torch.equal(plain.argmax(1), scaled.argmax(1))
    accuracy = (scaled.argmax(1) == labels[200:]).float().mean().item()
    assert scaled.amax(1).mean().item() == pytest.approx(accuracy, abs=0.05)
    if spread == 20:
        assert accuracy == 1 and plain.amax(1).mean().item() < 0.9


def test_the_head_of_a_distilled_network_is_all_of_its_classifiers():
    network = timm.create_model('deit_tiny_distilled_patch16_224', num_classes=2)
    _Unfreezing(network, 'head', 1).train(0)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert trained == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}


def test_a_penalty_is_chosen_that_finds_a_rare_class():
    """Under strong penalties every file is of the large class, with equal accuracy, though the loss falls."""
    g = torch.Generator().manual_seed(0)
    labels = (torch.arange(420) % 21 == 0).long()
    features = torch.randn(420, 50, generator=g)
    features[:, 0] += 4 * labels
    rows = [(row, logits) for row, logits in LinearFit(Features(features, labels), None, 2).path()]
    assert len({row['holdout_accuracy'] for row, _ in rows[:4]}) == 1  # of the large class
    best, logits = max(rows, key=lambda pair: pair[0]['holdout_accuracy'])
    assert best['holdout_accuracy'] > 98 and (logits.argmax(1) == 1).sum() > 12  # of 20


@pytest.mark.parametrize('accumulate', [5, 8])
def test_accumulated_gradients_are_averaged_also_in_a_group_that_is_not_full(tmp_path, accumulate):
    """Five batches, against one batch of all."""
    data = TensorDataset(torch.randn(20, 3, 32, 32), torch.arange(20) % 2)
    norm = functools.partial(timm.layers.GroupNorm, num_groups=4)
    before = timm.create_model('wrn16_1', num_classes=2, norm_layer=norm)
    after = []
    for batch_size, steps in ((20, 1), (4, accumulate)):
        config = FinetuneConfig(opt='momentum', momentum=0., layer_decay=1., batch_size=batch_size, accumulate=steps,
                                epochs=1, warmup_epochs=0, label_smoothing=0., ema_decay=.5, precision='no')
        model = copy.deepcopy(before)
        with RunControl(RunDir(tmp_path / f'{steps}', {})) as control:
            finetuner = Finetuner(model, config, make_accelerator(config, 'cpu'), control)
            update, counted = finetuner.ema.update, []
            finetuner.ema.update = lambda network, step: (counted.append(step), update(network, step))  # noqa: B023
            finetuner.fit(data)
        assert counted == [0]  # one update, whatever the number of batches
        after.append((model.fc.weight - before.fc.weight) / finetuner.optimizer.param_groups[0]['lr'])
    torch.testing.assert_close(*after, atol=1e-5, rtol=1e-4)


def test_gradual_unfreezing_goes_from_the_classifier_to_the_stem():
    model = timm.create_model('wrn16_1')
    unfreezing = _Unfreezing(model, 'gradual', 8)

    def free():
        return {n.split('.')[0] for n, p in model.named_parameters() if p.requires_grad}

    seen = []
    for epoch in range(8):
        unfreezing.train(epoch)
        seen.append(free())
        assert model.bn.training and model.layer1[0].bn1.training == ('layer1' in seen[-1])
    assert seen[0] == {'bn', 'fc'} and seen[1] == seen[0] | {'layer3'} and seen[2] == seen[1] | {'layer2'}
    assert seen[3] == seen[2] | {'layer1'} and seen[4] == seen[7] == seen[3] | {'conv1'}
    _Unfreezing(model, 'head', 8).train(7)
    assert free() == {'fc'}
    few = _Unfreezing(model, 'gradual', 5)  # fewer epochs than stages
    for epoch, expected in enumerate((seen[0], seen[2], seen[4], seen[4], seen[4])):
        few.train(epoch)
        assert free() == expected


def test_layers_below_learn_more_slowly(weights, photographs, tmp_path):
    """One small step of plain SGD moves each block by its own rate times its gradient."""
    start = open_model(weights).state_dict()
    moved = []
    for decay in ('1', '0.5'):
        assert tune(
            photographs, weights, tmp_path / decay, '--epochs', '1', '--layer-decay', decay, '--no-augment', '--opt',
            'momentum', '--momentum', '0', '--weight-decay', '0', '--batch-size', '64', '--holdout', '0') == 0
        end = open_model(str(tmp_path / decay / 'last')).state_dict()
        moved.append([(end[k] - start[k]).norm().item() for k in
                      ('conv1.weight', 'layer1.0.conv1.weight', 'bn.bias')])
    assert [b / a for a, b in zip(*moved, strict=True)] == pytest.approx([0.5 ** 7, 0.5 ** 6, 0.5], rel=0.02)


def test_early_stop_and_the_mean_of_seeds(weights, photographs, tmp_path, capsys):
    options = ('--train', 'head', '--no-cache', '--lr', '1e-9', '--epochs', '20', '--patience', '3', '--seeds', '2')
    assert tune(photographs, weights, tmp_path / 'run', *options) == 0
    summary = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    runs = [json.loads((tmp_path / 'run' / f'seed-{i}' / 'metrics.json').read_text()) for i in (0, 1)]
    assert all(r['epochs'] == 4 and r['stopped'].startswith('3 epochs without') for r in runs)
    a, b = (r['top1'] for r in runs)
    assert summary['top1']['values'] == [a, b] and summary['top1']['mean'] == pytest.approx((a + b) / 2, abs=1e-3)
    assert summary['top1']['std'] == pytest.approx(abs(a - b) / 2 ** 0.5, abs=1e-3)
    again = ['--out', str(tmp_path / 'run'), '--resume', '--device', 'cpu', '--messages', 'quiet', '--data',
             str(photographs)]  # with the settings of the first
    assert finetune_script.main(again) == 1
    assert 'holds runs of several seeds; give --seeds again' in capsys.readouterr().err
    (tmp_path / 'run/seed-1/metrics.json').unlink()  # as where its report could not be written
    before = (tmp_path / 'run/seed-0/metrics.json').stat().st_mtime_ns
    assert finetune_script.main([*again, '--seeds', '2']) == 0
    assert (tmp_path / 'run/seed-0/metrics.json').stat().st_mtime_ns == before  # passed by
    assert json.loads((tmp_path / 'run/metrics.json').read_text())['top1'] == summary['top1']
    splits = [(tmp_path / 'run' / f'seed-{i}' / 'split.csv').read_text() for i in (0, 1)]
    assert splits[0] != splits[1]


@pytest.mark.filterwarnings('ignore:This DataLoader will create 2 worker')  # on one core
def test_the_same_seed_gives_the_same_run_however_photographs_are_read(weights, photographs, tmp_path):
    for name, workers, memory in (('a', '0', '1'), ('b', '0', '0'), ('c', '2', '0.001')):
        assert tune(photographs, weights, tmp_path / name, '--epochs', '2', '--workers', workers, '--image-memory',
                    memory) == 0
    assert weights_of(tmp_path / 'a') == weights_of(tmp_path / 'b')
    assert json.loads((tmp_path / 'c' / 'metrics.json').read_text())['images'] == 12


def test_labels_that_are_mixed_are_smoothed_too():
    """The loss of a step against cross-entropy as its definition has it."""
    config = FinetuneConfig(mixup=.2, label_smoothing=.3, ema_decay=0.)
    model, images = timm.create_model('wrn16_1').train(), torch.randn(8, 3, 32, 32)
    targets = torch.rand(8, 10).softmax(1)
    finetuner = Finetuner(model, config, RunAccelerator('cpu'), None)
    finetuner._mix = lambda *_: (images, targets)
    finetuner._stepper = finetuner.accelerator.prepare(finetuner.optimizer)
    with torch.no_grad():
        logits = copy.deepcopy(model)(images)
    expected = -((.7 * targets + .3 / 10) * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(finetuner._step(model, images, targets.argmax(1), None), expected)


@pytest.mark.parametrize('signalled', [True, False])
def test_a_signal_that_also_ends_the_workers_stops_the_run(tmp_path, signalled):
    """As where they are not forked: they do not inherit the handlers."""
    class Reading(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            if i == 5:
                if signalled:
                    signal.raise_signal(signal.SIGTERM)
                raise RuntimeError('DataLoader worker (pid(s) 1) exited unexpectedly')
            return torch.randn(3, 32, 32), i % 2

    model, config = timm.create_model('wrn16_1', num_classes=2), FinetuneConfig(batch_size=2)
    with RunControl(RunDir(tmp_path / 'run', {})) as control:
        finetuner = Finetuner(model, config, RunAccelerator('cpu'), control)
        if signalled:
            fitted = finetuner.fit(Reading())
            assert (fitted.interrupted, fitted.stopped, fitted.history) == (True, 'SIGTERM', [])
        else:
            with pytest.raises(RuntimeError, match='exited unexpectedly'):
                finetuner.fit(Reading())


def test_class_weights_are_inverse_to_the_counts():
    files = dataclasses.replace(list_folder(SAMPLE).train.subset([0, 1, 2, 30]), classes=('a', 'b'))
    weights = ft._balance(files)
    assert weights.tolist() == pytest.approx([4 / (2 * 3), 4 / 2])


def test_probes_are_ranked_by_held_out_files_and_the_best_is_tested(weights, photographs, tmp_path, capsys):
    untrained, trained = weights, str(ROOT / 'weights' / 'wrn16_1.cifar10')
    options = ['--data', str(photographs), '--out', str(tmp_path / 'run'), '--device', 'cpu', '--split', 'random6']
    one = tmp_path / 'one'  # a level too high
    one.mkdir()
    (one / 'photographs').symlink_to(photographs)
    assert finetune_script.main([
        '--data', str(one), '--out', str(tmp_path / 'run'), '--device', 'cpu', '--probe', untrained]) == 1
    assert 'one holds one class only (photographs); at least two are needed' in capsys.readouterr().err
    assert finetune_script.main([*options, '--probe', untrained, trained]) == 0
    shown = capsys.readouterr().out
    rows = json.loads((tmp_path / 'run' / 'probe.json').read_text())
    assert sorted((r['weights'], r['way']) for r in rows) == sorted(
        (w, way) for w in (untrained, trained) for way in ('linear probe', 'kNN'))
    held_out = [row['holdout']['top1']['mean'] for row in rows]
    assert held_out == sorted(held_out, reverse=True) and rows[0]['weights'] == trained
    assert [row.get('test_files') for row in rows] == [18, None, None, None]
    assert ['top1' in row for row in rows] == [True, False, False, False]
    assert rows[0]['top1']['mean'] > 60  # chance is 33
    assert '±' not in shown and f"{rows[0]['top1']['mean']:.1f}" in shown
    command = shlex.split(shown.strip().splitlines()[-1])
    next_one, config = finetune_script.read(command[2:])
    assert command[:2] == ['wrn-timm', 'finetune'] and not next_one.probe
    assert (config.model, config.split, next_one.data) == (trained, 'random6', str(photographs))
    assert next_one.out == str(tmp_path / 'run')
    (tmp_path / 'run' / 'metrics.json').write_text('{}')  # of a run there, which would be refused
    assert finetune_script.main([*options, '--probe', untrained]) == 0
    assert capsys.readouterr().out.strip().endswith('--out RUN')


def test_probes_ask_no_test_file_before_the_choice(weights, photographs, tmp_path, monkeypatch):
    """With labels of the test files turned around, the ranking is the same."""
    def turned(*args):
        split = make_split(*args)
        test = dataclasses.replace(split.test, labels=[(i + 1) % 3 for i in split.test.labels])
        return dataclasses.replace(split, test=test)

    names, config = [weights, str(ROOT / 'weights' / 'wrn16_1.cifar10')], FinetuneConfig(split='random6')
    plain = probe(names, str(photographs), config)
    monkeypatch.setattr('wrn_timm.train.probe.make_split', turned)
    other = probe(names, str(photographs), config)
    assert [(r['weights'], r['way'], r['holdout']) for r in plain] == [
        (r['weights'], r['way'], r['holdout']) for r in other]
    assert plain[0]['top1'] != other[0]['top1']


def test_probes_that_are_recorded_are_tested_all(weights, photographs, tmp_path, capsys):
    own = tmp_path / 'weights'  # what is recorded goes into the folder of the weights
    names = [str(shutil.copytree(folder, own / Path(folder).name)) for folder in (
        weights, ROOT / 'weights' / 'wrn16_1.cifar10')]
    assert finetune_script.main([
        '--data', str(photographs), '--out', str(tmp_path / 'run'), '--device', 'cpu', '--split', 'random6', '--seeds',
        '2', '--probe', *names, '--record']) == 0
    assert '±' in capsys.readouterr().out
    rows = json.loads((tmp_path / 'run' / 'probe.json').read_text())
    assert all(len(row['mean_per_class']['values']) == 2 and row['test_files'] == 18 for row in rows)
    for name in names:
        transfer = json.loads((Path(name) / 'transfer.json').read_text())
        assert {t['way']: t['mean_per_class'] for t in transfer[-2:]} == {
            r['way']: r['mean_per_class'] for r in rows if r['weights'] == name}


def test_each_run_of_a_process_has_its_own_device_and_precision(monkeypatch):
    monkeypatch.setattr(AcceleratorState, 'mixed_precision', 'bf16')  # of a notebook's own Accelerator
    network = torch.nn.Linear(2, 2)
    for precision, dtype in ('no', torch.float32), ('bf16', torch.bfloat16), ('no', torch.float32):
        accelerator = RunAccelerator('cpu', precision)
        assert accelerator.device.type == 'cpu' and accelerator.mixed_precision == precision
        assert accelerator.scaler is None
        prepared = accelerator.prepare(network)
        assert prepared(torch.ones(1, 2)).dtype is torch.float32
        with accelerator.autocast():
            assert prepared(torch.ones(1, 2)).dtype is dtype
    with pytest.raises(ValueError, match="device is 'tpu'; choose 'cpu', or 'cuda'"):
        RunAccelerator('tpu')
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    on_gpu = RunAccelerator('cuda', 'fp16')
    assert on_gpu.device.type == 'cuda' and on_gpu.scaler.is_enabled()
    monkeypatch.undo()
    assert RunAccelerator('cpu').device.type == 'cpu'


def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow():
    """On a CPU, whose scaler is the GPU's in all but its device."""
    accelerator = RunAccelerator('cpu')
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    model = torch.nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    with torch.no_grad():
        model.weight.fill_(3.)
    for factor, weight in (2., 2.), (math.inf, 2.), (1., 1.5):
        accelerator.backward((model(torch.ones(1, 1)) * factor).sum())
        if factor == 2.:
            assert model.weight.grad.item() == 2 * 1024
        optimizer.step()
        optimizer.zero_grad()
        assert model.weight.item() == weight


@pytest.mark.parametrize('opt', ['nesterov', 'adamw'])
def test_a_first_step_of_float16_that_overflows_is_left_out(opt):
    accelerator = RunAccelerator('cpu')
    accelerator.scaler = torch.amp.GradScaler('cpu', init_scale=1024.)
    model = timm.create_model('wrn16_1', num_classes=2)
    finetuner = Finetuner(model, FinetuneConfig(opt=opt, lr=0.1, weight_decay=0.), accelerator, None)
    stepper, before = accelerator.prepare(finetuner.optimizer), copy.deepcopy(model.state_dict())
    for finite in False, True:
        accelerator.backward(model(torch.randn(4, 3, 32, 32)).square().mean())
        if not finite:
            model.conv1.weight.grad.fill_(math.inf)
        stepper.step()
        stepper.zero_grad()
        moved = [float((p - before[name]).detach().abs().max()) for name, p in model.named_parameters()]
        assert max(moved) < 1 if finite else max(moved) == 0
    assert max(moved) > 0


def test_layers_that_a_failed_try_has_frozen_are_trained_by_the_next(weights, photographs, tmp_path, monkeypatch):
    """A try that runs out of memory after the first layers were frozen, and the one with a smaller batch."""
    fit, seen = Finetuner.fit, []

    def once_too_large(self, *args):
        seen.append(sum(len(group['params']) for group in self.optimizer.param_groups))
        if len(seen) == 1:
            self._unfreezing.train(0)
            raise BatchTooLarge('out of memory', 8)
        return fit(self, *args)

    monkeypatch.setattr(Finetuner, 'fit', once_too_large)
    assert tune(photographs, weights, tmp_path / 'run', '--epochs', '2', '--train', 'gradual', '--batch-size',
                'auto') == 0
    assert seen == [len(list(timm.create_model('wrn16_1').parameters()))] * 2


def test_time_is_counted_once_though_a_smaller_batch_goes_on(weights, photographs, tmp_path, monkeypatch):
    fit, tries = Finetuner.fit, []

    def too_large_at_its_end(self, *args):
        tries.append(self.seconds)
        self._state.seconds += 1000  # that it took, as far as its checkpoint can tell
        fitted = fit(self, *args)
        if len(tries) == 1:
            raise BatchTooLarge('out of memory', 8)
        return fitted

    monkeypatch.setattr(Finetuner, 'fit', too_large_at_its_end)
    assert tune(photographs, weights, tmp_path / 'run', '--epochs', '1', '--batch-size', 'auto') == 0
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert tries == [0, pytest.approx(1000, abs=300)] and metrics['train_seconds'] < metrics['seconds'] < 300


def test_a_batch_that_fits_is_sought_with_nothing_of_the_one_that_did_not(monkeypatch):
    finetuner = Finetuner(timm.create_model('wrn16_1'), FinetuneConfig(), RunAccelerator('cpu', 'bf16'), None)
    finetuner._batch_size, alive, dtypes = 4, [], []

    def note(module, args, out):
        alive.append(weakref.ref(out))
        dtypes.append(out.dtype)

    finetuner.network.layer1.register_forward_hook(note)

    def out_of_memory(loss):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')

    def too_large(*args):
        assert [ref() for ref in alive] == [None]
        return find(*args)

    find = finetune_loop._too_large
    monkeypatch.setattr(finetuner.accelerator, 'backward', out_of_memory)
    monkeypatch.setattr(finetune_loop, '_too_large', too_large)
    with pytest.raises(BatchTooLarge, match='use --batch-size 2 --accumulate 2 for'):
        finetuner._step(finetuner.network, torch.randn(4, 3, 32, 32), torch.arange(4), None)
    assert dtypes == [torch.bfloat16] * 2


def test_a_stream_is_shuffled_by_the_epoch_of_the_run():
    """Of a resumed run too."""
    class Stream(IterableDataset):
        def __len__(self):
            return 8

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return ((torch.full((3, 32, 32), float(self.epoch)), 0, i) for i in range(8))

    config, stream = FinetuneConfig(batch_size=4), Stream()
    finetuner = Finetuner(timm.create_model('wrn16_1'), config, make_accelerator(config, 'cpu'),
                          SimpleNamespace(run=None))
    _, loader = finetuner._prepare(stream)
    for epoch in 3, 4:
        finetuner._state.epoch = epoch
        finetuner._begin_epoch(stream, loader)
        assert {float(images.mean()) for images, *_ in loader} == {epoch}


def test_several_seeds_share_the_time_budget(weights, photographs, tmp_path, monkeypatch):
    budgets, stopped = [], iter(['', '2 epochs without a better held-out accuracy', 'the time budget'])

    def run(config, data, out, machine, on_epoch):
        budgets.append(machine.time_budget)
        time.sleep(0.02)
        return {'stopped': next(stopped), 'seconds': 1., 'dataset': 'x', 'split': '70-30', 'input_size': 32, 'top1': 1.,
                'mean_per_class': 1., 'ece': 1.}

    monkeypatch.setattr(ft, 'finetune', run)
    assert ft.finetune_seeds(FinetuneConfig(), 'x', tmp_path, 4, Machine(time_budget=100.)) is None
    assert len(budgets) == 3 and budgets[0] - budgets[1] > 0.01 and budgets[1] - budgets[2] > 0.01
    assert not (tmp_path / 'metrics.json').exists()


@pytest.mark.parametrize('part', ['train', 'holdout', 'test'])
@pytest.mark.parametrize('way', [('--train', 'head'), ('--epochs', '1'), ('--epochs', '1', '--image-memory', '0')])
def test_no_file_is_left_out_where_it_may_not_be(
        run, weights, photographs, tmp_path, capsys, monkeypatch, part, way):
    """Of more files than are examined beforehand."""
    monkeypatch.setattr(prepare, 'EXAMINED_AT_MOST', 0)
    data, split = shutil.copytree(photographs, tmp_path / 'data'), run / 'split.csv'
    bad = next(row['path'] for row in csv.DictReader(split.read_text().splitlines()) if row['part'] == part)
    (data / bad).write_bytes(b'')
    assert tune(data, weights, tmp_path / 'run', '--split', str(split), '--on-bad', 'fail', *way) == 1
    assert f'{Path(bad).name} is not an image' in capsys.readouterr().err


def test_files_are_probed_in_float32(weights, photographs, tmp_path, monkeypatch):
    seen = set()

    def noted(*args, **kwargs):
        seen.add(torch.is_autocast_enabled('cpu'))
        return predict(*args, **kwargs)

    monkeypatch.setattr('wrn_timm.train.probe.predict', noted)
    assert tune(photographs, weights, tmp_path / 'run', '--probe', weights, '--precision', 'bf16') == 0
    assert seen == {False}


def test_processes_that_read_images_leave_ctrl_c_to_their_owner():
    loader = make_loader(torch.utils.data.TensorDataset(torch.zeros(2, 3), torch.zeros(2)), 2, 1)
    before = signal.getsignal(signal.SIGINT)
    try:
        loader.worker_init_fn(0)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_results_of_other_kinds_are_kept_beside_one_another(tmp_path):
    row = {'way': 'all', 'dataset': 'caltech101', 'protocol': 'random30', 'input_size': 64, 'epochs': 10, 'stem': ''}
    for change in ({'skipped': ['/home/me/x.jpg']}, {'epochs': 5}, {'stem': 'imagenet'}, {'input_size': 32},
                   {'seeds': 3}):
        record_transfer(str(tmp_path), [row | change])
    kept = read_transfer(tmp_path)
    assert [(r['input_size'], r['epochs'], r['stem'], r.get('seeds')) for r in kept] == [
        (64, 10, '', 3), (64, 5, '', None), (64, 10, 'imagenet', None), (32, 10, '', None)]
    assert all(r['environment']['torch'] == torch.__version__ for r in kept)
    assert '/home/me' not in (tmp_path / 'transfer.json').read_text()


def test_nearest_neighbours_are_those_of_a_plain_search():
    g = torch.Generator().manual_seed(0)
    features, queries = torch.randn(40, 8, generator=g), torch.randn(30, 8, generator=g)
    labels = torch.arange(40) % 4
    votes = knn(features, labels, queries, 4, neighbours=5)
    for query, vote in zip(queries, votes, strict=True):
        cosines = [(F.cosine_similarity(query, f, dim=0).item(), label.item())
                   for f, label in zip(features, labels, strict=True)]
        expected = torch.zeros(4)
        for cosine, label in sorted(cosines, reverse=True)[:5]:
            expected[label] += torch.tensor(cosine / 0.07).exp()
        torch.testing.assert_close(vote.exp(), expected, rtol=1e-3, atol=1e-2)
    assert knn(features, labels, queries, 4, neighbours=1).isfinite().all()  # three classes have no vote


def test_a_linear_fit_is_at_the_minimum_of_its_loss():
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(60, 5, generator=g), torch.arange(60) % 3
    weight = fit_linear(features, labels, 3, 0.1).requires_grad_()
    w, b = weight[:, :-1], weight[:, -1]
    loss = F.cross_entropy(features @ w.T + b, labels) + 0.05 * (w ** 2).sum()
    gradient, = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-3


def test_features_are_what_the_classifier_is_given(weights, photographs):
    model, files = open_model(weights), list_folder(photographs).train
    data, accelerator = files.as_dataset(eval_transform(model)), RunAccelerator('cpu')
    features, logits = (f(model, data, accelerator).logits for f in (extract_features, predict))
    torch.testing.assert_close(model.fc(features), logits)
    again = predict(model.fc, Features(features, torch.tensor(files.labels)), accelerator)
    torch.testing.assert_close(again.logits, logits)
    assert again.index.tolist() == list(range(36))


def test_a_share_of_a_data_set_keeps_its_places(photographs):
    files = list_folder(photographs).train
    features = Features(torch.randn(36, 2), torch.tensor(files.labels))
    for data in (features, files.as_dataset(lambda image: torch.zeros(1))):
        places = [i for *_, i, _ in make_loader(Subset(data, range(1, 36, 3)), 5, 0)]
        assert torch.cat(places).tolist() == list(range(1, 36, 3))


def test_where_no_image_can_be_read_it_is_said(weights, tmp_path):
    (tmp_path / 'x.jpg').write_bytes(b'')
    files = ImageFiles([str(tmp_path / 'x.jpg')], [0], ('x',))
    with pytest.raises(ValueError, match='no image can be read: .*x.jpg is not an image'):
        predict(open_model(weights), files.as_dataset(None), RunAccelerator('cpu'))


def test_grad_cam_of_a_pooled_classifier_is_its_class_activation_map():
    """With mean pooling and a linear classifier both are the same map (arXiv:1610.02391, section 3)."""
    model = timm.create_model('wrn16_1').eval()
    images = torch.randn(2, 3, 32, 32)
    maps = grad_cam(model, images, torch.tensor([3, 7]))
    with torch.no_grad():
        features = model.forward_features(images)
        plain = torch.einsum('bchw,bc->bhw', features, model.fc.weight[[3, 7]])
    plain = F.interpolate(plain.relu()[:, None], (32, 32), mode='bilinear', align_corners=False)[:, 0]
    plain = plain / plain.amax((1, 2), keepdim=True)
    torch.testing.assert_close(maps, plain.detach(), atol=1e-4, rtol=1e-4)


def test_grad_cam_of_features_whose_channels_are_last():
    model = timm.create_model('wrn16_1').eval()
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([3, 7])
    expected, first, head = grad_cam(model, images, classes), model.forward_features, model.forward_head
    model.output_fmt = 'NHWC'
    model.forward_features = lambda x: first(x).permute(0, 2, 3, 1)
    model.forward_head = lambda x: head(x.permute(0, 3, 1, 2))
    torch.testing.assert_close(grad_cam(model, images, classes), expected)


ONE_AFTER_ANOTHER = '''
import os, sys, time
import timm
create, rank = timm.create_model, os.environ['RANK']

def slowly(*args, **kwargs):
    print(rank, 'begins', flush=True)
    time.sleep(1)
    model = create(*args, **kwargs)
    print(rank, 'ends', flush=True)
    timm.create_model = create
    return model

timm.create_model = slowly
from wrn_timm.cli import finetune
sys.exit(finetune.main(sys.argv[1:]))
'''


def test_two_processes_share_a_run(weights, photographs, tmp_path):
    """And one alone fetches the weights."""
    own = shutil.copytree(weights, tmp_path / 'wrn16_1.test')
    (own / 'transfer.json').unlink(missing_ok=True)
    (tmp_path / 'main.py').write_text(ONE_AFTER_ANOTHER)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2',
         str(tmp_path / 'main.py'), '--data', str(photographs), '--model', str(own), '--out', str(tmp_path / 'run'),
         '--device', 'cpu', '--input-size', '32', '--epochs', '2', '--train', 'gradual', '--messages', 'json',
         '--record'], capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "scripts"}', 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == ['0 begins', '0 ends', '1 begins', '1 ends']
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    assert [line.get('epoch') for line in lines] == [1, 2, None] and lines[-1]['images'] == 12
    assert len((tmp_path / 'run' / 'split.csv').read_text().splitlines()) == 37
    assert [row['protocol'] for row in read_transfer(own)] == ['70-30']
    open_model(str(tmp_path / 'run' / 'best'))


def test_a_stream_among_processes_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    stream = SimpleNamespace(streamed=True, classes=CLASSES)
    monkeypatch.setattr(ft, 'prepare_named', lambda *args: (Split(stream, None, stream), {}))
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=2, local_main_process_first=contextlib.nullcontext)
    model = timm.create_model('wrn16_1')
    with pytest.raises(ValueError, match='wds/x is a stream, which only one process can read; run without torchrun'):
        ft._open_run(FinetuneConfig(), model, 'wds/x', tmp_path / 'run', accelerator, Machine())
    assert not (tmp_path / 'run').exists()


def test_grey_palette_and_cmyk_photographs_train(weights, tmp_path):
    for i, mode in enumerate(('L', 'P', 'CMYK', 'RGBA')):
        for name, colour in (('red', (250, 0, 0)), ('blue', (0, 0, 250))):
            (tmp_path / 'data' / name).mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            Image.new('RGB', (40, 30), colour).convert(mode).save(buffer, 'JPEG' if mode in ('L', 'CMYK') else 'PNG')
            (tmp_path / 'data' / name / f'{i}').write_bytes(buffer.getvalue())
    assert tune(tmp_path / 'data', weights, tmp_path / 'run', '--epochs', '1') == 0


def test_the_largest_batch_that_fits():
    tried = []

    def step(n):
        tried.append(n)
        if n > 20:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')

    assert largest_batch(step, 256) == 16 and tried == [256, 128, 64, 32, 16]
    with pytest.raises(RuntimeError, match='shapes'):
        largest_batch(lambda n: torch.randn(2, 3) @ torch.randn(2, 3), 4)


@pytest.fixture
def parts(tmp_path):
    """Photographs in `train/` and `val/`."""
    for part, numbers in (('train', range(8)), ('val', range(8, 12))):
        for name in CLASSES:
            (tmp_path / 'data' / part / name).mkdir(parents=True)
            for p in [sorted((SAMPLE / name).iterdir())[i] for i in numbers]:
                shutil.copy(p, tmp_path / 'data' / part / name)
    return tmp_path / 'data'


def test_data_sets_that_timm_knows_by_name(weights, parts, tmp_path):
    """torchvision's ImageFolder by its timm name gives the run that the folder itself gives."""
    for p in parts.rglob('*.jpg'):  # which the folder's reader would decode at a part of their size
        read_rgb(p).save(p.with_suffix('.png'))
        p.unlink()
    options = ('--epochs', '2', '--holdout', '0')
    source = f'torch/image_folder:{parts}'
    assert tune(source, weights, tmp_path / 'named', *options, '--parts', 'train', 'val') == 0
    assert tune(parts, weights, tmp_path / 'folder', *options) == 0
    named, folder = (json.loads((tmp_path / n / 'metrics.json').read_text()) for n in ('named', 'folder'))
    assert named['per_class'] == folder['per_class'] and named['images'] == 12
    assert weights_of(tmp_path / 'named') == weights_of(tmp_path / 'folder')
    assert tune(source, weights, tmp_path / 'three', *options, '--parts', 'train', 'val', 'val') == 0
    assert 'holdout_accuracy' in (tmp_path / 'three' / 'history.csv').read_text()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm's reader leaves files open
def test_data_sets_of_the_hub(weights, parts, tmp_path, offline, capsys):
    """A folder of photographs by the `datasets` library gives figures on the same files, with the same classes."""
    pytest.importorskip('datasets')
    offline()
    options = ('--epochs', '1', '--parts', 'train', 'validation')
    assert tune(f'hfids/{parts}', weights, tmp_path / 'unknown', *options) == 1
    assert 'Its size is not recorded; give it as hfds/' in capsys.readouterr().err
    Image.new('1', (40_000, 1)).save(parts / 'train' / CLASSES[0] / 'line.png')
    for name in ('hfds', 'hfids'):  # a stream has a size once the data set has been prepared
        assert tune(f'{name}/{parts}', weights, tmp_path / name, *options) == 0
        metrics = json.loads((tmp_path / name / 'metrics.json').read_text())
        assert metrics['images'] == 12 and tuple(metrics['per_class']) == CLASSES
        reasons = [f'hfds/{parts} train 8 cannot be read: it is 40,000 x 1 pixels']
        assert [r.partition(';')[0] for r in metrics['skipped']] == (reasons if name == 'hfds' else [])
    (parts / 'train' / CLASSES[0] / 'line.png').write_bytes(b'no image')
    assert len(NamedImages(f'hfds/{parts}', 'train')) == 25
    stream = NamedImages(f'hfids/{parts}', 'train').as_dataset(lambda image: image)
    with pytest.raises(ValueError, match=r'hfids/\S+ train 8 cannot be read: .*; a stream cannot leave it out'):
        list(stream)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm's reader leaves files open
def test_columns_by_other_names(tmp_path, offline):
    datasets = pytest.importorskip('datasets')
    offline()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (8, 4)).save(tmp_path / 'x.png', exif=exif)
    data = datasets.Dataset.from_dict(
        {'img': [str(tmp_path / 'x.png')] * 2, 'fine_label': [0, 1], 'name': ['ant', 'bee']},
        datasets.Features({'img': datasets.Image(), 'fine_label': datasets.ClassLabel(names=['ant', 'bee']),
                           'name': datasets.Value('string')}))
    (tmp_path / 'data').mkdir()
    data.to_parquet(tmp_path / 'data' / 'train.parquet')
    source = f"hfds/{tmp_path / 'data'}"
    found = NamedImages(source, 'train', keys=('img', 'fine_label'))
    assert found.classes == ('ant', 'bee') and found.read(1).size == (4, 8)
    with pytest.raises(ValueError, match=r'has no column image, only img, fine_label, name; give --input-key for the'):
        NamedImages(source, 'train')
    with pytest.raises(ValueError, match=r'has no column label, only '):
        NamedImages(source, 'train', keys=('img', ''))
    with pytest.raises(ValueError, match=r'hfids/.* has no column image, only img, fine_label, name; give --input-key'):
        NamedImages(source.replace('hfds', 'hfids'), 'train')
    with pytest.raises(ValueError, match=r"the column name holds 'ant', which is not the index of a class"):
        NamedImages(source, 'train', classes=('ant', 'bee'), keys=('img', 'name'))


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_rows_without_an_image_or_a_label(tmp_path, offline, caplog):
    datasets = pytest.importorskip('datasets')
    offline()
    Image.new('RGB', (8, 4)).save(tmp_path / 'x.png')
    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['ant', 'bee'])})
    for part, images, labels in (('train', ['x.png', None, 'x.png'], [0, 1, 1]), ('test', ['x.png'], [None])):
        rows = {'image': [name and str(tmp_path / name) for name in images], 'label': labels}
        (tmp_path / 'data').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / 'data' / f'{part}.parquet')
    assert NamedImages(f"hfds/{tmp_path / 'data'}", 'train').classes == ('ant', 'bee')
    stream = NamedImages(f"hfids/{tmp_path / 'data'}", 'train', download=True).as_dataset(lambda image: image.size)
    assert list(stream) == [((8, 4), 0, 0), ((8, 4), 1, 2)] and 'left out: hfids/' in caplog.text
    with pytest.raises(ValueError, match=r"first image of the split 'test' has no label; choose other --parts"):
        NamedImages(f"hfds/{tmp_path / 'data'}", 'test')


def test_weights_of_other_networks_beside_ours(photographs, no_weights, tmp_path, capsys):
    """ImageNet's WRN-50-2 and a ResNet-18, untrained here, by the same command; their figures are kept beside them."""
    for name in ('wrn50_2.racm_in1k', 'resnet18.a1_in1k'):
        export_weights(timm.create_model(name.partition('.')[0]), no_weights / name, {'tag': name.partition('.')[2]})
        options = ('--train', 'head', '--epochs', '1', '--record')
        assert tune(photographs, name, tmp_path / name, *options) == 0
        row, = json.loads((no_weights / name / 'transfer.json').read_text())
        assert row['top1']['mean'] == json.loads((tmp_path / name / 'metrics.json').read_text())['top1']
    assert tune(photographs, 'resnet18.a1_in1k', tmp_path / 'stopped', '--time-budget', '0', '--input-size', '32',
                '--record') == 1
    assert 'was stopped by the time budget after epoch 1, so it is not recorded' in capsys.readouterr().err
    assert len(json.loads((no_weights / name / 'transfer.json').read_text())) == 1
    assert tune(photographs, 'wrn16_1', tmp_path / 'probe', '--probe', 'all') == 0
    rows = json.loads((tmp_path / 'probe' / 'probe.json').read_text())
    assert {Path(r['weights']).name for r in rows} == {'wrn50_2.racm_in1k', 'resnet18.a1_in1k'}


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # webdataset leaves its files open
def test_streamed_data_sets(weights, parts, tmp_path, capsys):
    pytest.importorskip('webdataset')
    info, exif = {'num_classes': 3, 'splits': {}}, Image.Exif()
    exif[0x0112] = 6
    for part in ('train', 'val'):
        with tarfile.open(tmp_path / f'{part}.tar', 'w') as tar:
            for i, p in enumerate(sorted((parts / part).rglob('*.jpg'))):
                if (part, i) == ('train', 3):
                    Image.new('1', (40_000, 1)).save(p)
                if (part, i) == ('val', 0):
                    Image.new('LA', (8, 4)).save(p, 'PNG', exif=exif)
                (tmp_path / 'cls').write_text(str(CLASSES.index(p.parent.name)))
                tar.add(p, f'{i:03d}.jpg')
                tar.add(tmp_path / 'cls', f'{i:03d}.cls')
        count = i + 1
        info['splits'][part] = {
            'name': part, 'num_samples': count, 'filenames': [f'{part}.tar'], 'shard_lengths': [count]}
    (tmp_path / '_info.json').write_text(json.dumps(info))
    options = ('--epochs', '2', '--parts', 'train', 'val', '--messages', 'text')
    assert tune(f'wds/shards:{tmp_path}', weights, tmp_path / 'run', *options) == 0
    assert re.search(r'left out: wds/shards:\S+ train \d+: it is 40,000 x 1 pixels', capsys.readouterr().err)
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert metrics['images'] == 12 and set(metrics['per_class']) == {'0', '1', '2'}
    as_read = next(iter(NamedImages(f'wds/shards:{tmp_path}', 'val').as_dataset(lambda image: image)))[0]
    assert as_read.size == (4, 8) and as_read.getpixel((0, 0)) == (255, 255, 255)  # as read from a file
