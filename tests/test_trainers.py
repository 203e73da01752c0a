"""Every trainer gets the same files and is measured in one way."""
import json

import pytest
import torch
import torch.nn.functional as F
from benchmarks import trainers as script
from conftest import SAMPLE


def test_trainers_get_the_same_files_and_are_measured_on_the_test_files(tmp_path, monkeypatch):
    given = []

    def always_the_first(command, data, out, seed):
        given.append({part: {p.resolve() for p in (data / part).glob('*/*')} for part in ('train', 'val', 'test')})
        return lambda files: F.one_hot(torch.zeros(len(files), dtype=torch.int64), 8).float()

    monkeypatch.setattr(script, 'TRAINERS', {'a': always_the_first, 'b': always_the_first})
    assert script.main(['--split', 'random20', '--seeds', '2', '--out', str(tmp_path / 'x.json')]) == 0
    found = json.loads((tmp_path / 'x.json').read_text())
    for row in found['rows']:
        assert row['mean_per_class']['values'] == row['top1']['values'] == [12.5, 12.5]  # one class of eight
    a0, a1, b0, b1 = given
    assert (a0, a1) == (b0, b1) and a0 != a1
    assert {part: len(files) for part, files in a0.items()} == {'train': 144, 'val': 16, 'test': 80}
    assert a0['train'] | a0['val'] | a0['test'] == {p.resolve() for p in SAMPLE.glob('*/*')}


def test_an_unknown_trainer_is_named(capsys):
    with pytest.raises(SystemExit):
        script.main(['keras'])
    assert 'trainer keras is unknown; choose from wrn_timm, timm, fastai, ultralytics' in ' '.join(
        capsys.readouterr().err.replace('│', ' ').split())


def test_what_is_not_there_is_said_before_anything_is_trained(capsys, monkeypatch):
    monkeypatch.delenv('TIMM_SOURCE', raising=False)
    monkeypatch.setattr(script, 'find_spec', lambda name: None)
    for trainer, message in (('timm', 'set TIMM_SOURCE to a checkout of timm'), ('fastai', 'pip install fastai')):
        assert script.main([trainer]) == 1 and message in capsys.readouterr().err
    assert script.main(['wrn_timm', '--data', 'nowhere']) == 1 and 'no folder at nowhere' in capsys.readouterr().err
