"""The commands as `wrn-timm`: what they say of wrong words, what is missing, errors, and when they are stopped."""
import dataclasses
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import timm
from conftest import ROOT, SAMPLE

import wrn_timm
from wrn_timm import cli
from wrn_timm.cli import finetune, predict, train
from wrn_timm.cli import validate as validate_script
from wrn_timm.cli.common import reports_errors
from wrn_timm.cli.options import parse
from wrn_timm.recipes import CIFAR10, FinetuneConfig
from wrn_timm.weights import export_weights

COMMANDS = {
    'benchmark': ('start', '--models', 'wrn16_1'),
    'benchmarks.trainers': ('wrn_timm',),
    'detect': ('--model', 'RUN', 'a.jpg'),
    'export': ('--model', 'a', '--to', 'ts', '--out', 'RUN/a.ts'),
    'finetune': ('--out', 'RUN', '--messages', 'quiet'),
    'predict': ('a.jpg', '--model', 'a'),
    'publish': ('a', '--namespace', 'b'),
    'train': ('--recipe', 'smoke', '--out', 'RUN'),
    'validate': ('--model', 'a', '--data', 'b'),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_has_a_last_resort(name, monkeypatch, tmp_path, capsys):
    script = importlib.import_module(f'wrn_timm.cli.{name}' if name in cli.COMMANDS else name)
    table = tmp_path / 'table.csv'
    table.write_text('')

    def broken(*args, **kwargs):
        source = table  # noqa: F841
        raise KeyError('column')

    for call in ('compare', 'open_detector', 'open_model', 'finetune_seeds', 'predict_files', 'publish',
                 'train', 'validate'):
        if hasattr(script, call):
            monkeypatch.setattr(script, call, broken)
    if name == 'benchmark':
        monkeypatch.setitem(script.SECTIONS, 'start', broken)
    argv = [a.replace('RUN', str(tmp_path / 'run')) for a in COMMANDS[name]]
    assert script.main(argv) == 1
    error = capsys.readouterr().err
    said = f"error: KeyError: 'column', at {table}; --traceback prints the full traceback\n"
    assert error == ('start: ' if name == 'benchmark' else '') + said  # its other sections go on
    with pytest.raises(KeyError):
        script.main([*argv, '--traceback'])


def test_every_command_is_a_script_too_and_nothing_is_left_out():
    scripts = {p.stem: p.read_text() for p in (ROOT / 'scripts').glob('*.py')}
    assert set(scripts) == {*cli.COMMANDS, 'benchmark', 'tables'}
    assert {*cli.COMMANDS, 'benchmark', 'benchmarks.trainers'} == set(COMMANDS)
    assert all(f"main = command('{name}')" in scripts[name] for name in cli.COMMANDS)
    assert sum(text.count('\n') for text in scripts.values()) < 450
    modules = {p.stem for p in (ROOT / 'wrn_timm' / 'cli').glob('*.py')} - {'__init__', '__main__', 'common', 'options'}
    assert modules == set(cli.COMMANDS)


def test_the_commands_are_listed_with_the_first_line_of_their_help(capsys):
    assert cli.main(['--help']) == cli.main([]) == 0
    once = capsys.readouterr().out
    for name, line in cli.COMMANDS.items():
        module = importlib.import_module(f'wrn_timm.cli.{name}')
        assert module.__doc__.splitlines()[0] == line and once.count(f'  {name:10}{line}\n') == 2
    assert cli.main(['--version']) == 0
    assert capsys.readouterr().out == f'wrn-timm {wrn_timm.__version__}\n'


def test_a_wrong_command_names_the_nearest(capsys):
    assert cli.main(['fine-tune', '--out', 'RUN']) == 2
    assert capsys.readouterr().err.startswith("error: command 'fine-tune' is unknown; nearest: finetune; known: ")


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_says_every_option_once_with_its_default(name, capsys, monkeypatch):
    for argv0, prog in (('/usr/bin/wrn-timm', f'wrn-timm {name}'), (f'there/{name}.py', f'scripts/{name}.py')):
        monkeypatch.setattr(sys, 'argv', [argv0])
        with pytest.raises(SystemExit) as done:
            cli.main([name, '--help'])
        assert done.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f'usage: {prog} [OPTIONS]') and (f'python {prog} ' in text) == prog.endswith('.py')
    assert text.count('\n  --traceback') == 1
    assert '--device' not in text or '(default: ' in text
    groups = re.split(r'^(?=\S.*:$)', text, flags=re.M)[1:]
    assert all(len(re.findall('^  --', group, flags=re.M)) <= 14 for group in groups)
    module = importlib.import_module(f'wrn_timm.cli.{name}')
    kind, = (v for k, v in vars(module).items() if k == f'{name.title()}Options')
    shown = {n.replace('-', '_') for n in re.findall(r'^  --([\w-]+)', text, flags=re.M)}
    assert {f.name for f in dataclasses.fields(kind)} <= shown | {'images', 'folders'}


@pytest.mark.parametrize(('argv', 'images'), [
    (['--top-k', '2', '--', '-x.jpg', 'a.jpg'], ('-x.jpg', 'a.jpg')), (['--', '-x.jpg'], ('-x.jpg',)),
    (['a.jpg', '--top-k', '2', 'b.jpg'], ('a.jpg', 'b.jpg')), (['-', '--csv'], ('-',))])
def test_images_may_stand_anywhere(argv, images):
    options, _ = parse(argv, ('predict', ''), predict.PredictOptions)
    assert options.images == images


def test_a_wrong_option_names_the_nearest_and_how_it_was_called(capsys, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['wrn-timm'])
    for argv, message in (
            (['predict', 'a.jpg', '--topk', '2'], 'option --topk is unknown; nearest: --top-k'),
            (['predict', 'a.jpg', '--top-k', 'two'], "argument --top-k: invalid int value: 'two'"),
            (['predict', 'a.jpg', '--csv', '--json'], 'choose one of --json and --csv'),
            (['predict'], 'the following arguments are required: IMAGE'),
            (['predict', 'a.jpg', '--batch-size', '0'], 'batch_size is 0; it must be at least 1'),
            (['validate', '--model', 'a', '--data', 'b', '--precision', 'half'], 'invalid choice: '),
            (['train', '--recipe', 'smoke', '--out', 'a', '--sizes', '16'], '16: give 2 numbers at a time'),
            (['train', '--recipe', 'smoke', '--out', 'a', '--epochs', '0'], 'epochs is 0; it must be at least 1'),
            (['train', '--recipe', 'smoke', '--out', 'a', '--momentum', '0'], 'Nesterov momentum needs one above 0'),
            (['finetune', '--batch-size', 'much'], "argument --batch-size: invalid int or auto value: 'much'"),
            (['publish', '--namespace', 'a'], 'give folders, or --all'),
            (['finetune', 'DIR'], 'unexpected argument DIR'),
            (['finetune', '--epochsx', '0'], 'option --epochsx is unknown; nearest: --epochs'),
    ):
        with pytest.raises(SystemExit) as done:
            cli.main(argv)
        error = capsys.readouterr().err
        assert done.value.code == 2 and error.startswith('error: ') and message in error
        assert error.endswith(f'\nwrn-timm {argv[0]} --help shows the options\n') and error.count('\n') == 2


def test_options_are_read_as_their_types_say():
    recipe = train.read(['--recipe', 'cifar10', '--out', 'a', '--sizes', '16', '0.25', '24', '0.2', '--drop-epochs',
                         '1', '2', '--no-auto-augment', '--no-flip', '--no-alternate-flip', '--lr', '1e-2'])[1]
    assert recipe == dataclasses.replace(
        CIFAR10, sizes=((16, .25), (24, .2)), drop_epochs=(1, 2), auto_augment=False, flip=False,
        alternate_flip=False, lr=.01)
    options, config = finetune.read(['--data', 'a', '--batch-size', 'auto', '--parts', 'a', 'b'])
    assert (config.batch_size, config.parts, options.probe, options.resume) == ('auto', ('a', 'b'), (), False)
    assert finetune.read(['--data', 'a', '--batch-size', '8'])[1] == FinetuneConfig(batch_size=8)
    assert train.read(['--recipe', 'smoke', '--out', 'a'])[0].compile is None
    assert train.read(['--recipe', 'smoke', '--out', 'a', '--no-compile'])[0].compile is False


@pytest.mark.parametrize(('name', 'package', 'extra'), [
    ('predict', 'docstring_parser', 'train'), ('detect', 'pycocotools', 'detect'),
    ('export', 'docstring_parser', 'train,export')])
def test_a_package_that_is_not_installed_names_its_extra(name, package, extra, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    for module in (name, 'options'):  # which are loaded anew and fail, so that nothing else is
        monkeypatch.delitem(sys.modules, f'wrn_timm.cli.{module}', raising=False)
    assert cli.main([name, '--help']) == 1
    assert capsys.readouterr().err == (
        f'error: {name} needs {package}, which is not installed; in a clone of wrn_timm: pip install -e ".[{extra}]"\n')


def test_a_package_that_is_missed_late_names_its_extra(capsys):
    def main(argv):
        raise ModuleNotFoundError('No module named', name='fiftyone')

    main.__module__ = 'wrn_timm.cli.detect'
    assert reports_errors(main)([]) == 1
    assert capsys.readouterr().err == (
        'error: detect needs fiftyone, which is not installed; in a clone of wrn_timm: pip install -e ".[detect]"\n')


def test_exit_codes_of_what_was_stopped(monkeypatch, tmp_path, capsys):
    """`train && validate` is not to go on with half a run."""
    run = str(tmp_path / 'run')
    smoke = ['--recipe', 'smoke', '--out', run, '--device', 'cpu']
    assert train.main([*smoke, '--time-budget', '0']) == 130 and 'weights: ' not in capsys.readouterr().out
    monkeypatch.setattr(train, 'train', lambda *args, **kwargs: None)
    assert train.main(smoke) == 130
    monkeypatch.setenv('RANK', '1')  # which has no weights folder to name
    assert train.main(smoke) == 0
    monkeypatch.delenv('RANK')

    def terminated(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(predict, 'predict_files', terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert predict.main(['a.jpg', '--model', 'b']) == 130 and capsys.readouterr().err.endswith('stopped\n')
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr(finetune, 'finetune_seeds', lambda *args, **kwargs: None)
    assert finetune.main(['--data', 'a', '--out', run, '--messages', 'quiet']) == 130


IN_A_WHEEL = '''
import sys
from wrn_timm.cli import main
data, device = ['--data', 'data'], ['--device', 'cpu']
try:
    main(['finetune'])
except SystemExit as e:
    print('code', e.code, file=sys.stderr)
assert main(['finetune', *data, *device, '--out', 'RUN', '--model', 'wrn16_1.cifar10', '--epochs', '1']) == 0
assert main(['predict', *device, '--model', 'RUN/best', 'data']) == 0
test = ['--data', 'folder:data', '--split', 'RUN/split.csv']
assert main(['validate', *device, '--model', 'RUN', *test, '--write']) == 0
assert main(['export', '--model', 'RUN', '--to', 'ts', '--out', 'wrn.ts']) == 0
'''


def test_the_wheel_has_the_commands_without_a_checkout(tmp_path):
    """With the files that pyproject.toml puts into it."""
    shutil.copytree(ROOT / 'wrn_timm', tmp_path / 'site' / 'wrn_timm')
    pyproject = (ROOT / 'pyproject.toml').read_text()
    included = dict(re.findall('^"(.*)" = "(wrn_timm/.*)"$', pyproject, flags=re.M))
    assert len(included) == 3 + len(list(SAMPLE.iterdir()))
    for source, to in included.items():
        (tmp_path / 'site' / to).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / 'site' / to)
    for name in ('ketch', 'pizza'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for path in sorted((SAMPLE / name).iterdir())[:8]:
            shutil.copy(path, tmp_path / 'data' / name)
    done = subprocess.run([sys.executable, '-c', IN_A_WHEEL], capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')})
    assert done.returncode == 0, done.stderr
    assert 'error: --data is missing: give a folder with one folder of photographs per class' in done.stderr
    assert 'code 2\n' in done.stderr and 'data/pizza/image_0001.jpg\n' in done.stdout
    with np.load(tmp_path / 'RUN' / 'best' / 'golden.npz') as golden:
        assert len(golden['images']) == len(list(SAMPLE.iterdir()))


def test_the_workflow_runs_the_command_of_readme():
    command = re.findall('^pip install .*$', (ROOT / 'README.md').read_text(), flags=re.M)[1]
    assert f'run: {command}\n' in (ROOT / '.github' / 'workflows' / 'test.yml').read_text()


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
    (None, 'wrn16_1.test holds no recipe.json: only folders that wrn-timm train or finetune wrote can be finished'),
    ('{"recipe": {}', 'recipe.json is damaged: '),
    ('{"converted_from": "x"}', 'recipe.json describes no run of wrn-timm train or finetune'),
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
