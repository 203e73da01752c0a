"""Exported detectors: against torchvision's own code on photographs of other sizes than that of tracing."""
import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, randomise
from PIL import Image
from torch import nn
from torchvision.transforms.functional import to_tensor

from wrn_timm.cli import export as export_script
from wrn_timm.detection import build_detector, export_detector, open_detector, postprocessor
from wrn_timm.detector_export import ExportedDetector, detector_to_onnx, in_common
from wrn_timm.recipes import DetectConfig

CLASSES = ('Platelets', 'RBC', 'WBC')
BCCD = ROOT / 'tests/data/bccd_sample/JPEGImages/BloodImage_00007.jpg'


@pytest.fixture(scope='module', params=['faster_rcnn', 'retinanet'])
def run(request, tmp_path_factory):
    """The run directory of a tiny detector whose scores differ from one another."""
    config = DetectConfig(model='wrn16_1', detector=request.param, pretrained=False, image_size=96, out_channels=16,
                          anchor_scale=4., epochs=1, batch_size=1)
    torch.manual_seed(0)
    detector = randomise(build_detector(config, CLASSES))
    for name, p in detector.named_parameters():
        if name.endswith(('cls_logits.weight', 'cls_score.weight')):
            nn.init.normal_(p, std=0.1)
    out = tmp_path_factory.mktemp('runs') / request.param
    out.mkdir()
    export_detector(detector, out / 'weights', {'detect': dataclasses.asdict(config), 'classes': CLASSES})
    return out


@pytest.fixture(scope='module')
def photographs():
    """Landscape, portrait and narrow, all larger than the detector's size and than what it is traced with."""
    with Image.open(BCCD) as file:
        image = to_tensor(file.convert('RGB'))
    return [image, image.transpose(1, 2).contiguous(), image[:, :50].contiguous()]


def assert_same(found, expected):
    """The same objects in any order; one in thirty may differ, where two overlap about as much as is allowed."""
    assert len(found[2]) == len(expected[2]) > 20
    rows = [np.column_stack([boxes / 100, labels, scores]) for boxes, labels, scores in (found, expected)]
    nearest = np.abs(rows[0][:, None] - rows[1]).max(2).min(1)
    assert (nearest < 1e-3).mean() > 29 / 30


@pytest.mark.parametrize('to', ['onnx', 'ts'])
def test_an_exported_detector_finds_the_same(run, photographs, to, tmp_path, capsys):
    out = tmp_path / 'new' / f'detector.{to}'
    args = ['--model', str(run), '--to', to, '--out', str(out)]
    assert export_script.main(args) == 0
    told = capsys.readouterr().out
    assert 'on photographs of 398 x 164, ' in told and 'it and the detector agree on ' in told
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    detector = open_detector(run)
    if to == 'onnx':
        session = onnxruntime.InferenceSession(str(out))
        found = [session.run(['boxes', 'labels', 'scores'], {'image': p.numpy()}) for p in photographs]
    else:
        script = torch.jit.load(str(out))
        found = [[o.numpy() for o in script(p)] for p in photographs]
    with torch.no_grad():
        for objects, photograph in zip(found, photographs, strict=True):
            expected, = detector([photograph])
            assert_same(objects, [expected[k].numpy() for k in ('boxes', 'labels', 'scores')])
    exported = ExportedDetector(out, threshold=0.6)
    postprocessor(detector).score_thresh = 0.6
    assert exported.classes == CLASSES
    objects, expected = (found([photographs[0]])[0] for found in (exported, detector))
    assert len(objects['scores']) == len(expected['scores'])


@pytest.mark.parametrize('sides', [(164, 398), (39, 480), (111, 431)])
def test_sizes_that_float32_rounds_otherwise(run, sides, tmp_path):
    """398 * (96 / 398) is 96 in float64 and just below it in float32."""
    detector = open_detector(run / 'weights')
    detector_to_onnx(detector, tmp_path / 'detector.onnx')
    same, total = in_common(tmp_path / 'detector.onnx', detector, [torch.rand(3, *sides)])
    assert same >= 0.98 * total > 0


def test_the_first_image_does_not_change_what_is_found_on_others(photographs, run):
    expected = open_detector(run)(photographs[:1])[0]
    detector = open_detector(run)
    detector([photographs[2][:, :20]])  # 96 x 4 pixels, which are padded to 96 x 32
    for key, value in detector(photographs[:1])[0].items():
        assert torch.equal(value, expected[key])


def test_the_file_says_what_it_is(run, tmp_path):
    detector = open_detector(run)
    expected = {'classes': list(CLASSES), 'threshold': 0.5, 'lowest_score': 0.05, 'image_size': 96}
    for to, exporter in export_script.DETECTOR_EXPORTERS.items():
        exporter(detector, tmp_path / f'a.{to}')
    extra = {'config.json': ''}
    torch.jit.load(str(tmp_path / 'a.ts'), _extra_files=extra)
    model = onnx.load(tmp_path / 'a.onnx')
    assert json.loads(extra['config.json']) == expected
    assert json.loads({p.key: p.value for p in model.metadata_props}['config']) == expected
    assert [i.name for i in model.graph.input] == ['image']
    assert [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [
        3, 'height', 'width']


def test_a_file_that_finds_something_else_is_not_kept(run, tmp_path, capsys, monkeypatch):
    def other(detector, path):
        detector.transform.image_mean = [0., 0., 0.]
        torch.manual_seed(0)
        detector_to_onnx(randomise(detector), path)
        detector.load_state_dict(open_detector(run).state_dict())

    monkeypatch.setitem(export_script.DETECTOR_EXPORTERS, 'onnx', other)
    assert export_script.main(['--model', str(run), '--to', 'onnx', '--out', str(tmp_path / 'a.onnx')]) == 1
    assert 'less than 95%' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_clear_errors(run, tmp_path, capsys):
    for options, message in (
            (['--to', 'pt2', '--out', str(tmp_path / 'a.pt2')], 'choose --to onnx or ts'),
            (['--to', 'ts', '--out', str(tmp_path / 'a.ts'), '--features'], '--features is for classifiers')):
        with pytest.raises(SystemExit):
            export_script.main(['--model', str(run), *options])
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r'the suffix of .*a\.bin is not one of \.onnx, \.ts'):
        ExportedDetector('a.bin')
    assert not list(tmp_path.iterdir())
