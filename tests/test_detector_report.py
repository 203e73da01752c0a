"""The report of a detector: its pictures, and its page as a reader sees it, in a real browser."""
import dataclasses
import html
import json
import os
import re
import shlex
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import (  # noqa: F401  (the browser, and what holds for every page)
    browser,
    figures,
    heading_of_whole_page,
    test_it_fits_the_screen_and_can_be_read,
)

from wrn_timm.cli import detect as detect_script
from wrn_timm.data.boxes import BoxedImages
from wrn_timm.recipes import DetectConfig
from wrn_timm.train.curves import plot_history
from wrn_timm.train.detector_report import draw_curves, draw_photographs, match_boxes, write_detector_report
from wrn_timm.train.measure_boxes import _evaluated, detection_metrics

ODD = '<script>alert(1)</script>', '$x$', '_under', '鳥', 'two\nlines\u202e', 'long' * 30, '$\\frac{'


def target(boxes, labels, scores=None):
    found = {'boxes': torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), 'labels': torch.tensor(labels).long()}
    return found if scores is None else found | {'scores': torch.tensor(scores, dtype=torch.float32)}


NOTHING = target([], [], [])


def photographs(folder, sizes, classes, boxes_of=lambda i: 1 + i % 4):
    """Photographs of noise with random boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, boxes, labels = [], [], []
    for i, (width, height) in enumerate(sizes):
        path = folder / f'<b>$x_{i} {"long" * 15}.png'
        if i % 2 and sys.platform == 'linux':  # where names are bytes, and these are not UTF-8
            path = folder / os.fsdecode(b'\xe9 %d.png' % i)
        Image.effect_noise((width, height), 60).save(path)
        corner = torch.rand(boxes_of(i), 2) * 0.5
        boxes.append(torch.cat([corner, corner + 0.1 + 0.4 * torch.rand(boxes_of(i), 2)], 1)
                     * torch.tensor([width, height, width, height]))
        labels.append(torch.randint(1, len(classes) + 1, (boxes_of(i),)))
        paths.append(str(path))
    return BoxedImages(tuple(paths), tuple(boxes), tuple(labels), tuple(classes))


def truth(test):
    return [{'boxes': boxes, 'labels': labels} for boxes, labels in zip(test.boxes, test.labels, strict=True)]


def guesses(test, most=0.2):
    """The boxes that are there, moved at random, and as many that are not."""
    found = []
    for boxes, labels in zip(test.boxes, test.labels, strict=True):
        moved = boxes + torch.randn(boxes.shape) * most * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
        moved[:, 2:] = moved[:, 2:].maximum(moved[:, :2] + 1)
        other = torch.randint(1, len(test.classes) + 1, labels.shape)
        found.append({'boxes': torch.cat([moved, moved + 5]), 'labels': torch.cat([labels, other]),
                      'scores': torch.rand(2 * len(labels))})
    return found


def write(folder, test, found, **more):
    """The report of a run on `test`; its metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    plot_history([{'epoch': i, 'lr': 0.1 / i, 'train_loss': 1 / i} for i in (1, 2, 3)], folder / 'curves.png')
    settings = dataclasses.asdict(DetectConfig(model='wrn16_1', pretrained=False, epochs=3, image_size=96))
    (folder / 'recipe.json').write_text(json.dumps({'detect': settings}))
    metrics, curves = detection_metrics(found, truth(test), test.classes)
    metrics |= {'dataset': 'set', 'split': '80-20 by seed 0', 'left_out': [], 'leaks': [], 'train_images': 9,
                'epochs': 3, 'image_size': 96, 'train_seconds': 100., 'seconds': 120., 'environment': {'torch': '2.6'}}
    metrics |= {key: more[key] for key in more if key in metrics}
    write_detector_report(folder, metrics, curves, test, found, {
        'data': more.get('data', 'gone'), 'summary': more.get('summary', [])})
    return metrics


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    """Of a run with names that want escaping and breaking, and photographs of many shapes."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp('report')
    test = photographs(root / 'data', [(160, 120), (120, 160), (300, 90), (12, 9)] * 4, ODD)
    reasons = [f'{"no-image" * 20} {i} & <more>' for i in range(60)]
    metrics = write(
        root / 'run', test, guesses(test), dataset='<i>set</i> $x$', left_out=reasons, leaks=[('a', 'b')],
        data=f"coco:{root / 'data'}", summary=['COCO: 25 photographs', *(f'left out: {reason}' for reason in reasons)])
    (root / 'run' / 'metrics.json').write_text(json.dumps(metrics))
    return root / 'run' / 'report.html'


@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_boxes_are_matched_as_pycocotools_matches_them(threshold):
    classes, n = ('a', 'b', 'c'), 40
    corner = torch.rand(n, 12, 2) * 60
    there = [target((torch.cat([c, c + 30], 1)).tolist(), torch.randint(1, 4, (12,)).tolist()) for c in corner]
    found = [{'boxes': torch.cat([t['boxes']] * 2) + 4 * torch.randn(24, 4), 'labels': torch.cat([t['labels']] * 2),
              'scores': torch.rand(24)} for t in there]
    ours = [match_boxes(i, f, t['boxes'], t['labels'], threshold) for i, (f, t) in enumerate(
        zip(found, there, strict=True))]
    rows = [row for row in _evaluated(found, there, classes).evalImgs if row and row['aRng'] == [0, 1e10]]
    for matched, given, known in zip(ours, found, there, strict=True):
        theirs = [(score, bool(match)) for row in rows if row['image_id'] == matched.index
                  for score, match in zip(row['dtScores'], row['dtMatches'][0], strict=True) if score >= threshold]
        theirs.sort(reverse=True)
        assert list(zip(matched.found['scores'].tolist(), matched.right.tolist(), strict=True)) == theirs
        assert len(theirs) == int((given['scores'] >= threshold).sum())
        assert int(matched.missed.sum()) == len(known['labels']) - sum(match for _, match in theirs)
    assert 0 < sum(m.false for m in ours) < sum(len(m.right) for m in ours)


def test_an_image_is_ranked_and_named_by_its_mistakes():
    box, far = [10, 10, 50, 50], [60, 60, 90, 90]
    known = torch.tensor([box, far]).float(), torch.tensor([1, 2])
    cases = {  # the worst first
        '2 objects: 2 missed, 2 false': target([box, far], [2, 1], [0.9, 0.9]),
        '2 objects: 2 missed, 1 false': target([box], [2], [0.3]),
        '2 objects: 2 missed': target([box], [1], [0.1]),
        '2 objects: 1 missed, 1 false': target([box, box], [1, 1], [0.9, 0.8]),
        '2 objects: 1 missed': target([box], [1], [0.3]),
        '2 objects, all found': target([far, box], [2, 1], [0.9, 0.3])}
    matched = [match_boxes(0, found, *known, 0.3 - 1e-6) for found in cases.values()]
    assert list(map(str, matched)) == list(cases) and [m.rank for m in matched] == sorted(m.rank for m in matched)
    assert [round(m.f1, 3) for m in matched] == [0, 0, 0, 0.5, 0.667, 1]
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert str(match_boxes(0, NOTHING, *none, 0.5)) == 'no object, and none found'
    assert str(match_boxes(0, target([box], [1], [0.9]), *none, 0.5)) == 'no object: 1 false'
    assert str(match_boxes(0, target([box], [1], [0.9]), known[0][:1], known[1][:1], 0.5)) == '1 object, found'
    assert match_boxes(0, NOTHING, *none, 0.5).f1 == 1 and match_boxes(0, NOTHING, *known, 0.5).f1 == 0


@pytest.mark.filterwarnings('ignore:Glyph')  # where this asks how wide a legend is
@pytest.mark.parametrize('n', [1, 7, 10, 11])
def test_curves_go_through_the_figures_of_the_threshold(figures, tmp_path, n):  # noqa: F811
    names = [*ODD, *map(str, range(n))][:n]
    labels = [torch.randint(1, n + 1, (40,)).tolist() for _ in range(6)]
    there = [target((torch.rand(40, 2) * 100).repeat(1, 2).add(torch.tensor([0, 0, 20, 20])).tolist(), ls)
             for ls in labels]
    test = BoxedImages(('',) * 6, tuple(t['boxes'] for t in there), tuple(t['labels'] for t in there), tuple(names))
    metrics, curves = detection_metrics(guesses(test, 0.1), there, names)
    draw_curves(metrics, curves, tmp_path / 'precision_recall.png')
    left, right = figures[0].axes
    dots = {line.get_color(): line for line in left.lines if line.get_marker() == 'o'}
    whole = {line.get_color(): line for line in left.lines if line.get_marker() != 'o'}
    expected = [metrics['per_class'][name] for name in curves] if n <= 10 else []
    expected += [metrics] if n > 1 else []
    assert len(dots) == len(expected) and len(whole) == len(expected) + (n > 10)
    for (colour, dot), row in zip(dots.items(), expected, strict=True):
        assert dot.get_xydata()[0] == pytest.approx([row['recall'], row['precision']], abs=0.01)
        curve = whole[colour].get_xydata()
        assert np.abs(curve - dot.get_xydata()).sum(1).min() < 0.02  # rounded
    f1 = next(line for line in right.lines if line.get_color() == ('black' if n > 1 else 'C0')).get_xydata()
    assert f1[f1[:, 1].argmax(), 0] == metrics['threshold']
    assert f1[:, 1].max() == pytest.approx(metrics['f1'], abs=0.01)
    texts = figures[0].legends[0].get_texts()
    assert len(texts) == (n + 1 + (n > 1) if n <= 10 else 3) and not any(text.get_parse_math() for text in texts)
    assert figures[0].bbox.containsx(figures[0].legends[0].get_window_extent().x1)
    assert all(text.get_text() for text in texts) and texts[-1].get_text() == f"threshold {metrics['threshold']:g}"


def test_true_and_predicted_boxes_are_drawn_on_the_photographs(figures, tmp_path):  # noqa: F811
    test = photographs(tmp_path, [(160, 120), (2000, 1500), (120, 160)], ODD)
    found = guesses(test)
    images = [match_boxes(i, *image, 0.3) for i, image in enumerate(
        zip(found, test.boxes, test.labels, strict=True))]
    os.unlink(test.paths[0])
    draw_photographs(test, images, tmp_path / 'some.png')
    for axes, i in zip(figures[0].axes, (1, 2), strict=True):
        width, height = (2000, 1500) if i == 1 else (120, 160)
        shown, = axes.get_images()
        assert shown.get_extent() == [0, width, height, 0] and max(shown.get_array().shape) <= 800
        assert axes.get_title().endswith(f'\n{images[i]}')
        for style, boxes in (('--', test.boxes[i]), ('-', found[i]['boxes'][found[i]['scores'] >= 0.3])):
            drawn = [[*p.get_xy(), p.get_x() + p.get_width(), p.get_y() + p.get_height()]
                     for p in axes.patches if p.get_linestyle() == style]
            np.testing.assert_allclose(sorted(drawn), sorted(boxes.tolist()), atol=1e-3)
        colours = [p.get_edgecolor() for p in axes.patches]
        assert len(set(colours)) == len({*images[i].right.tolist()}) + len({*images[i].missed.tolist()})
        assert len(axes.texts) == len(images[i].right) + int(images[i].missed.sum())
        assert not any(text.get_parse_math() for text in (axes.title, *axes.texts))
    assert [t.get_text() for t in figures[0].legends[0].get_texts()] == [
        'true, found', 'true, missed', 'predicted, right', 'predicted, false']
    legend = figures[0].legends[0].get_window_extent()
    assert figures[0].bbox.containsx(legend.x0) and figures[0].bbox.containsx(legend.x1)
    assert not any(legend.overlaps(axes.get_tightbbox()) for axes in figures[0].axes)
    draw_photographs(test, images[:1], tmp_path / 'some.png')
    assert not (tmp_path / 'some.png').exists() and len(figures) == 1


@pytest.mark.parametrize('n,flawed,best,worst', [(1, 0, 1, 0), (1, 1, 0, 1), (5, 5, 2, 3), (14, 3, 6, 3)])
def test_no_photograph_is_among_the_best_and_the_worst(tmp_path, monkeypatch, n, flawed, best, worst):
    drawn = {}
    monkeypatch.setattr('wrn_timm.train.detector_report._draw_photograph', lambda axis, picture, size, matched, test: (
        drawn.setdefault(axis.figure, []).append(matched)))
    test = photographs(tmp_path / 'data', [(40, 30)] * n, 'ab')
    found = [image | {'scores': torch.linspace(0.9, 1, len(image['labels']))} for image in truth(test)]
    for image in found[:flawed]:
        image['labels'] = 3 - image['labels']
    write(tmp_path / 'run', test, found)
    written = {name: (tmp_path / 'run' / f'{name}.png').is_file() for name in ('best', 'worst')}
    assert written == {'best': bool(best), 'worst': bool(worst)}
    pages = iter(drawn.values())
    low, high = next(pages) if worst else [], next(pages) if best else []
    assert (len(low), len(high)) == (worst, best)
    assert not {m.index for m in low} & {m.index for m in high} and all(m.f1 < 1 for m in low)
    page = (tmp_path / 'run' / 'report.html').read_text()
    assert f'a missed object or a false box: {flawed} of {n}.' in page if flawed else 'None: every object' in page


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ('src', 'href')]


def test_the_page_holds_all_and_the_command_repeats_the_run(report):
    text = report.read_text(encoding='utf-8')
    page, plain = _Page(text), html.unescape(text)
    assert len(page.sources) == 4 and all(source.startswith('data:image/png;base64,') for source in page.sources)
    assert not {'script', 'b', 'i'} & set(page.tags) and ODD[0] in plain
    command = shlex.split(re.search('<pre>(.*?)</pre>', plain, flags=re.S)[1])
    assert command[:2] == ['wrn-timm', 'detect']
    options, config = detect_script.parse(
        command[2:], ('detect', ''), detect_script.DetectOptions, DetectConfig, DetectConfig, detect_script.PURPOSES)
    assert options.data == f'coco:{report.parent.parent / "data"}' and options.out == str(report.parent)
    assert dataclasses.asdict(config) == json.loads((report.parent / 'recipe.json').read_text())['detect']
    notes = re.findall('<li>(.*?)</li>', plain, flags=re.S)
    assert len(notes) == 51 and len(set(notes)) == 51 and notes[-1] == 'and 12 more, listed in metrics.json'
    assert 'b has the same content as a, a training file' in notes
    assert '<dt>lr</dt><dd>0.0005</dd>' in plain and '<dt>total time</dt><dd>2 minutes</dd>' in plain


def test_no_box_found_photographs_gone_and_many_classes(tmp_path):
    test = photographs(tmp_path / 'data', [(40, 30)] * 4, tuple(map(str, range(100))), lambda i: 5 * (i != 1))
    metrics = write(tmp_path / 'none', test, [NOTHING] * 4)
    page = (tmp_path / 'none' / 'report.html').read_text()
    assert metrics['map'] == 0 and 'a false box: 3 of 4.' in page and page.count('<img') == 4
    rows = re.findall(r'<tr><td>(\d+)</td><td class="number">(\d+)</td><td class="number">(.*?)</td>', page)
    assert len(rows) == 100 and [float(ap) for _, n, ap in rows if n != '0'] == sorted(
        float(ap) for _, n, ap in rows if n != '0')
    for path in test.paths:
        os.unlink(path)
    write(tmp_path / 'gone', test, guesses(test))
    page = (tmp_path / 'gone' / 'report.html').read_text()
    assert page.count('<img') == 2 and '<td class="path">' in page


def test_everything_is_shown_and_nothing_fetched(browser, report):  # noqa: F811
    heading = heading_of_whole_page(browser, report)
    metrics = json.loads((report.parent / 'metrics.json').read_text())
    assert heading == f"<i>set</i> $x$: mAP@0.5 {metrics['map_50']:.1f} % on 16 test photographs" == browser.title
    rows = browser.execute_script(
        'return [...document.querySelector("table").rows].map(r => [...r.cells].map(c => c.textContent))')
    assert rows[0] == ['class', 'objects', 'AP@0.5:0.95, %', 'AP@0.5, %', 'precision, %', 'recall, %']
    assert {row[0]: row[1:] for row in rows[1:]} == {name: [str(row['objects'])] + [
        f'{row[key]:.1f}' for key in ('map', 'map_50', 'precision', 'recall')]
        for name, row in metrics['per_class'].items()}
    assert [float(row[2]) for row in rows[1:]] == sorted(float(row[2]) for row in rows[1:])
