"""A detector's weights folder: its card and golden scores, published and opened again by way of the loopback Hub."""
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, randomise
from torchvision.transforms.functional import to_tensor

import wrn_timm
from wrn_timm.cli import publish as publish_script
from wrn_timm.cli.options import parse
from wrn_timm.data.images import read_rgb
from wrn_timm.detection import build_detector, export_detector, open_detector
from wrn_timm.detector_card import check_golden_detector, detector_card, detector_name, finish_detector_folder
from wrn_timm.hub import check_folder
from wrn_timm.recipes import DetectConfig
from wrn_timm.train.measure_boxes import detection_metrics
from wrn_timm.weights import WEIGHTS_FILE, sha256_of, version_tag

PHOTOGRAPH = ROOT / 'tests/data/bccd_sample/JPEGImages/BloodImage_00007.jpg'
CONFIG = DetectConfig(model='wrn16_1', pretrained=False, image_size=96, out_channels=16, anchor_scale=4., epochs=2,
                      batch_size=2, seed=3)
NAME = 'faster_rcnn_wrn16_1.my_cells'
FILES = {'README.md', 'curves.png', 'detector.json', 'golden.npz', 'history.csv', 'metrics.json', WEIGHTS_FILE}
ENVIRONMENT = {'torch': '2.6.0', 'timm': '1.0.31', 'commit': 'abc', 'hardware': '2 CPU cores'}
HISTORY = 'epoch,lr,train_loss,seconds,images_per_second\n1,0.1,3.0,50.0,2.0\n2,0.05,2.0,100.0,4.0\n'


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A run directory as `wrn-timm detect` leaves it."""
    out = tmp_path_factory.mktemp('runs') / 'run'
    (out / 'checkpoints').mkdir(parents=True)
    torch.manual_seed(0)
    classes = ('RBC', 'W|BC')
    export_detector(randomise(build_detector(CONFIG, classes)), out / 'weights', {
        'detect': dataclasses.asdict(CONFIG), 'data': 'my cells!', 'classes': classes, 'environment': ENVIRONMENT})
    (out / 'weights/history.csv').write_text(HISTORY)
    shutil.copy(ROOT / 'weights/wrn16_1.cifar10/curves.png', out / 'weights')
    boxes, labels = torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([1, 1])
    found = {'boxes': boxes[:1], 'labels': labels[:1], 'scores': torch.tensor([0.9])}
    measured, _ = detection_metrics([found], [{'boxes': boxes, 'labels': labels}], classes)
    finish_detector_folder(out / 'weights', measured | {
        'dataset': 'my cells!', 'split': 'random, seed 3', 'left_out': ['/home/me/a.xml'],
        'leaks': [['/home/me/a.jpg', '/home/me/b.jpg']], 'train_images': 7, 'epochs': 2, 'image_size': 96,
        'train_seconds': 100., 'environment': ENVIRONMENT, 'measured_by': 'wrn-timm detect'})
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy to be spoilt, with a licence."""
    out = shutil.copytree(finished, tmp_path / 'run')
    spoil(out / 'weights/README.md', '^license:.*', 'license: mit')
    return out


def spoil(file, pattern, new):
    text, n = re.subn(pattern, new, file.read_text(), flags=re.M)
    assert n
    file.write_text(text)


def objects(detector):
    with torch.no_grad():
        return detector([to_tensor(read_rgb(PHOTOGRAPH))])[0]


def test_the_folder_is_complete_and_names_no_file_of_this_machine(finished):
    folder = finished / 'weights'
    assert {p.name for p in folder.iterdir()} == FILES
    assert not [p.name for p in folder.iterdir() if b'/home/me' in p.read_bytes()]
    assert check_golden_detector(folder) < 1e-5
    with np.load(folder / 'golden.npz') as golden:
        assert golden['images'].dtype == np.uint8 and golden['images'].shape == (2, 3, 128, 128)
        detector = open_detector(folder)
        detector.roi_heads.score_thresh = 0.
        with torch.no_grad():
            found = [f['scores'][:10].numpy() for f in detector([torch.from_numpy(i) / 255 for i in golden['images']])]
        np.testing.assert_allclose(golden['scores'], found, rtol=1e-4)
        assert golden['scores'].min() > 0.01


def test_the_card(finished):
    card = (finished / 'weights/README.md').read_text()
    assert '`wrn-timm detect` on 1 test photographs of my cells! (split: random, seed 3)' in card
    assert '| RBC | 2 | 50.50 | 50.50 | 100.00 | 50.00 |\n| W\\|BC | 0 | - | - | - | - |\n' in card
    assert '2 minutes at 2.7 photographs/s on 2 CPU cores, seed 3, 2 epochs of 7 photographs; torch 2.6.0' in card
    command = re.search('^wrn-timm detect (.*) --data DIR --out RUN$', card, flags=re.M)[1]
    assert parse(command.split(), ('detect', ''), dataclasses.make_dataclass('None_', []), DetectConfig)[1] == CONFIG


def test_the_licence_that_the_owner_wrote_stays(run):
    folder = run / 'weights'
    finish_detector_folder(folder, json.loads((folder / 'metrics.json').read_text()))
    assert (folder / 'README.md').read_text().count('license: mit\n') == 1
    assert check_folder(folder) == NAME


@pytest.mark.parametrize('model, data, name', [
    ('wrn16_2.cifar100', 'raccoon_dataset', 'retinanet_wrn16_2.raccoon_dataset'),
    ('torchvision/resnet50_fpn', 'Ünï code--..git', 'retinanet_resnet50_fpn.n_code_git'),
    ('wrn16_2', '猫', 'retinanet_wrn16_2.own'), ('wrn16_2', 'a' * 100, 'retinanet_wrn16_2.' + 'a' * 78),
])
def test_names_that_the_hub_allows(model, data, name):
    assert detector_name({'detect': {'detector': 'retinanet', 'model': model}, 'data': data}) == name


def test_publish_and_open_by_the_hub(hub, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    assert publish_script.main([str(run), '--namespace', 'acme', '--dry-run']) == 0
    assert capsys.readouterr().out.startswith(f'acme/{NAME}\n') and not hub.requests
    assert publish_script.main([str(run), '--namespace', 'acme']) == 0
    repository = hub.repositories[f'acme/{NAME}']
    there = repository.commits[repository.resolve('main')]
    assert set(there) >= FILES
    assert list(repository.tags) == [version_tag(sha256_of(run / 'weights' / WEIGHTS_FILE))]
    for call in ('open_detector', 'find_objects'):
        assert f'wrn_timm.{call}("hf-hub:acme/{NAME}"' in there['README.md'].decode()
    expected, found = objects(open_detector(run)), objects(open_detector(f'hf-hub:acme/{NAME}'))
    assert len(expected['scores']) > 10 and all(torch.equal(found[k], expected[k]) for k in expected)
    photo, = wrn_timm.find_objects(f'hf-hub:acme/{NAME}', PHOTOGRAPH, threshold=0.05, device='cpu')
    assert len(photo.objects) == len(expected['scores'])


def test_the_way_of_the_card_works(run, monkeypatch, tmp_path):
    shutil.copy(PHOTOGRAPH, tmp_path / 'photo.jpg')
    (tmp_path / 'FOLDER').mkdir()
    shutil.copy(PHOTOGRAPH, tmp_path / 'FOLDER')
    (tmp_path / 'RUN').symlink_to(run)
    monkeypatch.chdir(tmp_path)
    first, second = re.findall('```python\n(.*?)```', detector_card(run / 'weights'), flags=re.S)
    known = {}
    exec(first, known)
    assert len(known['labels']) == len(known['found']['boxes']) > 10 and set(known['labels']) <= {'RBC', 'W|BC'}
    exec(second, known)


def spoil_golden(folder):
    with np.load(folder / 'golden.npz') as golden:
        np.savez(folder / 'golden.npz', images=golden['images'], scores=golden['scores'] * 1.01)


def spoil_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize('spoil, message', [
    (lambda f: (f / 'recipe.json').write_text('{}'), 'recipe.json is not part of a weights folder'),
    (lambda f: (f / 'golden.npz').unlink(), 'golden.npz is missing: it is written by wrn-timm detect'),
    (lambda f: (f / WEIGHTS_FILE).write_bytes(b'x'), 'another file: sha256 .*, but detector.json names'),
    (lambda f: spoil_json(f / 'detector.json', lambda d: d.pop('sha256')), 'detector.json names no sha256'),
    (lambda f: spoil_json(f / 'detector.json', lambda d: d.update(data='/me/x')), 'machine as data: /me/x'),
    (lambda f: spoil_json(f / 'detector.json', lambda d: d.pop('detect')), 'its detect is missing'),
    (lambda f: spoil_json(f / 'detector.json', lambda d: d['detect'].update(out_channels=8)), 'size mismatch for'),
    (lambda f: spoil_json(f / 'metrics.json', lambda m: m.update(map_50=99.9)), 'lacks the accuracy 99.9'),
    (spoil_golden, r'the scores differ by 0.0099 from golden.npz; the limit is 0.001'),
    (lambda f: spoil(f / 'README.md', '^## Limits', ''), 'lacks ## Limits: rewrite it with wrn-timm detect --res'),
    (lambda f: spoil(f / 'README.md', '^license: mit', 'license:'), 'README.md names no licence: write yours'),
    (lambda f: spoil(f / 'README.md', 'library_name: torchvision', 'library_name: timm'), 'lacks library_name: torch'),
])
def test_a_folder_that_is_not_fit_is_not_published(run, spoil, message):
    spoil(run / 'weights')
    with pytest.raises(ValueError, match=message):
        check_folder(run)
