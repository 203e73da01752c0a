"""Generated tables and charts, what the package imports, and the code and commands of the READMEs."""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import tables as tables_script
from conftest import ROOT, SAMPLE

import wrn_timm  # noqa: F401

READMES = [ROOT / folder / 'README.md' for folder in ('', 'scripts', 'scripts/benchmarks', 'weights', 'wrn_timm')]


def section(readme, heading, language):
    """The code blocks of a language below a heading of a README."""
    text = re.search(rf'^## {heading}\n(.*?)(?:^## |\Z)', (ROOT / readme).read_text(), flags=re.S | re.M)[1]
    return re.findall(rf'```{language}\n(.*?)```', text, flags=re.S)


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
    shutil.copy(SAMPLE / 'airplanes' / 'image_0001.jpg', tmp_path / 'photo.jpg')
    code = '\n'.join(section('README.md', 'Load a model', 'python'))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'torch.Size([1, 64, 16, 16])' in done.stdout and done.stdout.splitlines()[-1] == 'airplane'


def test_fine_tune_predict_and_export_as_readme_shows(tmp_path):
    code, = section('README.md', 'Fine-tune on your own photographs', 'python')
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
    wrn_timm.finetune
except ImportError as e:
    print(e)''')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith('wrn_timm.finetune needs torchmetrics') and '[train]' in done.stdout, done.stderr


COMMAND = re.compile(r'^.*?(?:wrn-timm|torchrun --nproc-per-node \d+ -m wrn_timm\.cli) (\w+)([^|>#\n]*)', flags=re.M)


def commands():
    """(script, options) of every command in the READMEs that names data, weights or a run."""
    blocks = [block for readme in READMES for block in re.findall(r'```bash\n(.*?)```', readme.read_text(), flags=re.S)]
    found = COMMAND.findall('\n'.join(blocks).replace('\\\n', ' '))
    return list(dict.fromkeys((script, ' '.join(options.split())) for script, options in found if options.strip()))


@pytest.mark.parametrize(('script', 'options'), commands())
def test_commands_of_the_readmes_lack_their_files_alone(script, options, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, here in (('DIR|DATA', 'nowhere'), ('RUN', 'missing'), ('photo.jpg|FOLDER', 'missing.jpg'),
                       ('wrn28_10.cifar100|wrn50_2.racm_in1k', 'wrn16_1.cifar10'), ('--download', '')):
        options = re.sub(name, here, options)
    if script == 'validate' and '--write' in options:  # asks for a weights folder first
        shutil.copytree(ROOT / 'weights' / 'wrn16_1.cifar10', 'missing/weights')
    if script == 'export':  # needs no files, and is run in test_export.py
        options = options.replace('wrn16_1.cifar10', 'missing')
    assert importlib.import_module(script).main(shlex.split(options)) == 1
    assert re.search('nowhere|missing', capsys.readouterr().err)


def test_the_readmes_link_to_what_is_there():
    for readme in READMES:
        for link in re.findall(r'\]\((?!https?:)(.*?)\)', readme.read_text()):
            path, _, anchor = link.partition('#')
            target = (ROOT / path[1:] if path.startswith('/') else readme.parent / path) if path else readme
            assert target.exists(), f'{readme} links to {link}'
            if anchor:
                headings = re.findall(r'^#+ (.*)$', target.read_text(), flags=re.M)
                anchors = [re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings]
                assert anchor in anchors, f'{readme} links to {link}'


def test_charts_keep_their_data_and_are_drawn_anew_for_other_data(tmp_path):
    collect, draw = tables_script.CHARTS['caltech101.png']
    data = collect()
    measured = json.loads((ROOT / 'weights' / 'wrn16_2.cifar100' / 'transfer.json').read_text())
    best = next(r['mean_per_class'] for r in measured if r['way'] == 'all' and r['input_size'] == 32)
    assert data['wrn16_2.cifar100']['all layers'] == [best['mean'], best['std']]
    probe = next(r['mean_per_class'] for r in measured if r['way'] == 'linear probe' and r['input_size'] == 32)
    assert data['wrn16_2.cifar100']['linear probe'] == [probe['mean'], probe['std']]
    tables_script.write_chart(tmp_path / 'chart.png', data, draw)
    assert tables_script.chart_is_current(tmp_path / 'chart.png', data)
    data['wrn16_2.cifar100']['all layers'][0] += 1
    assert not tables_script.chart_is_current(tmp_path / 'chart.png', data)
    assert not tables_script.chart_is_current(tmp_path / 'none.png', data)
