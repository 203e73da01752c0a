import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / 'tests' / 'data' / 'caltech101_sample'
sys.path.insert(0, str(ROOT / 'scripts'))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """Untrained weights, for tests of the path and not of the accuracy."""
    import timm

    import wrn_timm  # noqa: F401
    from wrn_timm.train.rundir import export_weights
    folder = tmp_path_factory.mktemp('weights') / 'wrn16_1.test'
    torch.manual_seed(0)
    export_weights(timm.create_model('wrn16_1'), folder, {'tag': 'test'})
    return str(folder)


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """A machine with no weights folder and no Hub account; returns an empty $WRN_TIMM_WEIGHTS."""
    from wrn_timm import weights
    monkeypatch.setattr(weights, '_PACKAGE', tmp_path / 'nowhere' / 'wrn_timm')
    monkeypatch.setenv('WRN_TIMM_WEIGHTS', str(tmp_path / 'weights'))
    monkeypatch.delenv('WRN_TIMM_HUB_NAMESPACE', raising=False)
    (tmp_path / 'weights').mkdir()
    return tmp_path / 'weights'


def cifar10_dir() -> str:
    """Folder of the official CIFAR-10 files, from $CIFAR10_DIR; skips where it is not given."""
    if 'CIFAR10_DIR' not in os.environ:
        pytest.skip('set CIFAR10_DIR to the folder that holds cifar-10-batches-py')
    return os.environ['CIFAR10_DIR']
