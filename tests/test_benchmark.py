"""scripts/benchmark.py: every section at a tiny size, and its figures against what is known otherwise."""
import json
import shutil
import time

import benchmark as benchmark_script
import pytest
import timm
import torch
from benchmarks import inference, measuring, training
from conftest import SAMPLE

import wrn_timm  # noqa: F401

TINY = ['--models', 'wrn16_1', '--batch', '2', '--size', '32', '--rounds', '1', '--no-compile', '--no-memory',
        '--device', 'cpu']


@pytest.fixture(scope='module')
def photographs(tmp_path_factory):
    """Eight photographs of each of two classes."""
    folder = tmp_path_factory.mktemp('photographs')
    for name in ('airplanes', 'ketch'):
        (folder / name).mkdir()
        for photograph in sorted((SAMPLE / name).iterdir())[:8]:
            shutil.copy(photograph, folder / name)
    return folder


def run(capsys, *args):
    assert benchmark_script.main([*TINY, '--json', *args]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_section_gives_its_figures(capsys, photographs):
    others = [name for name in benchmark_script.SECTIONS if name != 'scale']
    result = run(capsys, *others, '--data', str(photographs), '--model', 'wrn16_1.cifar10', '--epochs', '1',
                 '--batch-size', '4')
    sections = result['sections'] | run(capsys, 'scale', '--batch', '64')['sections']  # it trains whole epochs
    assert set(sections) == set(benchmark_script.SECTIONS)
    first = {name: [row['name'] for row in cases[0]['rows']] for name, cases in sections.items()}
    assert first['evaluate'][:3] == ['plain eager', 'channels_last', 'folded, channels_last, float32']
    assert {'pytorchcv', 'torchvision', 'timm', 'onnxruntime'} < set(first['evaluate'])
    assert first['train'][:3] == ['plain eager', 'trainer', 'trainer, checkpointing']
    for cases in sections.values():
        for case in cases:
            assert 'absent' in case['rows'][0] or case['rows'][0]['ratio'] == 1
            assert all(row.get('ratio', 0) > 0 or row['absent'] for row in case['rows'])
    absent = {row['name']: row.get('absent') for row in sections['evaluate'][0]['rows']}
    assert absent['torchvision'] == 'it has no such network'
    assert absent['pytorchcv'] is absent['onnxruntime'] is None
    assert 'cifar10:DIR' in sections['int8'][0]['rows'][0]['absent']

    for row in sections['evaluate'][0]['rows'][:3]:
        rate = row['images_per_second'] * measuring.flops('wrn16_1', 32)
        assert row['matmul'] == pytest.approx(rate / result['matmul_gflops_float32'] / 1e9, rel=0.01)
        assert row['images_per_second'] == pytest.approx(2000 / row['ms']) and row['logits_differ'] < 1e-5
    assert all(row['p95_ms'] >= row['ms'] > 0 for row in sections['latency'][0]['rows'] if 'absent' not in row)
    every, cached = sections['head'][0]['rows']
    assert cached['points'] == pytest.approx(cached['accuracy'] - every['accuracy']) and cached['accuracy'] > 12.5


def test_operations_are_those_of_the_paper():
    def of(pixels, channels):  # multiply-adds of the two blocks of a stage of WRN-16-1
        before = max(16, channels // 2)
        shortcut = before * channels if before != channels else 0
        return pixels * (9 * before * channels + 3 * 9 * channels * channels + shortcut)

    expected = 1024 * 27 * 16 + of(1024, 16) + of(256, 32) + of(64, 64) + 64 * 10
    assert measuring.flops('wrn16_1', 32) == 2 * expected
    assert measuring.flops('wrn50_2', 224) / 2 == pytest.approx(11.40e9, rel=1e-3)  # torchvision's figure


def test_ratios_are_of_the_same_round_and_rates_of_the_median():
    seconds = {'quick': [0.05, 0.05, 0.5], 'slow': [0.2, 0.2, 2.]}  # a disturbed round slows both
    slow = measuring.summarise(seconds, items=2)[1]
    assert slow['ratio'] == slow['ratio_low'] == slow['ratio_high'] == pytest.approx(0.25)
    assert slow['ms'] == pytest.approx(200) and slow['images_per_second'] == pytest.approx(10)
    slow = measuring.summarise(seconds, items={'quick': 1, 'slow': 4})[1]
    assert slow['ratio'] == pytest.approx(1) and slow['images_per_second'] == pytest.approx(20)


def test_a_slowed_contestant_is_slower_and_an_absent_one_is_named(capsys):
    calls = {'quick': lambda: time.sleep(0.02), 'slow': lambda: time.sleep(0.2), 'none': 'not installed'}
    rows, _ = measuring.measure(calls, 3, 'cpu', items=2)
    assert [row['name'] for row in rows] == ['quick', 'slow', 'none']
    assert rows[1]['ratio'] < 0.5 and rows[1]['ms'] >= 200
    measuring.show('section', measuring.Case('case', rows))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == 'section: case' and lines[2].split()[0] == 'ratio'
    assert lines[3].split()[0] == '1.00' and lines[5].endswith('none  absent: not installed')


def test_contestants_have_the_same_weights():
    ours, others = inference.peers('wrn16_4')
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert inference.difference(others['pytorchcv'](x), ours(x)) < 1e-4
    assert others['timm'] == others['torchvision'] == 'it has no such network'


def test_other_logits_are_refused_and_a_contestant_that_fails_is_absent(capsys, monkeypatch):
    def others(**models):
        monkeypatch.setattr(inference, 'peers', lambda name: (timm.create_model(name).eval(), models))

    others(fixed_pool=torch.nn.AvgPool2d(64))
    case, = run(capsys, 'evaluate')['sections']['evaluate']
    absent = {row['name']: row['absent'] for row in case['rows'] if 'absent' in row}
    assert list(absent) == ['fixed_pool'] and 'it fails: Given input size' in absent['fixed_pool']
    others(impostor=timm.create_model('wrn16_1').eval())
    assert benchmark_script.main(['evaluate', *TINY]) == 1
    assert 'wrn16_1: the logits of impostor differ by' in capsys.readouterr().err


def test_a_section_that_fails_leaves_the_results_of_the_others(capsys, monkeypatch):
    def fails(command):
        raise RuntimeError('no such thing')
        yield

    monkeypatch.setitem(benchmark_script.SECTIONS, 'int8', fails)
    assert benchmark_script.main(['int8', 'growth', *TINY, '--json']) == 1
    said = capsys.readouterr()
    assert list(json.loads(said.out)['sections']) == ['growth'] and 'int8: error: no such thing' in said.err


def test_the_first_contestant_may_be_the_absent_one(capsys, monkeypatch):
    steps = training.training_steps
    monkeypatch.setattr(training, 'training_steps', lambda *args: {'plain eager': lambda: 'out of memory', **{
        k: v for k, v in steps(*args).items() if k == 'trainer'}})
    monkeypatch.setattr(training, 'peak_memory', lambda *args: 1.)
    options = [option for option in TINY if option != '--no-memory']
    assert benchmark_script.main(['train', *options, '--json']) == 0
    case, = json.loads(capsys.readouterr().out)['sections']['train']
    assert [row.get('absent') for row in case['rows']] == ['out of memory', None] and case['rows'][1]['peak_mb'] == 1


def test_peak_memory_counts_weights_gradients_and_momentum():
    peak = training.peak_memory('plain eager', 'wrn16_8', 16, 1, 'cpu')
    assert 3 * 4 * 10.96 < peak < 20 * 4 * 10.96  # MB of 10.96 million float32 values


def test_bad_settings(capsys):
    for args, expected in ((['evaluat'], 'sections: evaluat is unknown; evaluate, int8'),
                           (['--models', 'wrn9_9'], 'models: wrn9_9 is unknown'),
                           (['--rounds', '0'], 'rounds must be at least 1')):
        with pytest.raises(SystemExit):
            benchmark_script.main(args)
        assert expected in ' '.join(capsys.readouterr().err.split())
