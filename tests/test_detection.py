"""Detectors: against torchvision's own on the same network, and the whole way on photographs of blood cells."""
import csv
import dataclasses
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageDraw
from processes import Command
from torch import nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d, box_iou

import wrn_timm  # noqa: F401
from wrn_timm.cli import detect as detect_script
from wrn_timm.data.boxes import divide, read_boxes, read_reduced
from wrn_timm.data.images import read_rgb
from wrn_timm.detection import build_detector, faster_rcnn, fpn_backbone, open_detector, postprocessor, retinanet
from wrn_timm.train import detector as detector_run
from wrn_timm.train import detector_loop
from wrn_timm.train.detector_loop import _backbone_in_bfloat16
from wrn_timm.train.find_objects import FoundObject, ImageObjects, draw_objects, find_in_files
from wrn_timm.train.measure_boxes import detection_metrics, predict_boxes
from wrn_timm.weights import sha256_of

BCCD = Path(__file__).parent / 'data' / 'bccd_sample'
TARGET = {'boxes': torch.tensor([[10., 10, 60, 70]]), 'labels': torch.tensor([1])}


def test_wrn50_2_detects_as_torchvisions_faster_rcnn_on_its_own_network():
    size = dict(min_size=96, max_size=128, box_score_thresh=0.)
    theirs = FasterRCNN(
        resnet_fpn_backbone(backbone_name='wide_resnet50_2', weights=None, norm_layer=nn.BatchNorm2d), 4, **size).eval()
    ours = faster_rcnn('wrn50_2', 3, detector_kwargs=size).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if '.fc.' not in k})
    image = torch.rand(3, 90, 120)
    with torch.no_grad():
        a, b = ours([image])[0], theirs([image])[0]
    assert len(b['boxes']) > 10
    for key in ('boxes', 'scores', 'labels'):
        torch.testing.assert_close(a[key], b[key], atol=1e-3, rtol=1e-4)


def test_anchors_of_retinanet_are_torchvisions_at_its_strides():
    detector = retinanet('wrn18_1_5', 3)
    assert detector.backbone.strides == (8, 16, 32)
    assert detector.anchor_generator.sizes == _default_anchorgen().sizes


@pytest.mark.parametrize('make,kwargs,strides,levels', [
    (faster_rcnn, {}, (4, 8, 16), [4, 8, 16, 32]),
    (faster_rcnn, dict(stem='cifar', out_indices=(1, 2)), (2, 4), [2, 4, 8]),
    (retinanet, dict(out_indices=(-1,)), (16,), [16, 32, 64]),
])
def test_levels_and_anchors_follow_the_strides(make, kwargs, strides, levels):
    detector = make('wrn16_2', 3, out_channels=32, detector_kwargs=dict(min_size=64, max_size=64), **kwargs)
    assert detector.backbone.strides == strides
    shapes = [f.shape[1:] for f in detector.backbone(torch.randn(1, 3, 64, 64)).values()]
    assert shapes == [(32, 64 // s, 64 // s) for s in levels]
    generator = detector.rpn.anchor_generator if make is faster_rcnn else detector.anchor_generator
    assert [sizes[0] for sizes in generator.sizes] == [(8 if make is faster_rcnn else 4) * s for s in levels]
    losses = detector([torch.rand(3, 80, 100)] * 2, [TARGET] * 2)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.backbone.body.conv1.parameters())


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels(channels):
    detector = faster_rcnn('wrn16_1', 3, out_channels=32, in_chans=channels)
    mean = sum(detector.backbone.data_config['mean'])
    assert mean == pytest.approx(channels / 3 * sum(timm.get_pretrained_cfg('wrn16_1.cifar10').mean))
    own = dict(file='', mean=(.5,) * channels, std=(.1, .2, .3, .4)[:channels])
    kept = fpn_backbone('wrn16_1', in_chans=channels, pretrained_cfg_overlay=own).data_config
    assert (kept['mean'], kept['std']) == (own['mean'], own['std'])
    assert detector([torch.rand(channels, 80, 100)] * 2, [TARGET] * 2)['loss_classifier'] > 0


def test_levels_are_the_features_of_the_network():
    backbone = fpn_backbone('wrn16_2', out_channels=32).eval()
    whole = timm.create_model('wrn16_2', stem='imagenet', features_only=True).eval()
    whole.load_state_dict(backbone.body.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(backbone.body(x).values(), whole(x), strict=True):
        torch.testing.assert_close(a, b)


def test_frozen_stages_and_norms(tmp_path):
    detector = faster_rcnn('wrn16_2', 3, out_channels=32, frozen_stages=2,
                           detector_kwargs=dict(min_size=64, max_size=64))
    body = detector.backbone.body
    before = {k: v.clone() for k, v in body.state_dict().items()}
    optimizer = torch.optim.SGD((p for p in detector.parameters() if p.requires_grad), lr=0.1)
    sum(detector([torch.rand(3, 80, 100)] * 2, [TARGET] * 2).values()).backward()
    optimizer.step()
    changed = {k.split('.')[0] for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {'conv1', 'layer3'}  # no weights fit this stem
    whole = fpn_backbone('wrn16_2', stem='cifar', frozen_stages=2).body
    assert {n.split('.')[0] for n, p in whole.named_parameters() if p.requires_grad} == {'layer3'}
    with pytest.raises(ValueError, match=r"give the name of its network.*pretrained_cfg_overlay=dict\(file="):
        fpn_backbone('local-dir:somewhere')
    torch.save(timm.create_model('wrn16_2', stem='imagenet').state_dict(), tmp_path / 'x.pth')
    ours = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'x.pth')), frozen_stages=1)
    backbone = fpn_backbone('wrn16_2', **ours)  # the weights have this stem
    assert not any(p.requires_grad for p in backbone.body.conv1.parameters())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules())
    backbone = fpn_backbone('wrn16_2', stem='cifar', pretrained=True, frozen_stages=1)
    assert not any(p.requires_grad for p in backbone.body.conv1.parameters())
    backbone = fpn_backbone('wrn16_2', pretrained=True, frozen_stages=1)  # the weights have another stem
    assert all(p.requires_grad for p in backbone.body.conv1.parameters())
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in backbone.body.layer3.modules())
    frozen = fpn_backbone('wrn16_2', frozen_norm=True)
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in frozen.modules()) == 12
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in fpn_backbone('wrn16_2').modules())


def test_boxes_stay_in_float32_where_features_are_in_bfloat16():
    detector = faster_rcnn('wrn16_1', 3, out_channels=32, detector_kwargs=dict(min_size=640, max_size=640))
    found = []
    detector.rpn.register_forward_hook(lambda rpn, args, out: found.append((args[1], out[0])))
    image = torch.rand(3, 64, 640)
    detector.eval()([image])
    with _backbone_in_bfloat16(detector, torch.device('cpu')):
        detector([image])
    detector([image])
    (exact, boxes), (rounded, other_boxes), (again, _) = found
    for a, b, c in zip(exact.values(), rounded.values(), again.values(), strict=True):
        assert b.dtype == torch.float32 and not torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(b, a, atol=0.05 * a.abs().max().item(), rtol=0)
    assert boxes[0].dtype == other_boxes[0].dtype == torch.float32
    assert not torch.equal(other_boxes[0], other_boxes[0].bfloat16().float())


def test_backbone_errors():
    with pytest.raises(ValueError, match="^resnet18 is not a network of this package"):
        fpn_backbone('resnet18')
    with pytest.raises(ValueError, match=r'out_indices \(0, 3\) of wrn16_1: its levels are 0 to 2'):
        fpn_backbone('wrn16_1', out_indices=(0, 3))
    with pytest.raises(ValueError, match='frozen_stages is 4; wrn16_1 has 3 stages'):
        fpn_backbone('wrn16_1', frozen_stages=4)


def test_boxes_of_the_sample():
    scan = read_boxes(BCCD)
    images, _, _ = divide(scan)
    bad = scan.bad
    written = sum((BCCD / 'Annotations' / f'{Path(p).stem}.xml').read_text().count('<object>') for p in images.paths)
    assert sum(map(len, images.boxes)) == written - 1 and images.classes == ('Platelets', 'RBC', 'WBC')
    assert len(bad) == 1 and bad[0].endswith(
        'BloodImage_00338.xml, object 13 (RBC): box 504, 337, 504, 337 has no area')
    with pytest.raises(ValueError, match='1 boxes or files of .* are bad: .*BloodImage_00338.xml, object 13'):
        read_boxes(BCCD, on_bad='fail')
    image, target = images.as_dataset(lambda *pair: pair, 96)[0]
    assert target['boxes'].canvas_size == (480, 640) == image.size[::-1] and set(target['labels'].tolist()) <= {1, 2, 3}


def voc(folder, boxes, name='cat', size=(40, 30)):
    """A data set of one image."""
    for part in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / part).mkdir(parents=True)
    (folder / 'ImageSets/Main/train.txt').write_text('a  1\n')
    Image.new('RGB', size).save(folder / 'JPEGImages/a.jpg')
    keys = ('xmin', 'ymin', 'xmax', 'ymax')
    (folder / 'Annotations/a.xml').write_text('<annotation>' + ''.join(
        f'<object><name>{name}</name><bndbox>' + ''.join(f'<{k}>{v}</{k}>' for k, v in zip(keys, box, strict=False))
        + '</bndbox></object>' for box in boxes) + '</annotation>')
    return folder


def test_bad_boxes_and_files_are_named(tmp_path):
    good, cases = (1, 2, 40, 30), {
        (5, 5, 5, 9): 'box 5, 5, 5, 9 has no area', (9, 5, 5, 9): 'has no area', ('nan', 1, 5, 9): 'has no area',
        (-1, 0, 5, 5): 'box -1, 0, 5, 5 is not within the image of 40 x 30', (0, 0, 41, 5): 'is not within the image',
        (1, 2, 3): 'the name or a coordinate is missing', (1, 2, 'x', 4): 'the name or a coordinate is missing'}
    scan = read_boxes(voc(tmp_path / 'boxes', [good, *cases]))
    assert scan.parts['train'].boxes[0].tolist() == [list(good)]
    assert all(expected in reason for expected, reason in zip(cases.values(), scan.bad, strict=True))
    with pytest.raises(FileNotFoundError, match='the data has no part val; its parts are train'):
        divide(scan, 'train', 'val')
    (tmp_path / 'boxes/JPEGImages/a.jpg').write_text('no')
    with pytest.raises(ValueError, match='has 1 images, none with a usable box: .*a.jpg is not an image'):
        read_boxes(tmp_path / 'boxes')
    broken = voc(tmp_path / 'broken', [good])
    (broken / 'Annotations/a.xml').write_text('<annotation>')
    with pytest.raises(ValueError, match='1 boxes or files of .*a.xml: no element found'):
        read_boxes(f'voc:{broken}', on_bad='fail')
    for encoding, message in (('klingon', 'unknown encoding: klingon'), ('hex', "'hex' is not a text encoding"),
                              ('utf-32', 'multi-byte encodings are not supported')):
        (broken / 'Annotations/a.xml').write_text(f'<?xml version="1.0" encoding="{encoding}"?><annotation/>')
        with pytest.raises(ValueError, match=f'a.xml: {message}'):
            read_boxes(f'voc:{broken}', on_bad='fail')
    (broken / 'Annotations/a.xml').unlink()
    with pytest.raises(ValueError, match='a.xml does not exist'):
        read_boxes(f'voc:{broken}', on_bad='fail')


@pytest.mark.skipif(sys.platform != 'linux', reason='where names are bytes')
def test_names_that_are_not_utf8(tmp_path):
    data, name = voc(tmp_path / 'boxes', [(1, 2, 40, 30)]), os.fsdecode(b'\xe9')
    (data / 'JPEGImages/a.jpg').rename(data / f'JPEGImages/{name}.jpg')
    (data / 'Annotations/a.xml').rename(data / f'Annotations/{name}.xml')
    (data / 'ImageSets/Main/train.txt').write_bytes(b'\xe9\n')
    scan = read_boxes(data)
    assert len(scan.parts['train']) == 1 and not scan.bad


@pytest.mark.parametrize(('text', 'message'), [
    ('{', 'detector.json is damaged: Expecting'), ('[]', 'it is not a JSON object'), ('[' * 50_000, 'is damaged'),
    ('{"classes": ["a"]}', 'its detect is missing; it must be an object'),
    ('{"detect": 1, "classes": ["a"]}', 'its detect is 1; it must be an object'),
    ('{"detect": {}, "classes": []}', 'its classes is []; it must be a list of class names'),
    ('{"detect": {}, "classes": [1]}', 'its classes is [1]'),
    ('{"detect": {"later": 1}, "classes": ["a"]}', "not describe a detector: .*unexpected keyword argument 'later'"),
    ('{"detect": {"out_channels": "x"}, "classes": ["a"]}', 'does not describe a detector: '),
    ('{"detect": {"model": "resnet18"}, "classes": ["a"]}', "resnet18 is not a network of this package"),
    ('{"detect": {"detector": "yolo"}, "classes": ["a"]}', "detector 'yolo' is unknown"),
    ('{"detect": {}, "classes": ["a"], "sha256": 1}', 'its sha256 is 1; it must be 64 hexadecimal digits'),
])
def test_a_detector_whose_record_is_wrong(run, tmp_path, capsys, text, message):
    shutil.copytree(run / 'weights', tmp_path / 'run' / 'weights')
    (tmp_path / 'run' / 'weights' / 'detector.json').write_text(text)
    assert detect_script.main(['--model', str(tmp_path / 'run'), 'x.jpg']) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and re.search(message.replace('[', r'\['), error), error


def evaluate_detector(detector, loader, classes):
    return detection_metrics(*predict_boxes(detector, loader), classes)[0]


class Finds(nn.Module):
    """Gives the boxes it is told to."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def forward(self, images):
        return [{'scores': torch.full((len(f['labels']),), .9), **f} for f in self.found]


def test_average_precision_of_known_detections():
    boxes = torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30]])
    target = {'boxes': boxes, 'labels': torch.tensor([1, 1])}
    # of two objects one, exactly: precision 1 up to recall 0.5, which is 51 of COCO's 101 points
    batch = [torch.rand(3, 30, 30)], [target]
    half = evaluate_detector(Finds([{'boxes': boxes[:1], 'labels': torch.tensor([1])}]), [batch], ('a', 'b'))
    assert half['map'] == half['map_50'] == pytest.approx(100 * 51 / 101, abs=0.01)
    assert {name: row['map'] for name, row in half['per_class'].items()} == {'a': half['map'], 'b': None}
    # the box found is right, and one of the two objects is missed, at every threshold up to its score
    assert half['precision'] == 100 and half['recall'] == 50 and half['f1'] == pytest.approx(66.67, abs=0.01)
    assert half['per_class']['a']['objects'] == 2 and half['per_class']['b']['recall'] is None
    # a class that is found and is not there has no precision
    also = {'boxes': boxes, 'labels': torch.tensor([1, 2])}
    assert evaluate_detector(Finds([also]), [batch], ('a', 'b'))['per_class'] == half['per_class']
    # overlap 0.61: enough at the thresholds 0.5, 0.55 and 0.6 of the ten
    narrow = boxes - torch.tensor([0., 0, 3.9, 0])
    loose = evaluate_detector(Finds([{'boxes': narrow, 'labels': torch.tensor([1, 1])}]), [batch], ('a',))
    assert loose['map_50'] == 100 and loose['map_75'] == 0 and loose['map'] == pytest.approx(30, abs=0.01)


SMALL = ['--model', 'wrn16_1', '--out-channels', '16', '--rois', '16', '--image-size', '96', '--batch-size', '2',
         '--anchor-scale', '4', '--device', 'cpu']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'run'
    assert detect_script.main(['--data', f'bccd:{BCCD}', '--out', str(out), '--epochs', '2', *SMALL]) == 0
    return out


IN_STEPS = ['--data', f'bccd:{BCCD}', '--epochs', '2', *SMALL, '--batch-size', '1']  # three an epoch


@pytest.fixture(scope='module')
def whole_epochs(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs') / 'in_steps'
    assert detect_script.main([*IN_STEPS, '--out', str(out)]) == 0
    return out


def test_run_directory(run):
    metrics = json.loads((run / 'metrics.json').read_text())
    assert metrics['images'] == 2 and set(metrics['per_class']) == {'Platelets', 'RBC', 'WBC'}
    assert metrics['left_out'][0].endswith('has no area') and metrics['split'] == 'given: trainval; tested on test'
    assert len((run / 'history.csv').read_text().splitlines()) == 3
    assert json.loads((run / 'weights' / 'detector.json').read_text())['detect']['model'] == 'wrn16_1'


def test_stopped_and_resumed_gives_the_same_detector(run, tmp_path, capsys):
    args = ['--data', f'bccd:{BCCD}', '--out', str(tmp_path / 'run'), '--epochs', '2', *SMALL]
    assert detect_script.main([*args, '--time-budget', '0']) == 130
    assert not (tmp_path / 'run' / 'weights').exists()
    assert detect_script.main(['--model', str(tmp_path / 'run'), 'x.jpg']) == 1
    assert 'holds no detector' in capsys.readouterr().err
    assert detect_script.main([*args, '--resume']) == 0
    a, b = (sha256_of(r / 'weights' / 'model.safetensors') for r in (run, tmp_path / 'run'))
    assert a == b


def test_sigterm_leaves_a_run_that_resumes_to_the_same_detector(whole_epochs, tmp_path):
    out = tmp_path / 'run'
    command = Command('detect', *IN_STEPS, '--out', out, errors=tmp_path / 'errors')
    while command.has_not_ended() and not (
            (out / 'train.log').is_file() and 'from epoch 0, step 0' in (out / 'train.log').read_text()):
        time.sleep(0.01)
    command.process.terminate()
    status, errors = command.end()
    assert status == 130 and 'stopped by SIGTERM' in errors
    checkpoint, = (out / 'checkpoints').iterdir()
    assert checkpoint.name in ('epoch-0000-step-000001.pt', 'epoch-0000-step-000002.pt')
    assert detect_script.main([*IN_STEPS, '--out', str(out), '--resume']) == 0
    a, b = (sha256_of(r / 'weights' / 'model.safetensors') for r in (whole_epochs, out))
    assert a == b
    a, b = (csv.DictReader((r / 'history.csv').read_text().splitlines()) for r in (whole_epochs, out))
    assert [row['train_loss'] for row in a] == [row['train_loss'] for row in b]


def test_a_run_that_is_not_there_is_not_resumed_before_the_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(detector_run, 'read_boxes', lambda *args: pytest.fail('it was read'))
    with pytest.raises(FileNotFoundError, match='no holds no run to resume'):
        detector_run.train_detector(
            wrn_timm.DetectConfig(), BCCD, tmp_path / 'no', wrn_timm.Machine('cpu', resume=True))


def test_a_resumed_run_keeps_its_split_though_photographs_came_in(tmp_path):
    data, out = shutil.copytree(BCCD, tmp_path / 'data'), tmp_path / 'run'
    shutil.rmtree(data / 'ImageSets')  # so the split is drawn
    args = ['--data', f'voc:{data}', '--out', str(out), '--epochs', '1', *SMALL]
    assert detect_script.main([*args, '--time-budget', '0']) == 130
    split = (out / 'split.csv').read_text()
    for folder, suffix in (('JPEGImages', '.jpg'), ('Annotations', '.xml')):
        for i in range(3):
            shutil.copy(data / folder / f'BloodImage_00007{suffix}', data / folder / f'Another_{i}{suffix}')
    assert 'Another' in ''.join(path for part in divide(read_boxes(f'voc:{data}'))[:2] for path in part.paths)
    assert detect_script.main([*args, '--resume']) == 0
    assert (out / 'split.csv').read_text() == split
    tested = [line for line in split.splitlines() if line.startswith('test,')]
    assert json.loads((out / 'metrics.json').read_text())['images'] == len(tested)


def test_torchvisions_own_detector_by_the_same_script(tmp_path, capsys):
    args = ['--data', f'bccd:{BCCD}', '--out', str(tmp_path / 'run'), '--model', 'torchvision/resnet50_fpn', '--opt',
            'sgd', '--epochs', '1', '--image-size', '64', '--rois', '16', '--batch-size', '3', '--anchor-scale', '8',
            '--device', 'cpu']
    assert detect_script.main(args) == 0
    detector = open_detector(tmp_path / 'run')
    own = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=4)
    own.load_state_dict(detector.state_dict())
    assert detector.rpn.anchor_generator.sizes == own.rpn.anchor_generator.sizes
    assert any(isinstance(m, nn.BatchNorm2d) for m in detector.backbone.modules())
    assert own.backbone.body.bn1.running_mean.abs().max() > 0  # trained, not frozen
    assert json.loads((tmp_path / 'run/metrics.json').read_text())['images'] == 2
    for option, expected in ((['--frozen-stages', '1'], 'frozen_stages is 1'),
                             (['--out-channels', '64'], 'out_channels is 64'),
                             (['--detector', 'retinanet'], 'detector is retinanet')):
        with pytest.raises(SystemExit):
            detect_script.main([*args, *option])
        assert f'{expected}; for torchvision/resnet50_fpn it must be' in ' '.join(capsys.readouterr().err.split())


def test_a_damaged_detector_is_refused(run, tmp_path, capsys):
    shutil.copytree(run / 'weights', tmp_path / 'run' / 'weights')
    file = tmp_path / 'run' / 'weights' / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    assert detect_script.main(['--model', str(tmp_path / 'run'), 'x.jpg']) == 1
    error = capsys.readouterr().err
    assert error.startswith('error: ') and 'but detector.json names' in error
    record = json.loads((file.parent / 'detector.json').read_text())
    assert record.pop('sha256') == sha256_of(run / 'weights' / 'model.safetensors')
    (file.parent / 'detector.json').write_text(json.dumps(record))  # as runs of before left it
    open_detector(tmp_path / 'run')
    file.write_bytes(data[:-1000])
    with pytest.raises(RuntimeError, match='model.safetensors is damaged: '):
        open_detector(tmp_path / 'run')


def test_finding_objects_with_a_finished_run(run, tmp_path, capsys):
    detector = open_detector(run)
    assert detector.classes == ('Platelets', 'RBC', 'WBC') and not detector.training
    assert detector.threshold == json.loads((run / 'metrics.json').read_text())['threshold']
    photograph, other, bad = (tmp_path / name for name in ('17.jpg', 'other/17.jpg', 'bad.jpg'))
    other.parent.mkdir()
    shutil.copy(BCCD / 'JPEGImages' / 'BloodImage_00007.jpg', photograph)
    shutil.copy(BCCD / 'JPEGImages' / 'BloodImage_00011.jpg', other)
    bad.write_text('no image')
    args = ['--model', str(run), *map(str, (photograph, other, bad)), '--threshold', '0', '--device', 'cpu']
    with torch.no_grad():
        expected = detector([torch.from_numpy(np.array(Image.open(photograph))).permute(2, 0, 1) / 255])[0]
    assert detect_script.main([*args, '--json', '--draw', str(tmp_path / 'drawn')]) == 1
    out, err = capsys.readouterr()
    result, _, failed = json.loads(out)
    assert '1 file could not be read' in err and 'bad.jpg is not an image' in failed['error']
    assert len(result['objects']) == len(expected['boxes']) > 0
    assert result['objects'][0]['box'] == pytest.approx(expected['boxes'][0].tolist(), abs=0.1)
    assert sorted(p.name for p in (tmp_path / 'drawn').iterdir()) == ['17.png', '17_2.png']
    with Image.open(photograph) as before, Image.open(tmp_path / 'drawn/17.png') as after:
        assert before.size == after.size and before.tobytes() != after.tobytes()

    detect_script.main([*args, '--csv'])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row['label'] for row in rows if row['image'] == str(photograph)] == [o['label'] for o in result['objects']]
    assert rows[-1]['error'] and not rows[-1]['label']
    detect_script.main([*args, '--coco'])
    out, err = capsys.readouterr()
    assert '17.jpg have the same image_id' in err
    first = json.loads(out)[0]
    corner, sides = first['bbox'][:2], first['bbox'][2:]
    assert first['image_id'] == 17 and [*corner, *(c + s for c, s in zip(corner, sides, strict=True))] == pytest.approx(
        result['objects'][0]['box'], abs=0.11)
    detect_script.main([*args[:3], '--threshold', '1', '--device', 'cpu'])
    assert 'no objects' in capsys.readouterr().out
    assert detect_script.main([*args[:3], '--out', 'x', '--draw', str(tmp_path), '--device', 'cpu']) == 1
    assert 'choose another --draw' in capsys.readouterr().err
    assert detect_script.main(['--out', str(run), str(photograph), '--device', 'cpu']) == 0  # instead of --model
    by_default, = wrn_timm.find_objects(run, photograph, device='cpu')
    assert [o.score for o in by_default.objects] == [
        o['score'] for o in result['objects'] if o['score'] >= detector.threshold]
    in_python = wrn_timm.find_objects(run, [photograph, bad], threshold=0.)
    assert [o.box for o in in_python[0].objects] == [tuple(o['box']) for o in result['objects']]
    assert in_python[1].error == failed['error']


def test_drawings_replace_earlier_ones_and_no_other_file(tmp_path):
    photograph, folder = tmp_path / 'a.jpg', tmp_path / 'drawn'
    Image.new('RGB', (60, 40)).save(photograph)
    folder.mkdir()
    Image.new('RGB', (5, 5)).save(folder / 'a.png')
    (folder / 'a_2.png').write_text('no image')
    others = {file: file.read_bytes() for file in folder.iterdir()}

    def draw(*objects):
        return draw_objects(ImageObjects(str(photograph), objects), ['cat'], folder, set())

    plain = draw()
    before = plain.read_bytes()
    assert plain.name == 'a_3.png' == draw(FoundObject('cat', .9, (10., 10., 30., 30.))).name
    assert plain.read_bytes() != before and {file: file.read_bytes() for file in others} == others
    assert len(list(folder.iterdir())) == 3
    with Image.open(plain) as image:
        assert image.getpixel((20, 30)) == (255, 0, 0)  # the lower edge of the box


def test_photographs_listed_on_standard_input_are_not_taken_for_drawings(run, tmp_path, monkeypatch, capsys):
    photograph = tmp_path / 'a.jpg'
    Image.new('RGB', (60, 40)).save(photograph)
    args = ['--model', str(run), '-', '--device', 'cpu', '--draw']
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{photograph}\n'))
    assert detect_script.main([*args, str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert f'{tmp_path} is the folder of {photograph}; choose another --draw' in err and not out
    assert [p.name for p in tmp_path.iterdir()] == ['a.jpg']
    monkeypatch.setattr('sys.stdin', io.StringIO(f'{photograph}\n'))
    assert detect_script.main([*args, str(tmp_path / 'drawn')]) == 0
    assert str(photograph) in capsys.readouterr().out and (tmp_path / 'drawn/a.png').is_file()


LIGHT = 1100, 300, 1900, 1500  # the box of the one object on a large photograph of 2400 x 1800


def save_large(file, turned=False):
    """A dark photograph with a light rectangle; `turned` has its EXIF data rotate it into place."""
    image, exif = Image.new('RGB', (2400, 1800)), Image.Exif()
    ImageDraw.Draw(image).rectangle([LIGHT[0], LIGHT[1], LIGHT[2] - 1, LIGHT[3] - 1], 'white')
    if turned:
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    image.save(file, exif=exif)


class FindsLight(nn.Module):
    """Finds the light rectangle of each image, and keeps the sizes of the images."""
    classes, threshold = ('cat',), .5

    def __init__(self, side=300):
        super().__init__()
        self.transform, self.sizes = torch.nn.Module(), []
        self.transform.max_size, self.score_thresh = side, 0.
        self.register_parameter('device', nn.Parameter(torch.zeros(1)))

    def forward(self, images):
        self.sizes += [tuple(image.shape[:0:-1]) for image in images]
        places = [(image[0] > .5).nonzero().flip(1) for image in images]
        return [{'boxes': torch.cat([at.amin(0), at.amax(0) + 1])[None].float(), 'scores': torch.tensor([.9]),
                 'labels': torch.tensor([1])} for at in places]


def test_large_photographs_are_reduced_and_their_boxes_are_in_pixels_of_the_whole(tmp_path):
    files = [tmp_path / name for name in ('a.jpg', 'turned.jpg', 'a.png')]
    for file in files:
        save_large(file, turned='turned' in file.name)
        whole = read_rgb(file)
        image, scale = read_reduced(file, 500)
        assert image.size == (600, 450) and scale == (4, 4)
        expected = np.asarray(whole.resize((600, 450), Image.Resampling.BOX), float)
        assert np.abs(np.asarray(image, float) - expected).mean() < 1  # of 255
        image, scale = read_reduced(file, 1201)
        assert scale == (1, 1) and np.array_equal(np.asarray(image), np.asarray(whole))
    detector = FindsLight()
    detector.score_thresh = 0.95  # above which it is left again
    for found in find_in_files(detector, map(str, files), threshold=0.):
        assert found.objects[0].box == pytest.approx(LIGHT, abs=8)
    assert detector.sizes == [(300, 225)] * 3 and detector.score_thresh == 0.95
    # sides that no whole number divides, and a photograph that is larger than the detector needs, but not large
    for size, reduced in (((2333, 1501), (583, 375)), ((1999, 501), (1999, 501))):
        read_rgb(files[0]).resize(size).save(tmp_path / 'b.jpg')
        image, scale = read_reduced(tmp_path / 'b.jpg', 400)
        assert tuple(round(v * s) for v, s in zip(image.size, scale, strict=True)) == size
        assert image.size == pytest.approx(reduced, abs=1)


def test_large_photographs_are_trained_and_measured_on(tmp_path, monkeypatch):
    data = voc(tmp_path / 'data', [LIGHT])
    for part in ('train', 'test'):
        save_large(data / f'JPEGImages/{part}.jpg', turned=part == 'test')
        shutil.copy(data / 'Annotations/a.xml', data / f'Annotations/{part}.xml')
        (data / f'ImageSets/Main/{part}.txt').write_text(f'{part}\n')
    trained_on, reported = [], []
    monkeypatch.setattr(detector_loop, '_step', lambda detector, optimizer, images, targets, device: trained_on.extend(
        zip(images, targets, strict=True)) or 0.)
    monkeypatch.setattr(detector_run, 'write_detector_report', lambda *args: reported.extend(args[4]))
    monkeypatch.setattr(detector_run, 'open_detector', lambda *args: FindsLight())
    monkeypatch.setattr(detector_run, 'finish_detector_folder', lambda *args: None)
    config = wrn_timm.DetectConfig(
        model='wrn16_1', pretrained=False, epochs=8, batch_size=1, image_size=160, out_channels=16, anchor_scale=8.)
    metrics = detector_run.train_detector(config, data, tmp_path / 'run')
    for image, target in trained_on:  # mirrored or not
        assert image.shape == (3, 225, 300)
        assert target['boxes'][0].tolist() == pytest.approx(FindsLight()([image])[0]['boxes'][0].tolist(), abs=1)
    assert len(trained_on) == 8 and metrics['map_75'] == 100
    assert len({target['boxes'][0, 0].item() for _, target in trained_on}) == 2
    trained_on.clear()
    detector_run.train_detector(dataclasses.replace(config, flip=False), data, tmp_path / 'not_mirrored')
    assert len({target['boxes'][0, 0].item() for _, target in trained_on}) == 1
    assert reported[0]['boxes'][0].tolist() == pytest.approx(LIGHT, abs=12)


def test_memory_that_is_short_in_training_names_what_to_lower(tmp_path, monkeypatch, capsys):
    def step(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    monkeypatch.setattr(detector_loop, '_step', step)
    args = ['--data', f'bccd:{BCCD}', *SMALL, '--out']
    assert detect_script.main([*args, str(tmp_path / 'a')]) == 1
    assert ('out of memory on cpu at batch size 2 and 96 px; choose a smaller --batch-size or --image-size'
            in capsys.readouterr().err)
    assert detect_script.main([*args, str(tmp_path / 'b'), '--batch-size', '1']) == 1
    assert 'at batch size 1 and 96 px; choose a smaller --image-size' in capsys.readouterr().err


def test_the_trial_of_batch_sizes_counts_the_state_of_the_optimizer(monkeypatch):
    config = wrn_timm.DetectConfig(
        model='wrn16_1', pretrained=False, batch_size=8, image_size=64, out_channels=16, anchor_scale=4., rois=16)
    detector, real, tried = build_detector(config, ['cat']), detector_loop._step, []
    before = {k: v.clone() for k, v in detector.state_dict().items()}

    def step(detector, optimizer, images, *args):
        tried.append((len(images), bool(optimizer.state)))
        if len(images) > 2 and optimizer.state:
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')
        return real(detector, optimizer, images, *args)

    monkeypatch.setattr(detector_loop, '_step', step)
    assert detector_loop.fitting_batch(detector, config, torch.device('cpu')) == 2
    assert tried == [(8, False), (8, True), (4, True), (2, True), (2, True)]
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert all(p.grad is None for p in detector.parameters())


def test_metrics_are_those_of_torchmetrics():
    torch.manual_seed(0)
    found, there = [], []
    for _ in range(12):
        corners = torch.rand(6, 2) * 80
        boxes = torch.cat([corners, corners + 8 + torch.rand(6, 2) * 40], 1)
        labels = torch.randint(1, 4, (6,))
        there.append({'boxes': boxes, 'labels': labels})
        moved = torch.cat([boxes + torch.randn(6, 4) * 3, boxes[:2] + 30])
        found.append({'boxes': moved, 'labels': torch.cat([labels, labels[:2]]), 'scores': torch.rand(8)})
    metric = MeanAveragePrecision(class_metrics=True)
    metric.update(found, there)
    expected = metric.compute()
    ours, curves = detection_metrics(found, there, ('a', 'b', 'c'))
    for key in ('map', 'map_50', 'map_75'):
        assert ours[key] == pytest.approx(100 * expected[key].item(), abs=0.1)
    assert [row['map'] for row in ours['per_class'].values()] == pytest.approx(
        (100 * expected['map_per_class']).tolist(), abs=0.1)  # its 0.7 of COCO's recalls is 0.69999999
    # precision and recall by counting, at the threshold that was chosen
    right = below = 0
    for label in (1, 2, 3):
        for f, t in zip(found, there, strict=True):
            keep = (f['labels'] == label) & (f['scores'] >= ours['threshold'])
            order = f['scores'][keep].argsort(descending=True)
            free = t['boxes'][t['labels'] == label]
            below += int(keep.sum())
            for box in f['boxes'][keep][order]:
                if len(free) and (overlap := box_iou(box[None], free)[0]).max() >= 0.5:
                    free = free[torch.arange(len(free)) != overlap.argmax()]
                    right += 1
    curve = [curves[name].at(ours['threshold']) for name in 'abc']
    assert sum(r * curves[n].objects for n, (_, r) in zip('abc', curve, strict=True)) == pytest.approx(right)
    assert sum(int((curves[n].scores >= ours['threshold']).sum()) for n in 'abc') == below
    assert ours['precision'] == pytest.approx(100 * np.mean([p for p, _ in curve]), abs=0.01)


def test_nothing_to_measure_is_said():
    empty = {'boxes': torch.zeros(0, 4), 'labels': torch.zeros(0, dtype=torch.int64), 'scores': torch.zeros(0)}
    one = {'boxes': torch.tensor([[0., 0, 9, 9]]), 'labels': torch.tensor([1])}
    metrics, curves = detection_metrics([empty], [one], ('a',))
    assert metrics['map'] == metrics['recall'] == 0 and len(curves['a'].scores) == 0
    with pytest.raises(ValueError, match='there is no object in the test images'):
        detection_metrics([empty], [empty], ('a',))


def test_several_seeds(tmp_path, capsys, monkeypatch):
    out = tmp_path / 'runs'
    args = ['--data', f'bccd:{BCCD}', '--out', str(out), *SMALL, '--epochs', '1', '--seeds', '2']

    def full(*_):
        raise OSError('disk full')

    with monkeypatch.context() as patch:  # a run without its card and threshold is not finished
        patch.setattr(detector_run, 'finish_detector_folder', full)
        assert detect_script.main([*args, '--messages', 'json']) == 1
    first = json.loads(capsys.readouterr().out)
    assert detect_script.main([*args, '--messages', 'json', '--resume']) == 0
    lines = [first, *(json.loads(line) for line in capsys.readouterr().out.splitlines())]
    assert [line['epoch'] for line in lines[:-1]] == [1, 1]
    assert all('threshold' in json.loads((out / f'seed-{i}/weights/detector.json').read_text()) for i in (0, 1))
    each = [json.loads((out / f'seed-{i}/metrics.json').read_text())['map_50'] for i in (0, 1)]
    summary = json.loads((out / 'metrics.json').read_text())
    assert summary['map_50']['values'] == each and summary['map_50']['mean'] == pytest.approx(np.mean(each), abs=1e-3)
    assert detect_script.main(args) == 1 and 'the results of several seeds' in capsys.readouterr().err
    assert detect_script.main([*args, '--resume']) == 0


def test_settings_of_seeds_that_failed_are_not_those_of_a_later_run(tmp_path):
    for name, epochs in (('settings', 1), ('recipe', 3)):
        (tmp_path / f'{name}.json').write_text(json.dumps({'detect': {'epochs': epochs}}))
    assert detector_run.asked_before(tmp_path).epochs == 3
    (tmp_path / 'recipe.json').unlink()
    assert detector_run.asked_before(tmp_path).epochs == 1


def test_several_seeds_that_were_stopped_go_on_as_they_were_asked_for(tmp_path, capsys):
    out = tmp_path / 'runs'
    args = ['--data', f'bccd:{BCCD}', '--out', str(out), *SMALL, '--batch-size', '1', '--epochs', '1', '--seeds', '2',
            '--anchor-scale', '0']
    assert detect_script.main([*args, '--time-budget', '0']) == 130
    assert not (out / 'seed-1').exists()
    asked = (out / 'settings.json').read_text()
    assert detect_script.main([*args, '--lr', '0.1']) == 1  # without --resume: what was asked for stays
    assert 'already holds a run' in capsys.readouterr().err and (out / 'settings.json').read_text() == asked
    again = ['--data', f'bccd:{BCCD}', '--out', str(out), '--device', 'cpu', '--resume']
    assert detect_script.main(again) == 1
    assert 'give --seeds again' in capsys.readouterr().err
    assert detect_script.main([*again, '--seeds', '2']) == 0
    for seed in (0, 1):
        settings = json.loads((out / f'seed-{seed}/recipe.json').read_text())['detect']
        assert (settings['seed'], settings['epochs'], settings['batch_size'], settings['rois']) == (seed, 1, 1, 16)
        assert settings['anchor_scale'] > 0
    assert len(json.loads((out / 'metrics.json').read_text())['map']['values']) == 2


def test_the_threshold_lies_in_the_middle_of_those_with_the_best_f1():
    boxes = torch.tensor([[0., 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    there = [{'boxes': boxes[:2], 'labels': torch.tensor([1, 1])}]

    def threshold(scores):
        found = {'boxes': boxes[:len(scores)], 'labels': torch.ones(len(scores), dtype=torch.int64)}
        return detection_metrics([found | {'scores': torch.tensor(scores)}], there, ('a',))[0]['threshold']

    assert threshold([.9, .95]) == pytest.approx(.45, abs=.02)  # any up to 0.9 is as good
    assert threshold([.9, .95, .305]) == pytest.approx(.6, abs=.02)  # any above the false box's
    assert threshold([]) == pytest.approx(.5, abs=.01)
    assert threshold([.06, .055]) >= .05  # below which torchvision's detectors find nothing


def test_what_is_left_open_is_found_from_data_and_weights(tmp_path, monkeypatch, caplog):
    machine = wrn_timm.Machine()
    data = detector_run._read(wrn_timm.DetectConfig(), BCCD, tmp_path, machine)
    _, config = detector_run._prepared(wrn_timm.DetectConfig(), data, tmp_path / 'no', machine)
    assert config.model == 'wrn16_2.cifar100' and 'ImageNet weights are not available' in caplog.text
    assert (config.image_size, config.epochs, config.batch_size, config.out_channels) == (640, 60, 2, 64)
    assert config.max_objects == 100
    crowded = dataclasses.replace(data.train, boxes=(torch.rand(130, 4).sort().values, *data.train.boxes[1:]))
    for name in ('faster_rcnn', 'retinanet'):
        many = detector_run._resolved(wrn_timm.DetectConfig('wrn16_1', name, pretrained=False), data.scan, crowded)
        assert postprocessor(build_detector(many, data.train.classes)).detections_per_img == 260
    # ImageNet weights in a folder are found, and their BatchNorm is frozen
    folder = tmp_path / 'wrn18_1.tv_in1k'
    wrn_timm.weights.export_weights(timm.create_model('wrn18_1'), folder, {'tag': 'tv_in1k'})
    monkeypatch.setenv('WRN_TIMM_WEIGHTS', str(tmp_path))
    detector, config = detector_run._prepared(wrn_timm.DetectConfig(), data, tmp_path / 'no', machine)
    assert config.model == 'wrn18_1.tv_in1k' and config.out_channels == 256
    assert any(isinstance(m, FrozenBatchNorm2d) for m in detector.backbone.modules())
    own = timm.create_model('wrn18_1.tv_in1k', pretrained=True).state_dict()
    body = detector.backbone.body
    torch.testing.assert_close(body.state_dict()['layer3.0.conv1.weight'], own['layer3.0.conv1.weight'])
    # weights of the 3x3 stem are taken for all but the stem, whose BatchNorm has to be trained
    detector, _ = detector_run._prepared(wrn_timm.DetectConfig(model='wrn16_1.cifar10'), data, tmp_path / 'no', machine)
    own = timm.create_model('wrn16_1.cifar10', pretrained=True).state_dict()
    body = detector.backbone.body
    torch.testing.assert_close(body.state_dict()['layer2.0.conv1.weight'], own['layer2.0.conv1.weight'])
    assert body.conv1.weight.shape[2:] == (7, 7) and any(isinstance(m, nn.BatchNorm2d) for m in body.modules())


def test_script_errors(run, tmp_path, capsys):
    sample, new = ['--data', f'voc:{BCCD}'], ['--out', str(tmp_path / 'a')]
    for args, expected in (
            (new, '--data is missing'),
            ([*sample, *new, 'a.jpg'], 'not both'),
            (['--model', 'RUN', 'a.jpg', '--resume'], '--resume is for training; leave it out with photographs'),
            ([*sample, *new, '--json'], '--json is for finding objects in photographs; leave it out with --data'),
            (['--model', 'RUN', 'a.jpg', '--json', '--csv'], 'choose one of --json, --csv and --coco'),
            (['--model', 'RUN', 'a.jpg', '--threshold', '2'], 'threshold is 2.0; it must be from 0 to 1'),
            ([*sample, *new, '--precision', 'fp16'], "invalid choice: 'fp16'"),
            ([*sample, *new, '--epochs', '-1'], 'epochs is -1; it must be at least 0'),
            ([*sample, *new, '--detector', 'yolo'], "invalid choice: 'yolo'"),
    ):
        with pytest.raises(SystemExit):
            detect_script.main(args)
        assert expected in ' '.join(capsys.readouterr().err.split())
    for args, expected in (
            (['--data', str(tmp_path), *new], 'holds no annotations in a known format'),
            ([*sample, '--out', str(run), *SMALL], 'already holds a run'),
            ([*sample, *new, '--on-bad', 'fail'], 'has no area'),
            (['--model', str(run), '--image-size', '320', 'a.jpg'], '--image-size is for training; a trained detector'),
            ([*sample, *new, '--model', 'resnet50'], "is not a network of this package"),
            ([*sample, *new, '--model', 'wrn28_2'], '--no-pretrained starts from random weights'),
    ):
        assert detect_script.main(args) == 1
        assert expected in capsys.readouterr().err
    assert not (tmp_path / 'a').exists()
