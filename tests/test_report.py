"""The report of a fine-tuning run as a reader sees it: in a real browser, on a telephone and on a desk."""
import html
import json
import re
import shutil
import time

import pytest
import torch
from conftest import SAMPLE
from matplotlib.figure import Figure

from wrn_timm.cli import finetune as finetune_script
from wrn_timm.train.curves import plot_history
from wrn_timm.train.measure import Predictions
from wrn_timm.train.report import draw_confusion

WIDTHS = 400, 1280
# loads nothing of its own, so that all it asks for is the page's
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-sync',
         '--disable-background-networking', '--disable-component-update', '--disable-dev-shm-usage')


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    webdriver = pytest.importorskip('selenium.webdriver')
    chromium = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    driver = shutil.which('chromedriver')
    if not (chromium and driver):
        pytest.skip('no chromium and chromedriver on this machine')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f'--user-data-dir={tmp_path_factory.mktemp("profile")}'):
        options.add_argument(flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield opened
    opened.quit()


@pytest.fixture(scope='module')
def report(tmp_path_factory, weights):
    """Of a run with names that want escaping and breaking, an unreadable file and wrong answers."""
    root = tmp_path_factory.mktemp('report')
    for name, source in (('ketch', 'ketch'), ('<b>pizza</b> & "co"', 'pizza'), (f'鳥 {"long" * 30}', 'butterfly')):
        shutil.copytree(SAMPLE / source, root / 'data' / name)
    (root / 'data' / 'ketch' / f'{"no-image" * 20}.jpg').write_text('')
    assert finetune_script.main([
        '--data', str(root / 'data'), '--model', weights, '--out', str(root / 'run'), '--device', 'cpu', '--epochs',
        '1', '--input-size', '32', '--lr', '1e-6', '--messages', 'quiet']) == 0
    return root / 'run' / 'report.html'


@pytest.fixture
def figures(monkeypatch):
    """What is drawn, in place of its picture."""
    drawn = []

    def keep(figure, path, **kwargs):
        path.touch()
        figure.canvas.draw()
        drawn.append(figure)
    monkeypatch.setattr(Figure, 'savefig', keep)
    return drawn


@pytest.mark.parametrize('losses', [(2.0, 0.4, 0.0003), (0.34, 0.33, 0.335), (0.1, 0.0, 0.0), (1.5, 1.5, 1.5)])
def test_axes_have_plain_numbers_and_no_legend_lies_on_a_curve(figures, tmp_path, losses):
    plot_history([{'epoch': i, 'lr': 10. ** -i, 'train_loss': loss, 'holdout_loss': loss + 0.1, 'holdout_accuracy': 90.}
                  for i, loss in enumerate(losses, 1)], tmp_path / 'curves.png')
    for axes in figures[0].axes:
        low, high = sorted(axes.get_ylim())
        shown = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
        assert len(shown) >= 2 and all(re.fullmatch(r'[-−]?\d+(\.\d+)?', text) for text in shown), shown
        if legend := axes.get_legend():
            assert not legend.get_window_extent().overlaps(axes.get_window_extent())
            assert figures[0].bbox.containsx(legend.get_window_extent().x0)
    labelled = [text.get_text() for axes in figures[0].axes if axes.get_legend() for text in axes.get_legend().texts]
    assert labelled == ['train loss', 'holdout loss', 'holdout accuracy']


def test_penalties_are_drawn_as_such(figures, tmp_path):
    plot_history([{'epoch': i, 'penalty': 10. ** -i, 'train_loss': 1.} for i in range(1, 7)],
                 tmp_path / 'curves.png')
    loss, penalty = figures[0].axes
    assert loss.get_xlabel() == 'penalties tried'
    assert '0.0001' in [text.get_text() for text in penalty.get_yticklabels()]


@pytest.mark.parametrize('n', [3, 40, 41])
def test_the_confusion_matrix_has_counts(figures, tmp_path, n):
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    answers = torch.tensor([0, 0, 0, 2, 1, 2, 1])
    result = Predictions(torch.eye(n)[answers], labels, torch.arange(7), [])
    draw_confusion(result, tuple(map(str, range(n))), tmp_path / 'confusion.png')
    found = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in figures[0].axes[0].texts}
    expected = {(0, 0): '3', (0, 2): '1', (1, 1): '1', (2, 2): '1', (2, 1): '1'}
    assert found == (expected if n <= 40 else {})


def test_the_report_names_val_the_command_the_date_and_whole_paths(weights, tmp_path, monkeypatch, capsys):
    for part in ('train', 'valid'):
        for name in ('ketch', 'pizza'):
            (tmp_path / 'my data' / part / name).mkdir(parents=True)
            for file in sorted((SAMPLE / name).iterdir())[:: 1 if part == 'train' else -1][:6]:
                shutil.copy(file, tmp_path / 'my data' / part / name)
    monkeypatch.chdir(tmp_path)
    assert finetune_script.main(['--data', 'my data', '--model', weights, '--out', 'run', '--device', 'cpu', '--epochs',
                                 '1', '--batch-size', '4', '--lr', '1e-6']) == 0
    assert '12 photographs of valid/' in capsys.readouterr().out
    page = html.unescape((tmp_path / 'run' / 'report.html').read_text())
    metrics = json.loads((tmp_path / 'run' / 'metrics.json').read_text())
    assert f"<h1>my data: accuracy {metrics['top1']:.1f} % on 12 files of valid/</h1>" in page
    assert 'test files' not in page
    assert 'valid/, used as the test part: 12 files' in page
    assert f"--batch-size 4 --lr 1e-06 --data '{tmp_path / 'my data'}' --out {tmp_path / 'run'}</pre>" in page
    assert re.search(rf"<dt>date</dt><dd>{time.strftime('%Y-%m-')}\d\d \d\d:\d\d</dd>", page)
    assert '<dt>lr</dt><dd>1e-06</dd>' in page and '<dt>weight_decay</dt><dd>0.0005</dd>' in page
    assert re.search(r'<dt>total time</dt><dd>\d+ seconds?</dd>', page)
    assert metrics['top1'] == 100 or f'<td class="path">{tmp_path / "my data" / "valid"}/' in page
    card = (tmp_path / 'run' / 'best' / 'README.md').read_text()
    assert '12 images of my data (valid/)' in card and str(tmp_path) not in card


def open_page(browser, report, width=1280, dark=False):
    """Show the report, and return what the browser asked for and complained of."""
    browser.get('about:blank')
    browser.get_log('browser'), browser.get_log('performance')
    scheme = {'name': 'prefers-color-scheme', 'value': 'dark' if dark else 'light'}
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [scheme]})
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {
        'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False})
    browser.get(report.as_uri())
    events = [json.loads(entry['message'])['message'] for entry in browser.get_log('performance')]
    asked = [e['params']['request']['url'] for e in events if e['method'] == 'Network.requestWillBeSent']
    return asked, browser.get_log('browser')


def heading_of_whole_page(browser, report):
    """The heading, once all four pictures are seen to be there, and nothing is fetched from elsewhere."""
    asked, complaints = open_page(browser, report)
    assert report.as_uri() in asked and not complaints
    assert not [url for url in asked if url != report.as_uri() and not url.startswith('data:')]
    images = browser.execute_script(
        'return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])')
    assert len(images) == 4 and all(done and min(size) > 100 for done, *size in images)
    return browser.execute_script('return document.querySelector("h1").innerText')


def test_everything_is_shown_and_nothing_fetched(browser, report):
    heading = heading_of_whole_page(browser, report)
    metrics = json.loads((report.parent / 'metrics.json').read_text())
    assert heading == f"data: accuracy {metrics['top1']:.1f} % on {metrics['images']} test files" == browser.title
    rows = browser.execute_script(
        'return [...document.querySelectorAll("table")].at(-1).innerText.split("\\n").map(line => line.split("\\t"))')
    assert rows[0] == ['class', 'recall, %', 'precision, %', 'files']
    assert {row[0]: row[1] for row in rows[1:]} == {c: f'{v:.1f}' for c, v in metrics['per_class'].items()}
    assert not browser.execute_script('return document.querySelector("b")')  # a class name is no mark-up


@pytest.mark.parametrize('dark', [False, True])
@pytest.mark.parametrize('width', WIDTHS)
def test_it_fits_the_screen_and_can_be_read(browser, report, width, dark):
    open_page(browser, report, width, dark)
    seen, over, outside, letters, shown = browser.execute_script('''
        const scrolls = e => e && (getComputedStyle(e).overflowX === 'auto' || scrolls(e.parentElement));
        const all = [...document.body.querySelectorAll('*')];
        return [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth,
                all.filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e)).map(e => e.outerHTML),
                Math.min(...all.filter(e => e.innerText).map(e => parseFloat(getComputedStyle(e).fontSize))),
                [...document.images].map(i => [i.clientWidth, i.naturalWidth])]''')
    assert seen == width and not over and not outside and letters >= 12
    # a picture is scrolled before it is drawn too small for its own text
    assert all(drawn >= min(natural, 640) for drawn, natural in shown)
    ink, paper = browser.execute_script('''
        const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        return ['CanvasText', 'Canvas'].map(name => {
            const probe = document.createElement('p');
            probe.style.color = name;
            document.body.append(probe);
            c.fillStyle = getComputedStyle(probe).color;
            probe.remove();
            c.fillRect(0, 0, 1, 1);
            return [...c.getImageData(0, 0, 1, 1).data].slice(0, 3)})''')
    assert (sum(paper) < sum(ink)) == dark and abs(sum(paper) - sum(ink)) > 3 * 150
