"""Scripts that have no room of their own: tables and benchmark."""
import json
import re
import subprocess
import sys

import benchmark as benchmark_script
import pytest
import tables as tables_script
from conftest import ROOT

import wrn_timm  # noqa: F401


def test_generated_tables_are_up_to_date():
    assert tables_script.main(['--check']) == 0


def test_table_of_models_agrees_with_the_literature():
    rows = {r.split('|')[1].strip(' `'): [c.strip() for c in r.split('|')[2:6]]
            for r in tables_script.models_table().splitlines()[2:]}
    assert rows['wrn28_10'][0] == '36.48 M' and float(rows['wrn28_10'][1]) == pytest.approx(5.25, abs=0.02)
    assert rows['wrn50_2'][:3] == ['68.88 M', '11.40', '224']  # torchvision publishes 11.40
    assert rows['wrn16_1'][3] == '1, 2, 4'


def test_benchmark_prints_ratios_and_json(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_script, 'seconds_to_import', lambda: 1.)
    args = ['--device', 'cpu', '--batch-size', '2', '--rounds', '1', '--train', '--json']
    assert benchmark_script.main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['import_ms_over_timm'] == 1000.
    assert result['inference']['ratios']['over plain'] > 0
    assert result['augmentation']['images_per_second']['RandAugment: loader'] > 0
    training = result['training']
    stages = ((32 * 32, 16, 16), (16 * 16, 16, 32), (8 * 8, 32, 64))  # pixels, channels in and out
    multiply_adds = 32 * 32 * 27 * 16 + 64 * 10 + sum(
        pixels * (9 * a * b + 3 * 9 * b * b + (a * b if a != b else 0)) for pixels, a, b in stages)
    assert training['gflop_an_image'] == pytest.approx(3 * 2 * multiply_adds / 1e9, abs=0.005)
    for name, rate in training['images_per_second'].items():
        share = rate * training['gflop_an_image'] / training['ceiling_tflops'] / 1000
        assert share == pytest.approx(training['share_of_matmul_ceiling'][name], rel=0.2, abs=0.001)
    with pytest.raises(SystemExit):
        benchmark_script.main(['--model', 'wrn9_9'])


def test_importing_the_package_loads_no_training_dependency():
    code = 'import sys, wrn_timm; print([m for m in ("matplotlib", "torchmetrics", "accelerate") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT).stdout == '[]\n'


def test_readme_code_runs():
    code = re.search(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), flags=re.S)[1]
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([1, 64, 16, 16])' in done.stdout
