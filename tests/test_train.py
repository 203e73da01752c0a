"""Training from scratch: what is learnt, kept, resumed and refused."""
import copy
import csv
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import ROOT, SAMPLE, randomise
from processes import SERVER, Command
from safetensors.torch import load_file
from timm.optim.muon import zeropower_via_newtonschulz
from torchvision.transforms.functional import gaussian_blur, resize
from two_processes import gradients

from wrn_timm.card import check_golden, model_card
from wrn_timm.cli import train as train_script
from wrn_timm.cli import validate as validate_script
from wrn_timm.data.on_device import DeviceLoader
from wrn_timm.data.small_sets import load
from wrn_timm.recipes import RECIPES, get_recipe
from wrn_timm.train import scratch
from wrn_timm.train.machine import resolve_precision
from wrn_timm.train.measure import evaluate, validate
from wrn_timm.train.metrics import classification_metrics
from wrn_timm.train.optimizers import Muon, create_optimizer
from wrn_timm.train.run import RunDir
from wrn_timm.train.scratch import Learner, ScratchMachine, _climb, _schedule
from wrn_timm.weights import export_weights, open_model, sha256_of


def train(recipe, data, out, half=False, **machine):
    return scratch.train(recipe, data, out, half=half, machine=ScratchMachine(**machine))


SMOKE = RECIPES['smoke']
KILLED = dataclasses.replace(SMOKE, batch_size=8, holdout=0)


def weights_of(run):
    return timm.create_model(f'local-dir:{run / "weights"}', pretrained=True).eval()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('runs') / 'smoke'
    assert train_script.main(['--recipe', 'smoke', '--out', str(path), '--device', 'cpu']) == 0
    return path


def test_a_run_learns_and_keeps_its_records(run):
    assert not torch.backends.cudnn.benchmark  # which only the run has on
    history = list(csv.DictReader((run / 'history.csv').read_text().splitlines()))
    assert len(history) == SMOKE.epochs and float(history[-1]['train_loss']) < float(history[0]['train_loss']) / 2
    recipe = json.loads((run / 'recipe.json').read_text())
    assert recipe['recipe'] == json.loads(json.dumps(dataclasses.asdict(SMOKE)))
    assert recipe['environment']['torch'] == torch.__version__
    assert (run / 'curves.png').stat().st_size > 5000
    assert not list(run.glob('**/*.part*'))


def test_interrupted_and_resumed_run_ends_with_the_same_weights(run, tmp_path):
    out = tmp_path / 'run'
    assert train(SMOKE, '', out, time_budget=0) is None
    assert train(SMOKE, '', out, time_budget=0, resume=True) is None
    assert train(SMOKE, '', out, resume=True) == out / 'weights'
    assert final_weights(out) == final_weights(run)


def test_dropout_runs_resume_with_the_same_random_numbers(tmp_path):
    recipe = dataclasses.replace(SMOKE, epochs=2, conv_drop_rate=0.3, holdout=0)
    train(recipe, '', tmp_path / 'whole')
    train(recipe, '', tmp_path / 'cut', time_budget=0)
    train(recipe, '', tmp_path / 'cut', resume=True)
    assert final_weights(tmp_path / 'whole') == final_weights(tmp_path / 'cut')


def test_another_run_is_not_written_over(run, tmp_path, capsys):
    before = (run / 'recipe.json').read_bytes()
    assert train_script.main(['--recipe', 'smoke', '--out', str(run)]) == 1
    assert f'{run} already holds a run; choose another --out, or continue with --resume' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(run), '--resume', '--seed', '7']) == 1
    assert 'was started with other settings (seed: was 0, now 7)' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--resume']) == 1
    assert 'holds no run to resume' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'quik', '--out', str(tmp_path / 'none')]) == 1
    assert "recipe 'quik' is unknown; nearest: quick; known: paper_cifar10" in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--tracker', 'tensorbord']) == 1
    assert "tracker 'tensorbord' is not known or not installed" in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--model', 'wrn9_9']) == 1
    assert 'wrn9_9' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'quick', '--data', 'nowhere', '--out', str(run)]) == 1
    assert 'already holds a run' in capsys.readouterr().err  # said before the data is looked for
    assert (run / 'recipe.json').read_bytes() == before and not (tmp_path / 'none').exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe = dataclasses.replace(SMOKE, lr=1e30)
    with pytest.raises(FloatingPointError, match='the loss is nan in epoch 1'):
        train(recipe, '', tmp_path / 'run')
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


@pytest.mark.parametrize(('option', 'value'), [
    ('lr', math.inf), ('weight_decay', math.nan), ('label_smoothing', math.nan), ('sam_rho', -1.)])
def test_settings_that_are_no_numbers_are_refused(option, value):
    with pytest.raises(ValueError, match=f'{option} is {value:g}; it must be finite and at least 0'):
        dataclasses.replace(SMOKE, **{option: value})


@pytest.mark.parametrize('option', ['holdout', 'pad', 'cutout', 'rand_augment'])
def test_counts_below_0_are_refused(option):
    with pytest.raises(ValueError, match=f'{option} is -5; it must be at least 0'):
        dataclasses.replace(SMOKE, **{option: -5})


@pytest.mark.parametrize('option', ['time_budget', 'checkpoint_every'])
def test_seconds_that_are_no_number_are_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f'{option} is nan; it must be at least 0'):
        train(SMOKE, '', tmp_path / 'run', **{option: math.nan})
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('holdout', [0, 128])
def test_weights_that_are_not_finite_are_neither_kept_nor_exported(tmp_path, monkeypatch, holdout):
    """The last step of a run breaks them, whose loss was taken before it."""
    taken, step = [0], torch.optim.SGD.step

    def breaking(self, *args, **kwargs):
        step(self, *args, **kwargs)
        taken[0] += 1
        if taken[0] == 4:
            self.param_groups[0]['params'][0].data.fill_(math.nan)

    monkeypatch.setattr(torch.optim.SGD, 'step', breaking)
    half = (len(load('synthetic', '', train=True)) - holdout) // 2
    recipe = dataclasses.replace(SMOKE, epochs=2, batch_size=half, holdout=holdout, ema_decay=0.)
    with pytest.raises(FloatingPointError, match='epoch 2.* are not affected'):
        train(recipe, '', tmp_path / 'run', checkpoint_every=0.)
    assert not (tmp_path / 'run' / 'weights').exists()
    monkeypatch.undo()
    assert train(recipe, '', tmp_path / 'run', resume=True)


def test_held_out_images_are_not_trained_on():
    train_images, holdout, every = ({image.numpy().tobytes() for image in part.images} for part in (
        *scratch._data(SMOKE, '', False, rank=0, world=1), load('synthetic', '', train=True)))
    assert len(holdout) == SMOKE.holdout and not train_images & holdout and train_images | holdout == every


def test_optimiser_is_torchs_sgd_with_a_cosine(run):
    """One epoch of the loop against the same steps written out."""
    recipe = dataclasses.replace(get_recipe('smoke'), epochs=1, ema_decay=0., holdout=0)
    out = train(recipe, '', run.parent / 'one', precision='no')
    torch.manual_seed(0)
    data = load('synthetic', '', train=True)
    model = timm.create_model('wrn16_1').to(memory_format=torch.channels_last).train()
    loader = DeviceLoader(data, 64, 'cpu', seed=0)
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step, (x, y) in enumerate(loader.epoch(0)):
        lr = recipe.lr * (1 + math.cos(math.pi * step / len(loader))) / 2
        grads = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, g, v in zip(model.parameters(), grads, velocity, strict=True):
                g = g + recipe.weight_decay * p
                v.copy_(recipe.momentum * v + g if step else g)
                p -= lr * (g + recipe.momentum * v)
    trained = timm.create_model(f'local-dir:{out}', pretrained=True)
    for a, b in zip(trained.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)


def test_validate_reloads_measures_and_finishes_the_folder(run, capsys):
    folder = run / 'weights'
    assert validate_script.main(['--model', str(folder), '--data', 'synthetic', '--device', 'cpu', '--write']) == 0
    metrics = json.loads(capsys.readouterr().out)
    data = load('synthetic', '', train=False)
    model = weights_of(run)
    assert metrics['top1'] == pytest.approx(evaluate(model, data, torch.device('cpu'))['accuracy'], abs=1e-3)
    assert metrics['images'] == 256 and metrics.pop('skipped') == []  # whose paths are not published
    assert metrics == json.loads((folder / 'metrics.json').read_text())
    assert check_golden(folder) < 1e-5
    card = (folder / 'README.md').read_text()
    assert card == model_card(folder)
    assert card.split('```python\n')[1].startswith('import wrn_timm\n')
    assert 'library_name: timm' in card
    assert 'wrn-timm train --recipe smoke --data DIR --out RUN --seed 0' in card


def test_the_card_has_mean_and_spread_over_seeds(run, tmp_path, capsys):
    folders = [shutil.copytree(run / 'weights', tmp_path / str(seed)) for seed in range(3)]
    for seed, folder in enumerate(folders[1:], start=1):  # other weights, of their own seed
        recipe = json.loads((folder / 'recipe.json').read_text()) | {'seed': seed}
        assert recipe['recipe'].pop('alternate_flip') is False  # as written before this setting existed
        (folder / 'recipe.json').write_text(json.dumps(recipe))
        model = open_model(str(run))
        model.fc.weight.data[:seed].zero_()
        export_weights(model, tmp_path / 'other', {k: model.pretrained_cfg[k] for k in ('label_names', 'mean', 'std')})
        for name in ('config.json', 'model.safetensors'):
            shutil.copy(tmp_path / 'other' / name, folder)
    expected = [validate(str(folder), 'synthetic')['top1'] for folder in folders]
    first, *others = map(str, folders)
    args = ['--model', first, '--data', 'synthetic', '--device', 'cpu']
    assert validate_script.main([*args, '--write', '--other-seeds', *others]) == 0
    over = json.loads(capsys.readouterr().out)['seeds']['top1']
    assert over['values'] == expected and over['mean'] == pytest.approx(statistics.mean(expected), abs=1e-3)
    card = (folders[0] / 'README.md').read_text()
    assert f'seed 0 of 3, over which the error is {100 - over["mean"]:.2f} ± {statistics.stdev(expected):.2f} %' in card
    assert validate_script.main([*args, '--write', '--other-seeds', others[0], others[0]]) == 1
    assert 'the seeds are 0, 1' in capsys.readouterr().err
    recipe['recipe']['lr'] = 3.
    (folders[2] / 'recipe.json').write_text(json.dumps(recipe))
    assert validate_script.main([*args, '--write', '--other-seeds', *others]) == 1
    assert f'was trained with another recipe than {first} (lr)' in capsys.readouterr().err
    recipe['finetune'] = recipe.pop('recipe')
    (folders[2] / 'recipe.json').write_text(json.dumps(recipe))
    assert validate_script.main([*args, '--write', '--other-seeds', *others]) == 1
    assert 'was fine-tuned, and --other-seeds is for weights of wrn-timm train' in capsys.readouterr().err


@pytest.mark.parametrize('most', [3, 0])
def test_validate_takes_a_smaller_batch_where_memory_is_short(run, monkeypatch, most):
    expected = validate(str(run), f'synthetic:{run}')
    tried = []

    def hungry(name):
        model = open_model(name)
        model.register_forward_pre_hook(lambda _, args: check(len(args[0])))
        return model

    def check(n):
        if n > most:
            tried.append(n)
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')

    monkeypatch.setattr('wrn_timm.train.measure.open_model', hungry)
    if most:
        assert validate(str(run), f'synthetic:{run}', batch_size=50) == expected and tried == [50, 25, 12, 6]
    else:
        with pytest.raises(RuntimeError, match='not even one image of 32 px fits into the memory of cpu'):
            validate(str(run), f'synthetic:{run}', batch_size=50)
    with pytest.raises(ValueError, match='batch_size is 0; it must be at least 1'):
        validate(str(run), f'synthetic:{run}', batch_size=0)


def test_validate_refuses_other_classes(run, tmp_path, capsys):
    assert validate_script.main(['--model', str(run / 'weights'), '--data', f'folder:{SAMPLE}']) == 1
    assert 'knows 10 classes (airplane, automobile, bird...)' in capsys.readouterr().err
    assert validate_script.main(['--model', str(run / 'weights'), '--data', f'cifar100:{tmp_path}']) == 1
    assert 'cifar100: the official files under' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        validate_script.main(['--model', 'wrn16_1.cifar10', '--data', 'synthetic', '--write'])


def test_metrics_against_counting_by_hand():
    logits = torch.tensor([[4., 1, 0], [0, 3, 1], [2, 1, 0], [0, 0, 5.]])
    labels = torch.tensor([0, 1, 1, 2])
    metrics = classification_metrics(logits, labels, ('a', 'b', 'c'))
    assert metrics['top1'] == 75. and metrics['mean_per_class'] == pytest.approx(100 * (1 + .5 + 1) / 3, abs=1e-3)
    assert metrics['per_class'] == {'a': 100., 'b': 50., 'c': 100.} and metrics['top5'] is None
    confidence = logits.softmax(1).max(1).values
    hits = torch.tensor([1., 1, 0, 1])
    bins = (confidence * 15).ceil().long()
    gap = sum(abs((hits[bins == b] - confidence[bins == b]).sum().item()) for b in set(bins.tolist())) / 4
    assert metrics['ece'] == pytest.approx(100 * gap, abs=1e-2)
    assert metrics['precision'] == {'a': pytest.approx(50), 'b': 100., 'c': 100.}
    # a class without images has no share in the mean
    logits = torch.cat([logits, torch.full((4, 1), -99.)], 1)
    more = classification_metrics(logits, labels, ('a', 'b', 'c', 'd'))
    assert more['mean_per_class'] == metrics['mean_per_class']
    assert more['per_class'] == metrics['per_class'] | {'d': None}


def final_weights(run):
    return sha256_of(run / 'weights/model.safetensors')


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


def test_twenty_times_killed_the_weights_are_those_of_a_run_never_killed(tmp_path):
    """Real SIGKILLs at random moments: in a step, in the writing of a checkpoint, of the curves, of the weights."""
    def start(out, resume):
        process = SERVER.Process(
            target=scratch.train, args=(KILLED, '', out),
            kwargs={'machine': ScratchMachine(checkpoint_every=0., resume=resume)})
        process.start()
        return process

    begun = time.monotonic()
    start(tmp_path / 'whole', False).join()
    pause = min(0.3, (time.monotonic() - begun) / 30)  # twenty of which end before the run does
    rng, kills, out = random.Random(0), 0, tmp_path / 'cut'
    while True:
        process = start(out, resume=(out / 'recipe.json').is_file())
        known = set(out.glob('checkpoints/epoch-*.pt'))
        while kills < 20 and process.is_alive() and set(out.glob('checkpoints/epoch-*.pt')) <= known:
            time.sleep(0.005)  # each start makes some way, or twenty kills would be twenty starts
        process.join(rng.uniform(0, pause) if kills < 20 else None)
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills == 20
    assert not list(out.rglob('*.part*'))  # of checkpoints that were being written
    assert final_weights(out) == final_weights(tmp_path / 'whole')


def train_until_killed(monkeypatch, recipe, out, steps, **kwargs):
    """Train and be killed in the middle of the given optimiser step; True if the run ended before."""
    taken, step = [0], Learner.step

    def counted(self, *args, **kw):
        taken[0] += 1
        result = step(self, *args, **kw)
        if taken[0] > steps:
            raise Killed
        return result

    with monkeypatch.context() as m:
        m.setattr(Learner, 'step', counted)
        try:
            train(recipe, '', out, checkpoint_every=0., **kwargs)
        except Killed:
            return False
    return True


@pytest.mark.parametrize('extra', [
    {}, {'conv_drop_rate': .3, 'mixup': .2, 'cutmix': 1.}, {'sam_rho': .05, 'trivial_augment': True, 'cutout': 8},
    {'opt': 'muon', 'lr': .06, 'schedule': 'linear', 'warmup_epochs': .5, 'sizes': ((16, .5),)}])
def test_killed_at_random_steps_and_resumed_the_weights_are_the_same(tmp_path, monkeypatch, extra):
    recipe = dataclasses.replace(SMOKE, epochs=2, **extra)
    train(recipe, '', tmp_path / 'whole')
    rng, kills = random.Random(0), 0
    while not train_until_killed(monkeypatch, recipe, tmp_path / 'cut', rng.randint(1, 3), resume=kills > 0):
        kills += 1
    assert kills >= 3
    assert final_weights(tmp_path / 'cut') == final_weights(tmp_path / 'whole')


def smoke(out, *argv):
    return ['--recipe', 'smoke', '--out', str(out), '--device', 'cpu', *argv]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_leave_a_run_that_resumes_to_the_same_weights(run, tmp_path, number):
    out = tmp_path / 'run'
    command = Command('train', *smoke(out, '--checkpoint-every', '0'), errors=tmp_path / 'errors')
    while command.has_not_ended() and not list(out.glob('checkpoints/epoch-*.pt')):
        time.sleep(0.01)
    os.kill(command.process.pid, number)
    status, errors = command.end()
    if number != signal.SIGKILL:
        assert status == 130 and f'stopped by {signal.Signals(number).name}' in errors
    assert train_script.main(smoke(out, '--resume')) == 0
    assert final_weights(out) == final_weights(run)


def test_a_damaged_checkpoint_is_passed_over(run, tmp_path, caplog):
    out = tmp_path / 'run'
    train(SMOKE, '', out, time_budget=0, checkpoint_every=0.)
    train(SMOKE, '', out, time_budget=0, resume=True)
    newest = max(out.glob('checkpoints/epoch-*.pt'))
    newest.write_bytes(newest.read_bytes()[:1000])
    train(SMOKE, '', out, resume=True)
    assert f'{newest} is damaged' in caplog.text and newest.with_suffix('.damaged').is_file()
    assert final_weights(out) == final_weights(run)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(tmp_path):
    out = tmp_path / 'run'
    train(SMOKE, '', out, time_budget=0)
    only, = out.glob('checkpoints/*.pt')
    only.write_bytes(only.read_bytes()[:1000])
    with pytest.raises(ValueError, match='every checkpoint in .* is damaged; start again with another --out'):
        train(SMOKE, '', out, resume=True)
    assert only.is_file()


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    out = tmp_path / 'run'
    train(SMOKE, '', out, time_budget=0)
    before = {p: sha256_of(p) for p in out.glob('checkpoints/*')}

    def full(state, path):
        path.write_bytes(b'half')
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as m:
        m.setattr(torch, 'save', full)
        with pytest.raises(OSError, match='No space left'):
            train(SMOKE, '', out, resume=True)
    assert {p: sha256_of(p) for p in out.glob('checkpoints/*')} == before and len(before) == 1
    assert not list(out.rglob('*.part*'))


def test_the_last_two_checkpoints_and_the_best_are_kept(run):
    kept = sorted(p.name for p in (run / 'checkpoints').iterdir())
    assert kept == ['best.pt', 'epoch-0002-step-000000.pt', 'epoch-0003-step-000000.pt']
    history = list(csv.DictReader((run / 'history.csv').read_text().splitlines()))
    best = max(history, key=lambda r: (float(r['holdout_accuracy']), int(r['epoch'])))
    assert torch.load(run / 'checkpoints/best.pt', weights_only=True)['epoch'] == int(best['epoch'])


def test_the_best_is_kept_by_a_run_killed_before_it_could_be(tmp_path):
    settings, run = {'seed': 0}, RunDir(tmp_path / 'run', {'seed': 0})
    history = [{'epoch': 1, 'holdout_accuracy': 50.}, {'epoch': 2, 'holdout_accuracy': 60.}]
    run.save({'epoch': 1, 'step': 0, 'history': history[:1]}, history[:1])
    before = (run.checkpoints / 'best.pt').read_bytes()
    run.save({'epoch': 2, 'step': 0, 'history': history}, history)
    (run.checkpoints / 'best.pt').unlink()  # a link to the newest
    (run.checkpoints / 'best.pt').write_bytes(before)
    (run.checkpoints / '.epoch-0003-step-000000.pt.part12345.pt').write_bytes(b'half')
    again = RunDir(tmp_path / 'run', settings, resume=True)
    assert again.load_checkpoint()['epoch'] == 2 and again.load_best()['epoch'] == 2
    assert not list(again.path.rglob('*.part*'))


def test_rates_are_of_the_steps_that_were_timed(tmp_path):
    recipe = dataclasses.replace(SMOKE, batch_size=384, epochs=2, holdout=0)  # a step an epoch
    train(recipe, '', tmp_path)
    first, second = csv.DictReader((tmp_path / 'history.csv').read_text().splitlines())
    assert first['images_per_second'] == '0'  # the first step of a run is not timed
    took = float(second['seconds']) - float(first['seconds'])
    assert int(second['images_per_second']) == pytest.approx(384 / took, rel=0.1)


def test_recipes_and_their_overrides(tmp_path, capsys):
    paper = RECIPES['paper_cifar10']
    assert (paper.lr, paper.drop_epochs, paper.drop_factor, paper.weight_decay, paper.batch_size, paper.epochs) == (
        .1, (60, 120, 160), .2, 5e-4, 128, 200)
    out = tmp_path / 'run'
    assert train_script.main(['--recipe', 'smoke', '--out', str(out), '--device', 'cpu', '--model', 'resnet18',
                              '--schedule', 'step', '--drop-epochs', '1', '2']) == 0
    recipe = json.loads((out / 'recipe.json').read_text())['recipe']
    assert (recipe['model'], recipe['drop_epochs'], recipe['lr']) == ('resnet18', [1, 2], SMOKE.lr)
    with pytest.raises(SystemExit):
        train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--label-smooting', '0.1'])
    assert '--label-smoothing' in capsys.readouterr().err
    for drops, told in (((), 'not given'), ((1, 3), '1, 3')):
        with pytest.raises(ValueError, match=f'drop_epochs are {told}; the step schedule needs some, all below the 3'):
            dataclasses.replace(SMOKE, schedule='step', drop_epochs=drops)
    with pytest.raises(ValueError, match="schedule 'lineal' is unknown; choose 'cosine', 'linear' or 'step'"):
        dataclasses.replace(SMOKE, schedule='lineal')


def test_paper_schedule_drops_at_its_epochs():
    recipe = RECIPES['paper_cifar10']
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], recipe.lr)
    scheduler = _schedule(recipe, optimizer, steps=390)
    rates = []
    for step in range(0, 200 * 390, 10):
        scheduler.step_update(step)
        rates.append(optimizer.param_groups[0]['lr'])
    expected = [lr for lr, epochs in ((.1, 60), (.02, 60), (.004, 40), (.0008, 40)) for _ in range(39 * epochs)]
    assert rates == pytest.approx(expected)


def test_linear_schedule_rises_for_its_share_and_falls_to_zero():
    recipe = dataclasses.replace(SMOKE, epochs=5, opt='muon', lr=.06, schedule='linear', warmup_epochs=1)
    learner = Learner(timm.create_model('wrn16_1'), recipe, steps=20)
    rates = []
    for step in range(100):
        learner.scheduler.step_update(step)
        convolutions, rest = learner.optimizer.param_groups
        assert rest['lr'] == convolutions['lr']  # AdamW multiplies it by its share
        rates.append(convolutions['lr'])
    rise = [.0006 + (.06 - .0006) * step / 20 for step in range(20)]
    assert rates == pytest.approx(rise + [.06 * (80 - step) / 80 for step in range(80)])


@pytest.mark.parametrize('decay_norm', [True, False])
def test_norms_and_biases_are_decayed_if_the_recipe_says_so(decay_norm):
    """A step without gradients leaves the decay alone, which Nesterov momentum takes 1.9 times at first."""
    recipe = dataclasses.replace(SMOKE, lr=.1, weight_decay=.5, momentum=.9, decay_norm=decay_norm)
    model = randomise(timm.create_model('wrn16_1'))
    optimizer = create_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        share = 1 - .1 * .5 * 1.9 if decay_norm or p.ndim > 1 else 1
        torch.testing.assert_close(p.detach(), before[name] * share, msg=name)


def test_labels_that_are_mixed_are_smoothed_too():
    """The loss of a step against cross-entropy as its definition has it."""
    recipe = dataclasses.replace(SMOKE, mixup=.2, label_smoothing=.3)
    model, images = timm.create_model('wrn16_1').train(), torch.randn(8, 3, 32, 32)
    targets = torch.rand(8, 10).softmax(1)
    learner = Learner(model, recipe, steps=8, precision='no')
    learner._mix = lambda *_: (images, targets)
    with torch.no_grad():
        logits = copy.deepcopy(model)(images)
    expected = -((.7 * targets + .3 / 10) * logits.log_softmax(1)).sum(1).mean()
    loss, _ = learner.step(0, images, targets.argmax(1))
    torch.testing.assert_close(loss, expected)


def test_muon_turns_the_updates_of_convolutions_into_orthogonal_matrices():
    """One step from rest, against the polar factor by singular value decomposition."""
    recipe = dataclasses.replace(SMOKE, opt='muon', lr=.1, weight_decay=.5)
    model = timm.create_model('wrn16_2')
    optimizer = create_optimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(16, 3, 32, 32)).logsumexp(1).sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    for name in ('layer1.0.conv1.weight', 'layer2.0.conv1.weight', 'layer3.0.shortcut.weight'):
        moved = (before[name] * (1 - .1 * .5) - after[name].detach()).flatten(1) / .1
        u, _, v = torch.linalg.svd(after[name].grad.flatten(1), full_matrices=False)
        scale = max(1, moved.shape[0] / moved.shape[1]) ** .5
        along = u.mT @ moved @ v.mT / scale
        assert along.diagonal().min() > .5 and along.diagonal().max() < 1.5, name  # five Newton-Schulz steps
        assert (along - along.diagonal().diag()).abs().max() < .1, name
    for name in ('conv1.weight', 'fc.weight', 'layer2.0.bn1.bias'):  # AdamW, no decay: at first the rate itself
        moved = (before[name] - after[name]).abs()[after[name].grad.abs() > 1e-3]
        torch.testing.assert_close(moved, torch.full_like(moved, .1 * recipe.adamw_scale), rtol=.1, atol=0)


def test_muon_leaves_depthwise_convolutions_to_adamw():
    model = timm.create_model('convnext_atto')
    groups = create_optimizer(model, dataclasses.replace(SMOKE, opt='muon', lr=.1, weight_decay=.5)).param_groups
    by_muon = {id(p) for p in groups[0]['params']}
    assert id(model.stages[0].blocks[0].conv_dw.weight) not in by_muon
    assert id(model.stages[1].downsample[1].weight) in by_muon


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_muon_multiplies_in_the_type_that_is_fast(monkeypatch, dtype):
    from timm.optim.muon import _COEFFICIENTS, resolve_ns_coefficients
    monkeypatch.setattr('wrn_timm.train.optimizers.fast_bfloat16', lambda device: dtype == torch.bfloat16)
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    optimizer = Muon([weight], lr=1., adjust_lr_fn=None)
    weight.grad = torch.randn(8, 16)
    expected = zeropower_via_newtonschulz(
        .05 * weight.grad, 5, resolve_ns_coefficients('quintic', _COEFFICIENTS), dtype=dtype)
    optimizer.step()
    assert torch.equal(weight.detach(), -expected.float())
    assert timm.optim.muon.zeropower_via_newtonschulz is zeropower_via_newtonschulz


def test_sizes_are_phases_of_the_epochs(tmp_path):
    recipe = dataclasses.replace(SMOKE, epochs=10, sizes=((16, .3), (24, .2)))
    assert [recipe.size_at(epoch, 32) for epoch in range(10)] == [16] * 3 + [24] * 2 + [32] * 5
    short = dataclasses.replace(SMOKE, epochs=3, sizes=((16, .5), (24, .4)))
    assert [short.size_at(epoch, 32) for epoch in range(3)] == [16, 16, 32]
    train(dataclasses.replace(short, model='wrn16_1'), '', tmp_path / 'run')
    history = csv.DictReader((tmp_path / 'run/history.csv').read_text().splitlines())
    assert [row['size'] for row in history] == ['16', '16', '32']
    for sizes in (((16, 1.),), ((4, .1),), ((16, -.1),), ((16, .6), (24, .4))):
        with pytest.raises(ValueError, match='at least 8 pixels and a share of the epochs above 0'):
            dataclasses.replace(SMOKE, sizes=sizes)


def test_smaller_batches_are_the_large_ones_resized():
    data = load('synthetic', '', train=True)
    large, small = (DeviceLoader(data, 64, 'cpu', seed=3).epoch(1, size=size) for size in (None, 16))
    for (x, y), (resized, labels) in zip(large, small, strict=True):
        torch.testing.assert_close(resized, resize(x, [16, 16], antialias=True), atol=1e-6, rtol=1e-5)
        assert torch.equal(y, labels) and resized.is_contiguous(memory_format=torch.channels_last)


def test_networks_are_compiled_once_per_size(monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(next(i.shape[-1] for i in inputs if i.ndim == 4 and i.shape[1] == 3 and i.shape[0] == 8))
        return graph.forward

    monkeypatch.setattr(torch, 'compile', functools.partial(torch.compile, backend=backend))
    learner = Learner(timm.create_model('wrn16_1'), SMOKE, steps=8, compile=True)
    for step, size in enumerate((16, 16, 24, 24, 32, 32)):
        learner.step(step, torch.randn(8, 3, size, size), torch.arange(8))
    assert compiled == [16, 24, 32]


@pytest.mark.parametrize('precision, dtype', [('bf16', torch.bfloat16), ('no', torch.float32)])
def test_precision_of_training(tmp_path, monkeypatch, precision, dtype):
    seen = set()
    conv2d = torch.nn.functional.conv2d

    def watched(x, weight, *args):
        out = conv2d(x, weight, *args)
        seen.add(out.dtype)
        return out

    monkeypatch.setattr(torch.nn.functional, 'conv2d', watched)
    recipe = dataclasses.replace(SMOKE, model='wrn16_1', epochs=2)
    train(recipe, '', tmp_path / 'whole', precision=precision)
    assert seen == {dtype}
    train(recipe, '', tmp_path / 'cut', precision=precision, time_budget=0)
    train(recipe, '', tmp_path / 'cut', precision=precision, resume=True)
    assert final_weights(tmp_path / 'cut') == final_weights(tmp_path / 'whole')
    assert load_file(tmp_path / 'whole/weights/model.safetensors')['fc.weight'].dtype == torch.float32


@pytest.mark.parametrize('instructions, expected', [
    ({'avx512_bf16': True, 'amx_bf16': False}, 'bf16'), ({'amx_bf16': True}, 'bf16'), ({'avx512_f': True}, 'no'),
    (None, 'no')])
def test_auto_precision_is_what_the_processor_is_fast_in(monkeypatch, instructions, expected):
    if instructions is None:  # a torch that cannot tell
        monkeypatch.delattr(torch.cpu, 'get_capabilities', raising=False)
    else:
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: instructions, raising=False)
    assert resolve_precision('auto', 'cpu') == expected
    with pytest.raises(ValueError, match="'fp16' is for GPUs; choose 'bf16' or 'no'"):
        resolve_precision('fp16', 'cpu')
    with pytest.raises(ValueError, match="precision 'half' is unknown"):
        resolve_precision('half', 'cpu')
    with pytest.raises(ValueError, match="from scratch does not support precision 'fp16'"):
        scratch.ScratchMachine('cuda', precision='fp16')


def test_sam_climbs_along_the_gradient_to_its_radius():
    parameters = [torch.randn(3, requires_grad=True), torch.randn(2, 2, requires_grad=True)]
    before = [p.detach().clone() for p in parameters]
    sum((p ** 2).sum() for p in parameters).backward()
    _climb(parameters, 0.05)
    moved = torch.cat([(p - b).detach().flatten() for p, b in zip(parameters, before, strict=True)])
    gradient = torch.cat([2 * b.flatten() for b in before])
    assert moved.norm().item() == pytest.approx(0.05, rel=1e-5)
    torch.testing.assert_close(moved / moved.norm(), gradient / gradient.norm())


def test_sam_takes_batchnorm_statistics_once_a_step():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    buffers = []
    for rho in (0., 0.5):
        torch.manual_seed(0)
        model = timm.create_model('wrn16_1').train()
        Learner(model, dataclasses.replace(SMOKE, sam_rho=rho), steps=8).step(0, images, labels)
        buffers.append(dict(model.named_buffers()))
    for name, buffer in buffers[0].items():
        torch.testing.assert_close(buffer, buffers[1][name], rtol=0, atol=0)


def torchrun(*argv, stops=False):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', *map(str, argv)]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert (done.returncode != 0) == stops, done.stderr[-3000:]
    return done


TRAIN = ROOT / 'scripts/train.py'
IN_TWO = '--conv-drop-rate', '0.1', '--batch-size', '16'  # 24 steps an epoch


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """Gradients that two processes share, and a run that they share from beginning to end."""
    folder = tmp_path_factory.mktemp('two')
    torchrun(ROOT / 'tests/two_processes.py', folder / 'gradients.pt', *smoke(folder / 'run', *IN_TWO))
    return folder


def test_two_processes_have_the_gradients_of_one(two_processes):
    for shared, alone in zip(torch.load(two_processes / 'gradients.pt'), gradients(0, 1), strict=True):
        torch.testing.assert_close(shared, alone, atol=1e-6, rtol=1e-5)


def test_torchrun_trains_stops_and_resumes(two_processes, tmp_path):
    whole, out = two_processes / 'run', tmp_path / 'run'
    stopped = torchrun(TRAIN, *smoke(out, *IN_TWO, '--time-budget', '0', '--tracker', 'tensorboard'), stops=True)
    assert 'stopped by the time budget after epoch 0, step 20' in stopped.stderr and not (out / 'weights').exists()
    torchrun(TRAIN, *smoke(out, *IN_TWO, '--resume'))
    history, expected = (list(csv.DictReader((p / 'history.csv').read_text().splitlines())) for p in (out, whole))
    assert len(history) == SMOKE.epochs and float(history[-1]['train_accuracy']) > 50
    for row, other in zip(history, expected, strict=True):
        for column in ('train_loss', 'train_accuracy', 'holdout_loss'):
            assert float(row[column]) == pytest.approx(float(other[column]), rel=1e-6)
    timm.create_model(f'local-dir:{out / "weights"}', pretrained=True)
    assert final_weights(out) == final_weights(whole)


def test_a_run_goes_on_from_a_tar_file(run, tmp_path):
    train(SMOKE, '', tmp_path / 'run', time_budget=0)
    shutil.make_archive(str(tmp_path / 'carried'), 'tar', tmp_path / 'run')
    shutil.unpack_archive(tmp_path / 'carried.tar', tmp_path / 'elsewhere', filter='data')
    train(SMOKE, '', tmp_path / 'elsewhere', resume=True)
    assert final_weights(tmp_path / 'elsewhere') == final_weights(run)


def test_a_finished_folder_stays_finished(run, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(run, out)
    (out / 'weights' / 'README.md').write_text('card')
    before = {p.name: p.read_bytes() for p in (out / 'weights').iterdir()}
    train(SMOKE, '', out, resume=True)
    assert {p.name: p.read_bytes() for p in (out / 'weights').iterdir()} == before
    train(SMOKE, '', out, resume=True, half=True)
    assert not (out / 'weights' / 'README.md').exists()  # which was of other weights


def test_a_finished_run_is_exported_again_in_half_precision(run, tmp_path):
    out = tmp_path / 'run'
    shutil.copytree(run, out)
    assert train_script.main(['--recipe', 'smoke', '--out', str(out), '--device', 'cpu', '--resume', '--half']) == 0
    full, half = (load_file(r / 'weights/model.safetensors') for r in (run, out))
    assert half['layer1.0.conv1.weight'].dtype == torch.float16 and half['layer1.0.bn1.weight'].dtype == torch.float32
    for key, value in full.items():
        torch.testing.assert_close(half[key], value.to(half[key].dtype), atol=0, rtol=0)


def test_checkpointing_changes_memory_and_not_weights(run, tmp_path):
    train(SMOKE, '', tmp_path / 'run', grad_checkpointing=True)
    a, b = (load_file(r / 'weights/model.safetensors') for r in (run, tmp_path / 'run'))
    for key, value in a.items():
        if not key.endswith(('running_mean', 'running_var', 'num_batches_tracked')):  # seen twice by BatchNorm
            torch.testing.assert_close(b[key], value, atol=1e-6, rtol=1e-5)


def test_resnet18_trains_by_the_same_recipe_and_loads_with_its_stem(tmp_path):
    out = tmp_path / 'run'
    assert train_script.main([
        '--recipe', 'smoke', '--out', str(out), '--device', 'cpu', '--model', 'wrn18_1', '--stem', 'cifar',
        '--epochs', '1', '--batch-size', '128', '--rand-augment', '1']) == 0
    model = weights_of(out)
    assert model.conv1.weight.shape == (64, 3, 3, 3)
    assert not model.pretrained_cfg.get('license') and not model.pretrained_cfg.get('origin_url')  # of timm's weights


def test_trackers_are_told_of_every_epoch(tmp_path, capsys):
    events = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    out = tmp_path / 'run'
    train(SMOKE, '', out, tracker='tensorboard')
    log = events.EventAccumulator(str(next(out.rglob('events.out.*')).parent)).Reload()
    history = list(csv.DictReader((out / 'history.csv').read_text().splitlines()))
    for column in ('train_loss', 'holdout_accuracy', 'lr'):
        told = [(e.step, e.value) for e in log.Scalars(column)]
        assert told == [(int(r['epoch']), pytest.approx(float(r[column]), rel=1e-5)) for r in history]
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--tracker', 'paper']) == 1
    assert "tracker 'paper' is not known or not installed" in capsys.readouterr().err


def test_choices_that_cannot_be_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match='choose one of trivial_augment, rand_augment and auto_augment'):
        dataclasses.replace(SMOKE, trivial_augment=True, auto_augment=True)
    with pytest.raises(ValueError, match='rand_magnitude is 31; it must be 0 to 30'):
        dataclasses.replace(SMOKE, rand_magnitude=31)
    with pytest.raises(ValueError, match='warmup_epochs is 3; it must be below the 3 epochs'):
        dataclasses.replace(SMOKE, warmup_epochs=3)
    with pytest.raises(ValueError, match="opt 'adam' is unknown; choose 'nesterov' or 'muon'"):
        dataclasses.replace(SMOKE, opt='adam')
    args = ['--recipe', 'smoke', '--out', str(tmp_path / 'run'), '--device', 'cpu', '--sync-batchnorm']
    assert train_script.main(args) == 1
    assert 'sync_batchnorm works on CUDA devices only' in capsys.readouterr().err


def test_what_is_measured_under_corruptions(run, capsys, monkeypatch):
    args = ['--model', str(run / 'weights'), '--data', 'synthetic', '--device', 'cpu', '--corruptions']
    assert validate_script.main(args) == 0
    found = json.loads(capsys.readouterr().out)['corruptions']
    model, data = weights_of(run), load('synthetic', '', train=False)
    assert set(found) == {'noise 8', 'noise 16', 'noise 32', 'blur 0.5', 'blur 1', 'blur 1.5', 'jpeg 75', 'jpeg 50',
                          'jpeg 25'}
    blurred = dataclasses.replace(data, images=gaussian_blur(data.images, 7, [1.]))
    assert found['blur 1'] == pytest.approx(evaluate(model, blurred, torch.device('cpu'))['accuracy'], abs=0.5)
    monkeypatch.setattr('wrn_timm.train.measure.corrupt', lambda images, *_: torch.zeros_like(images))
    assert validate_script.main(args) == 0
    black = dataclasses.replace(data, images=torch.zeros_like(data.images))
    expected = evaluate(model, black, torch.device('cpu'))['accuracy']
    under = json.loads(capsys.readouterr().out)['corruptions']
    assert under == pytest.approx(dict.fromkeys(found, expected), abs=0.01) and expected < found['blur 1']
    assert validate_script.main([*args[:2], '--data', f'folder:{SAMPLE}', '--corruptions']) == 1
    assert 'corruptions are for the named sets' in capsys.readouterr().err
