import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hub_server import Hub

# Tests are of the CPU, but those of test_cuda.py, which are run by themselves. Workers take this over.
if 'PYTEST_XDIST_WORKER' not in os.environ and not any('test_cuda' in argument for argument in sys.argv):
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
if 'PYTEST_XDIST_WORKER' in os.environ:  # workers that use all cores each wait for one another
    os.environ['OMP_NUM_THREADS'] = '1'
    torch.set_num_threads(1)

# Every test speaks to this Hub and to no other; huggingface_hub reads these once, when it is imported.
HUB = Hub()
HOME = tempfile.TemporaryDirectory()
for name in ('WRN_TIMM_WEIGHTS', 'WRN_TIMM_HUB_NAMESPACE', 'WRN_TIMM_COMMIT', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE',
             'HUGGINGFACE_HUB_CACHE', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
    os.environ.pop(name, None)
os.environ.update(
    TORCH_HOME=HOME.name, HF_ENDPOINT=HUB.url, HF_HOME=HOME.name, HF_HUB_DISABLE_XET='1', HF_HUB_DISABLE_TELEMETRY='1',
    HF_HUB_DISABLE_PROGRESS_BARS='1', HF_TOKEN='')
for name in [n for n in os.environ if n.lower() in ('http_proxy', 'https_proxy', 'all_proxy', 'no_proxy')]:
    del os.environ[name]

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / 'tests' / 'data' / 'caltech101_sample'
sys.path.insert(0, str(ROOT / 'scripts'))


@pytest.fixture(autouse=True)
def _as_if_first():
    """The state that seeds and scripts of earlier tests have changed."""
    torch.manual_seed(0)
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
    """Untrained weights, for tests of the path and not of the accuracy."""
    import timm

    import wrn_timm  # noqa: F401
    from wrn_timm.weights import export_weights
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


@pytest.fixture
def hub(monkeypatch):
    """An empty Hub, and its token in the environment."""
    HUB.clear()
    monkeypatch.setenv('HF_TOKEN', HUB.token)
    yield HUB
    HUB.clear()


def forget_sessions():
    """Make huggingface_hub read proxies and HF_HUB_OFFLINE anew: it keeps its connections."""
    import huggingface_hub
    forget = getattr(huggingface_hub, 'close_session', None) or huggingface_hub.utils.reset_sessions  # the latter < 1.0
    forget()


@pytest.fixture
def offline(monkeypatch):
    """As $HF_HUB_OFFLINE=1, which is read once; call it to go offline."""
    def go():
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        forget_sessions()
    yield go
    monkeypatch.undo()
    forget_sessions()


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk: no file may grow over so many bytes."""
    import resource  # not on Windows
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def randomise(model):
    """Give BatchNorm and biases values that show when they are dropped or swapped."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.running_var, .5, 1.5)
            torch.nn.init.normal_(m.running_mean, std=.2)
            torch.nn.init.uniform_(m.weight, .5, 1.5)
            torch.nn.init.normal_(m.bias, std=.2)
        elif isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and m.bias is not None:
            torch.nn.init.normal_(m.bias, std=.2)
    return model.eval()


def data_dir(dataset: str) -> str:
    """Folder of the official files of a data set, from $CIFAR10_DIR or $CIFAR100_DIR; skips where it is not given."""
    variable = f'{dataset.upper()}_DIR'
    if variable not in os.environ:
        pytest.skip(f'set {variable} to the folder that holds the official files of {dataset}')
    return os.environ[variable]
