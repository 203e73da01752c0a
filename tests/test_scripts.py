"""Generated tables, what the package imports, and README's first code."""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tables as tables_script
from conftest import ROOT, SAMPLE

import wrn_timm  # noqa: F401


def test_generated_tables_are_up_to_date():
    assert tables_script.main(['--check']) == 0


def test_table_of_models_agrees_with_the_literature():
    rows = {r.split('|')[1].strip(' `'): [c.strip() for c in r.split('|')[2:6]]
            for r in tables_script.models_table().splitlines()[2:]}
    assert rows['wrn28_10'][0] == '36.48 M' and float(rows['wrn28_10'][1]) == pytest.approx(5.25, abs=0.02)
    assert rows['wrn50_2'][:3] == ['68.88 M', '11.40', '224']  # torchvision publishes 11.40
    assert rows['wrn16_1'][3] == '1, 2, 4'


def test_importing_the_package_loads_no_training_dependency():
    code = ('import sys; from wrn_timm.cli import main; main([]); print([m for m in ("matplotlib", "torchmetrics", '
            '"accelerate", "wrn_timm.train", "wrn_timm.cli.finetune") if m in sys.modules])')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith('the version.\n[]\n'), done.stderr  # a command is loaded when it is called


def test_readme_code_runs(tmp_path):
    shutil.copy(next((SAMPLE / 'airplanes').iterdir()), tmp_path / 'photo.jpg')
    use = re.search(r'## Use\n(.*?)\n## ', (ROOT / 'README.md').read_text(), flags=re.S)[1]
    code = '\n'.join(re.findall(r'```python\n(.*?)```', use, flags=re.S))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([1, 64, 16, 16])' in done.stdout and done.stdout.splitlines()[-1] == 'airplane'


def test_fine_tune_predict_and_export_as_readme_shows(tmp_path):
    photographs = re.search(r'## Your own photographs\n(.*?)\n### ', (ROOT / 'README.md').read_text(), flags=re.S)[1]
    code, = re.findall(r'```python\n(.*?)```', photographs, flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    for name in ('ketch', 'pizza'):
        (tmp_path / 'DIR' / name).mkdir(parents=True)
        for photograph in sorted((SAMPLE / name).iterdir())[:10]:
            shutil.copy(photograph, tmp_path / 'DIR' / name)
    shutil.copytree(tmp_path / 'DIR' / 'pizza', tmp_path / 'FOLDER')
    shutil.copy(photograph, tmp_path / 'photo.jpg')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / 'RUN' / 'metrics.json').read_text())
    assert done.stdout.splitlines()[-12].split() == [str(metrics['top1']), str(metrics['mean_per_class'])]
    images, labels, probabilities = zip(*(line.split()[:3] for line in done.stdout.splitlines()[-11:]), strict=True)
    assert images == ('photo.jpg', *(os.path.join('FOLDER', p.name) for p in sorted((tmp_path / 'FOLDER').iterdir())))
    assert labels.count('pizza') > 8 and all(0.5 <= float(p) <= 1 for p in probabilities)
    assert (tmp_path / 'model.onnx').stat().st_size > 1_000_000


def test_what_training_brings_is_loaded_when_used_and_says_what_to_install():
    code = ('''import sys, wrn_timm
assert {'predict', 'finetune', 'FinetuneConfig'} <= set(dir(wrn_timm)) and not hasattr(wrn_timm, 'nothing')
sys.modules['torchmetrics'] = None  # as where it is not installed
try:
    wrn_timm.predict
except ImportError as e:
    print(e)''')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith('wrn_timm.predict needs torchmetrics') and '[train]' in done.stdout, done.stderr


def waiting_commands():
    block = re.search(r'```bash\n(.*?)```', (ROOT / 'weights' / 'README.md').read_text(), flags=re.S)[1]
    return [line for line in block.replace('\\\n', '').splitlines() if line.startswith('python ')]


@pytest.mark.parametrize('command', waiting_commands())
def test_commands_that_wait_for_a_gpu_lack_their_data_alone(command, tmp_path, capsys):
    for name, here in (('DIR', 'nowhere'), ('wrn28_10.cifar100', 'wrn16_1.cifar10'),
                       ('RUN/best', str(ROOT / 'weights' / 'wrn16_1.cifar10')), ('--out ', f'--out {tmp_path}/')):
        command = command.replace(name, here)
    script, *args = shlex.split(command)[1:]
    assert importlib.import_module(Path(script).stem).main([*args, '--device', 'cpu']) == 1
    assert 'nowhere' in capsys.readouterr().err
