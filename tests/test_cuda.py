"""What only a GPU shows: each of the ways through the package, once, against the same on the CPU.

    python -m pytest tests/test_cuda.py
"""
import dataclasses
import json

import benchmark
import pytest
import timm
import torch
from conftest import SAMPLE
from test_detection import BCCD

import wrn_timm  # noqa: F401
from wrn_timm.export import optimize
from wrn_timm.recipes import RECIPES, DetectConfig, FinetuneConfig
from wrn_timm.train.detector import train_detector
from wrn_timm.train.finetune import finetune
from wrn_timm.train.machine import Machine
from wrn_timm.train.measure import validate
from wrn_timm.train.scratch import ScratchMachine, train

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
    pytest.mark.filterwarnings('default::UserWarning')]  # advice by torch, which differs by version and GPU

SMOKE = RECIPES['smoke']
EVERYTHING = dataclasses.replace(
    SMOKE, trivial_augment=True, cutout=8, mixup=.2, conv_drop_rate=.1, label_smoothing=.1, holdout=128)


@pytest.mark.parametrize('compile', [True, False])
def test_training_learns_stops_resumes_and_is_measured_alike(tmp_path, compile):
    assert train(SMOKE, '', tmp_path, machine=ScratchMachine('cuda', time_budget=0, compile=compile)) is None
    folder = train(SMOKE, '', tmp_path, machine=ScratchMachine('cuda', resume=True, compile=compile))
    recipe = json.loads((tmp_path / 'recipe.json').read_text())
    assert recipe['environment']['hardware'] == torch.cuda.get_device_name()
    on_cpu, on_gpu = (validate(str(folder), 'synthetic', Machine(d)) for d in ('cpu', 'cuda'))
    assert on_gpu['top1'] == pytest.approx(on_cpu['top1'], abs=0.5)
    assert on_gpu['ece'] == pytest.approx(on_cpu['ece'], abs=0.5)


def test_every_part_of_a_recipe_runs_there_compiled(tmp_path):
    assert train(EVERYTHING, '', tmp_path / 'a', machine=ScratchMachine('cuda'))
    assert train(dataclasses.replace(SMOKE, epochs=1, sam_rho=.05, rand_augment=2), '', tmp_path / 'b',
                 machine=ScratchMachine('cuda'))
    assert train(dataclasses.replace(SMOKE, epochs=1, auto_augment=True), '', tmp_path / 'c', half=True,
                 machine=ScratchMachine('cuda', grad_checkpointing=True))


def test_optimised_forms_give_the_logits_of_the_cpu():
    model = timm.create_model('wrn16_2').eval()
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
    for dtypes, tolerance in (((torch.float32,), 1e-2), ((torch.bfloat16,), 1e-1)):
        fast = optimize(model.cuda(), images.cuda(), dtypes=dtypes)
        difference = (fast(images.cuda()).float().cpu() - expected).abs().max()
        assert difference < tolerance * expected.abs().max(), fast.form


@pytest.mark.parametrize('precision', ['no', 'bf16', 'fp16'])
@pytest.mark.parametrize('way', ['head', 'all'])
def test_fine_tuning(tmp_path, precision, way):
    config = FinetuneConfig(train=way, epochs=2, input_size=32, precision=precision)
    metrics = finetune(config, SAMPLE, tmp_path / 'run', Machine('cuda', progress=False))
    assert metrics['top1'] > 40  # chance is 12.5
    timm.create_model(f'local-dir:{tmp_path / "run/best"}', pretrained=True)


@pytest.mark.parametrize('detector', ['faster_rcnn', 'retinanet'])
def test_detection(tmp_path, detector):
    config = DetectConfig(model='wrn16_1', detector=detector, epochs=1, image_size=128, rois=16, out_channels=32)
    assert 'map_50' in train_detector(config, BCCD, tmp_path, Machine('cuda', workers=2))


def test_benchmark(capsys):
    sections = ('evaluate', 'train', 'latency', 'growth', 'scale', 'augment', 'head', 'finetune')
    assert benchmark.main([*sections, '--models', 'wrn16_1', '--rounds', '1', '--device', 'cuda', '--json']) == 0
    assert {*json.loads(capsys.readouterr().out)['sections']} == {*sections}
