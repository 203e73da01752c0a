"""What commands say of errors that nobody foresaw."""
import importlib
import json
import shutil
import sys

import pytest
import timm
import validate as validate_script
from conftest import ROOT, SAMPLE

import wrn_timm  # noqa: F401
from wrn_timm.command import reports_errors
from wrn_timm.weights import export_weights

COMMANDS = {
    'benchmark': ('start', '--models', 'wrn16_1'),
    'compare_trainers': ('wrn_timm',),
    'detect': ('--out', 'RUN', '--draw', 'a.jpg'),
    'export': ('--model', 'a', '--to', 'ts', '--out', 'RUN/a.ts'),
    'finetune': ('--out', 'RUN', '--messages', 'quiet'),
    'predict': ('a.jpg', '--model', 'a'),
    'publish': ('a', '--namespace', 'b'),
    'train': ('--recipe', 'smoke', '--out', 'RUN'),
    'validate': ('--model', 'a', '--data', 'b'),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_a_last_resort(name, monkeypatch, tmp_path, capsys):
    script = importlib.import_module(name)
    table = tmp_path / 'table.csv'
    table.write_text('')

    def broken(*args, **kwargs):
        source = table  # noqa: F841
        raise KeyError('column')

    for call in ('unpack', 'compare', 'load_detector', 'open_model', 'finetune_seeds', 'predict_files', 'publish',
                 'train', 'validate'):
        if hasattr(script, call):
            monkeypatch.setattr(script, call, broken)
    if name == 'benchmark':
        monkeypatch.setitem(script.SECTIONS, 'start', broken)
    argv = [a.replace('RUN', str(tmp_path / 'run')) for a in COMMANDS[name]]
    assert script.main(argv) == 1
    error = capsys.readouterr().err
    assert error == f"error: KeyError: 'column', at {table}; --traceback shows where it arose\n"
    with pytest.raises(KeyError):
        script.main([*argv, '--traceback'])


def test_every_script_that_is_a_command_is_among_them():
    scripts = {p.stem for p in (ROOT / 'scripts').glob('*.py') if 'reports_errors' in p.read_text()}
    assert scripts == set(COMMANDS) and {p.stem for p in (ROOT / 'scripts').glob('*.py')} - scripts == {'tables'}


def test_errors_that_are_meant_for_the_user_stand_by_themselves(capsys, monkeypatch):
    @reports_errors
    def main(argv):
        raise ValueError(f'epochs is {argv[0]}')

    assert main(['0']) == 1 and capsys.readouterr().err == 'error: epochs is 0\n'
    monkeypatch.setattr(sys, 'argv', ['x.py', '7'])
    assert main() == 1 and capsys.readouterr().err == 'error: epochs is 7\n'


@pytest.fixture
def folder(tmp_path):
    """Weights that no run of ours has made."""
    path = tmp_path / 'wrn16_1.test'
    export_weights(timm.create_model('wrn16_1'), path, {'tag': 'test'})
    return path


@pytest.mark.parametrize(('recipe', 'message'), [
    (None, 'wrn16_1.test holds no recipe.json: only folders that train.py or finetune.py wrote can be finished'),
    ('{"recipe": {}', 'recipe.json is damaged: '),
    ('{"converted_from": "x"}', 'recipe.json tells of no run of train.py or finetune.py'),
])
def test_a_card_is_written_of_our_runs_alone(folder, capsys, recipe, message):
    (folder / 'history.csv').write_text('epoch\n1\n')
    if recipe:
        (folder / 'recipe.json').write_text(recipe)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    args = ['--model', str(folder), '--data', 'cifar10:nowhere', '--device', 'cpu', '--write']
    assert validate_script.main(args) == 1
    assert message in capsys.readouterr().err  # before the data is looked for
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_damaged_scan_of_a_run_is_named(weights, tmp_path, capsys):
    finetune = importlib.import_module('finetune')
    for name in ('ketch', 'pizza'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for path in sorted((SAMPLE / name).iterdir())[:6]:
            shutil.copy(path, tmp_path / 'data' / name)
    args = ['--data', str(tmp_path / 'data'), '--model', weights, '--out', str(tmp_path / 'run'), '--device', 'cpu',
            '--input-size', '32', '--epochs', '1', '--messages', 'quiet']
    assert finetune.main(args) == 0
    scan = tmp_path / 'run' / 'scan.json'
    for damage in ('{', json.dumps([1])):
        scan.write_text(damage)
        assert finetune.main([*args, '--resume']) == 1
        assert f'error: {scan} is damaged: ' in capsys.readouterr().err
