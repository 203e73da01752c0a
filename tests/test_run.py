"""The run directory by itself: what is whole, what is damaged, and whose it is."""
import dataclasses
import json
import math
import random
import time
import zipfile

import pytest
import timm
import torch
import torch.distributed as dist
from conftest import SAMPLE

from wrn_timm.card import training_line
from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import predict as predict_script
from wrn_timm.cli import validate as validate_script
from wrn_timm.recipes import RECIPES, FinetuneConfig
from wrn_timm.train.accelerator import RunAccelerator
from wrn_timm.train.finetune_loop import Finetuner
from wrn_timm.train.machine import environment
from wrn_timm.train.run import RunControl, RunDir, config_of
from wrn_timm.weights import export_weights

SETTINGS = {'recipe': RECIPES['smoke'], 'seed': 0}


def state(epoch, **more):
    torch.manual_seed(epoch)
    history = [{'epoch': e + 1} for e in range(epoch)]
    weights = {'w': torch.randn(400), 'b': torch.randn(9)}
    return {'epoch': epoch, 'step': 0, 'history': history, 'model': weights, **more}


@pytest.fixture
def run(tmp_path):
    """A run of two epochs."""
    made = RunDir(tmp_path / 'run', SETTINGS)
    for epoch in (1, 2):
        made.save(state(epoch), state(epoch)['history'], draw=False)
    return made


def same(a, b):
    return all(torch.equal(a['model'][k], b['model'][k]) for k in b['model']) and a['epoch'] == b['epoch']


def test_no_damage_of_a_checkpoint_goes_unseen(run):
    """One bit, a block of zeros, a cut: the checkpoint before is taken, or what is loaded is what was saved."""
    newest = max(run.checkpoints.glob('epoch-*'))
    whole, rng = newest.read_bytes(), random.Random(0)
    damaged = [whole[:-1], whole[:len(whole) // 2], b'']
    for _ in range(120):
        place = rng.randrange(len(whole))
        damaged.append(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:])
    for start in range(0, len(whole) - 256, 256):
        damaged.append(whole[:start] + bytes(256) + whole[start + 256:])
    back = 0
    for data in damaged:
        newest.write_bytes(data)
        found = run.load_checkpoint()
        assert same(found, state(found['epoch']))
        if found['epoch'] == 1:
            back += 1
            assert newest.with_suffix('.damaged').read_bytes() == data
            newest.with_suffix('.damaged').unlink()
    assert back > 0.7 * len(damaged)  # the rest are bits that nothing reads


def test_a_damaged_best_epoch_is_not_taken(tmp_path, caplog):
    run = RunDir(tmp_path / 'run', SETTINGS)
    history = [{'epoch': 1, 'holdout_accuracy': 50.}]
    run.save(state(1, history=history), history, draw=False)
    best = run.checkpoints / 'best.pt'
    assert same(run.load_best(), state(1))
    data = bytearray(best.read_bytes())
    data[data.index(state(1)['model']['w'].numpy().tobytes()) + 5] ^= 1
    best.write_bytes(data)
    assert run.load_best() is None and f'{best} is damaged' in caplog.text


def test_checkpoints_of_older_versions_are_taken_and_checked_too(run):
    newest = max(run.checkpoints.glob('epoch-*'))
    torch.save(state(2), newest)  # with neither format nor fingerprint
    assert same(run.load_checkpoint(), state(2))
    with zipfile.ZipFile(newest) as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize(('settings', 'format', 'message'), [
    ({**SETTINGS, 'seed': 7}, None, 'does not belong to .*recipe.json: the settings differ'),
    ({**SETTINGS, 'recipe': dataclasses.replace(RECIPES['smoke'], lr=.2)}, None, 'does not belong to'),
    (SETTINGS, 2, 'was written by a later version of wrn_timm'),
])
def test_a_checkpoint_of_another_run_or_version_is_refused(run, tmp_path, settings, format, message):
    other = RunDir(tmp_path / 'other', settings)
    other.save(state(3), state(3)['history'], draw=False)
    foreign = next(other.checkpoints.glob('epoch-*'))
    if format:
        torch.save({**torch.load(foreign), 'format': format}, foreign)
    foreign.rename(run.checkpoints / foreign.name)
    with pytest.raises(ValueError, match=message):
        RunDir(run.path, SETTINGS, resume=True).load_checkpoint()
    torch.save([1, 2], run.checkpoints / foreign.name)
    with pytest.raises(ValueError, match='is not a checkpoint of a training run'):
        run.load_checkpoint()


def test_recipes_of_other_versions(run):
    """What an older one lacks had the default; what a later one has more cannot be honoured."""
    recipe = json.loads(run.recipe_file.read_text())
    del recipe['recipe']['sam_rho']
    run.recipe_file.write_text(json.dumps(recipe))
    RunDir.check(run.path, SETTINGS, resume=True)
    with pytest.raises(ValueError, match=r'other settings \(recipe.sam_rho: was 0.0, now 0.1\)'):
        RunDir.check(run.path, {**SETTINGS, 'recipe': dataclasses.replace(RECIPES['smoke'], sam_rho=.1)}, resume=True)
    recipe['recipe']['warp'] = 9
    recipe['environment']['wrn_timm'] = '99.0'
    run.recipe_file.write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r'does not know \(recipe.warp\); it was written by version 99.0'):
        RunDir.check(run.path, SETTINGS, resume=True)


@pytest.mark.parametrize(('text', 'message'), [
    ('{"finetune": ', 'is damaged: Expecting value'),
    ('[' * 5000, 'is damaged: '),
    ('[1]', 'is damaged: it is not a JSON object'),
    ('{"finetune": 3}', 'is damaged: '),
    ('{"finetune": {"epochs": "many"}}', 'is damaged: '),
    ('{"finetune": {"epochs": 0}}', 'is damaged: epochs is 0'),
    ('{"finetune": {"warp": 9}, "environment": {"wrn_timm": "99.0"}}', 'does not know (finetune.warp); it was written'),
    ('{"finetune": {"warp": 9}, "environment": 1}', 'does not know (finetune.warp); it was written'),
])
def test_a_damaged_or_later_recipe_is_an_error_line(tmp_path, capsys, text, message):
    (tmp_path / 'recipe.json').write_text(text)
    assert finetune_script.main(['--out', str(tmp_path), '--resume', '--device', 'cpu', '--data', 'nowhere']) == 1
    error = capsys.readouterr().err
    assert error.startswith(f'error: {tmp_path / "recipe.json"} ') and message in error


def test_settings_come_back_from_a_recipe(tmp_path):
    config = FinetuneConfig(epochs=3, parts=('a', 'b', 'c'), lr=.1)
    run = RunDir(tmp_path / 'run', {'finetune': config, 'data': 'x'})
    assert config_of(run.recipe_file, 'finetune', FinetuneConfig) == config


def test_checkpoints_hold_no_weights_that_are_not_finite(run):
    for broken in ('model', 'ema'):
        weights = {'w': torch.tensor([1., math.inf])}
        with pytest.raises(FloatingPointError, match='w is no longer finite after epoch 3, step 0; the checkpoints in'):
            run.save(state(3) | {broken: weights}, state(3)['history'])
    assert run.load_checkpoint()['epoch'] == 2


def test_an_epoch_that_does_not_fit_into_the_time_budget_is_not_begun(run):
    control = RunControl(run, time.monotonic() + 60)
    assert [control.reason_to_stop(ahead) for ahead in (-math.inf, 0., 30., 90.)] == ['', '', '', 'the time budget']
    control = RunControl(run, time.monotonic())
    assert [control.reason_to_stop(ahead) for ahead in (-math.inf, 0.)] == ['', 'the time budget']


def test_fine_tuning_begins_no_epoch_that_does_not_fit(run):
    accelerator = RunAccelerator('cpu')
    finetuner = Finetuner(timm.create_model('wrn16_1'), FinetuneConfig(), accelerator,
                          RunControl(run, time.monotonic() + 60))
    reasons = []
    for epochs, seconds in ((0, 0.), (1, 30.), (1, 90.)):
        finetuner._state.epoch, finetuner._state.epoch_seconds = epochs, seconds
        reasons.append(finetuner._reason_to_stop())
    assert reasons == ['', '', 'the time budget']
    finetuner._load(finetuner._saved())  # as on another machine, which may be faster
    assert finetuner._state.epoch == 1 and finetuner._reason_to_stop() == ''


def test_where_a_run_was_resumed_is_recorded_and_on_its_card(tmp_path, monkeypatch):
    for commit, resume in (('a', False), ('b', True), ('b', True), ('a', True)):
        monkeypatch.setenv('WRN_TIMM_COMMIT', commit)
        run = RunDir(tmp_path / 'run', {'seed': 0}, resume=resume)
        run.save({'epoch': 1, 'step': 1, 'history': []}, [], draw=False)
    monkeypatch.setenv('WRN_TIMM_COMMIT', 'c')
    RunDir(tmp_path / 'run', {'seed': 0}, resume=True)  # opened, and nothing trained
    record = json.loads(run.recipe_file.read_text())
    assert [record['environment']['commit'], *(env['commit'] for env in record['resumed'])] == ['a', 'b']
    line = training_line('1 minute', '2 epochs', 0, record)
    assert line.count('CPU cores') == 1 and 'commit `a`, then torch' in line and line.endswith('commit `b`.')


def test_several_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A100')
    assert environment('cuda')['hardware'] == 'A100'
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 8)
    assert environment('cuda')['hardware'] == '8 x A100'


def test_weights_that_are_not_finite_are_not_exported(tmp_path):
    model = timm.create_model('wrn16_1')
    export_weights(model, tmp_path / 'weights', {'tag': 'x'})
    before = (tmp_path / 'weights' / 'config.json').read_bytes()
    model.fc.weight.data[0, 0] = 1e6
    export_weights(model, tmp_path / 'whole', {'tag': 'x'})
    with pytest.raises(FloatingPointError, match='fc.weight is not finite in torch.float16; nothing is exported to'):
        export_weights(model, tmp_path / 'weights', {'tag': 'x'}, half=True)
    model.bn.running_var[3] = math.nan
    with pytest.raises(FloatingPointError, match='bn.running_var is not finite in torch.float32'):
        export_weights(model, tmp_path / 'weights', {'tag': 'x'})
    assert (tmp_path / 'weights' / 'config.json').read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['weights', 'whole']


def test_answers_that_are_no_numbers_are_said_to_be_none(tmp_path, capsys, monkeypatch):
    model = timm.create_model('wrn16_1')
    model.fc.bias.data[0] = math.nan
    monkeypatch.setattr('wrn_timm.weights.check_weights', lambda *_: None)  # as older versions did
    export_weights(model, tmp_path / 'weights', {'tag': 'x'})
    image = str(min((SAMPLE / 'pizza').iterdir()))
    for script, argv in ((predict_script, [image, '--json']), (validate_script, ['--data', 'synthetic'])):
        assert script.main(['--model', str(tmp_path / 'weights'), '--device', 'cpu', *argv]) == 1
        out, error = capsys.readouterr()
        assert error.splitlines()[-1].startswith('error: the network gives ') and 'not finite' in error and not out
