"""Training from scratch: what is learnt, kept, resumed and refused."""
import csv
import dataclasses
import json
import math

import pytest
import timm
import torch
import train as train_script
import validate as validate_script
from conftest import SAMPLE

from wrn_timm.data.datasets import load
from wrn_timm.data.device import DeviceLoader
from wrn_timm.hub import model_card
from wrn_timm.train.loop import evaluate, train
from wrn_timm.train.metrics import classification_metrics
from wrn_timm.train.recipes import RECIPES, get_recipe
from wrn_timm.train.validate import check_golden

SMOKE = RECIPES['smoke']


def weights_of(run):
    return timm.create_model(f'local-dir:{run / "weights"}', pretrained=True).eval()


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp('runs') / 'smoke'
    assert train_script.main(['--recipe', 'smoke', '--out', str(path), '--device', 'cpu']) == 0
    return path


def test_a_run_learns_and_keeps_its_records(run):
    history = list(csv.DictReader((run / 'history.csv').read_text().splitlines()))
    assert len(history) == SMOKE.epochs and float(history[-1]['train_loss']) < float(history[0]['train_loss']) / 2
    recipe = json.loads((run / 'recipe.json').read_text())
    assert recipe['recipe'] == json.loads(json.dumps(dataclasses.asdict(SMOKE))) and recipe['environment']['torch'] == torch.__version__
    assert (run / 'curves.png').stat().st_size > 5000
    assert not list(run.glob('**/*.part*'))


def test_interrupted_and_resumed_run_ends_with_the_same_weights(run, tmp_path):
    out = tmp_path / 'run'
    assert train(SMOKE, '', out, time_budget=0) is None
    assert train(SMOKE, '', out, time_budget=0, resume=True) is None
    assert train(SMOKE, '', out, resume=True) == out / 'weights'
    assert (out / 'weights/model.safetensors').read_bytes() == (run / 'weights/model.safetensors').read_bytes()


def test_dropout_runs_resume_with_the_same_random_numbers(tmp_path):
    recipe = dataclasses.replace(SMOKE, epochs=2, conv_drop_rate=0.3, holdout=0)
    train(recipe, '', tmp_path / 'whole')
    train(recipe, '', tmp_path / 'cut', time_budget=0)
    train(recipe, '', tmp_path / 'cut', resume=True)
    a, b = ((tmp_path / n / 'weights/model.safetensors').read_bytes() for n in ('whole', 'cut'))
    assert a == b


def test_another_run_is_not_written_over(run, tmp_path, capsys):
    before = (run / 'recipe.json').read_bytes()
    assert train_script.main(['--recipe', 'smoke', '--out', str(run)]) == 1
    assert f'{run} already holds a run; choose another --out, or go on with --resume' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(run), '--resume', '--seed', '7']) == 1
    assert 'was started with other settings (seed: 0 there, 7 now)' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--resume']) == 1
    assert 'holds no run to resume' in capsys.readouterr().err
    assert train_script.main(['--recipe', 'quik', '--out', str(tmp_path / 'none')]) == 1
    assert "recipe 'quik' is unknown; nearest: quick; known: paper_cifar10" in capsys.readouterr().err
    assert train_script.main(['--recipe', 'smoke', '--out', str(tmp_path / 'none'), '--model', 'wrn9_9']) == 1
    assert 'wrn9_9' in capsys.readouterr().err
    assert (run / 'recipe.json').read_bytes() == before and not (tmp_path / 'none').exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    recipe = dataclasses.replace(SMOKE, lr=1e30)
    with pytest.raises(FloatingPointError, match='the loss is not finite at epoch 1'):
        train(recipe, '', tmp_path / 'run')
    assert not list((tmp_path / 'run').glob('checkpoints/*'))


def test_optimiser_is_torchs_sgd_with_a_cosine(run):
    """One epoch of the loop against the same steps written out."""
    recipe = dataclasses.replace(get_recipe('smoke'), epochs=1, ema_decay=0., holdout=0)
    out = train(recipe, '', run.parent / 'one')
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
    assert metrics['images'] == 256 and metrics == json.loads((folder / 'metrics.json').read_text())
    assert check_golden(folder) < 1e-5
    card = (folder / 'README.md').read_text()
    assert card == model_card(folder)
    assert card.split('```python\n')[1].startswith('import wrn_timm\n')
    assert 'library_name: timm' in card
    assert 'python scripts/train.py --recipe smoke --data DIR --out RUN --seed 0' in card


def test_validate_refuses_other_classes(run, tmp_path, capsys):
    assert validate_script.main(['--model', str(run / 'weights'), '--data', f'folder:{SAMPLE}']) == 1
    assert 'knows 10 classes (airplane, automobile, bird...)' in capsys.readouterr().err
    assert validate_script.main(['--model', str(run / 'weights'), '--data', f'cifar100:{tmp_path}']) == 1
    assert 'cifar100: the official files are not whole' in capsys.readouterr().err
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
