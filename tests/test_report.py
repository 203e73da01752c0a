"""The report of a fine-tuning run as a reader sees it: in a real browser, on a telephone and on a desk."""
import json
import shutil

import finetune as finetune_script
import pytest
from conftest import SAMPLE

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


def test_everything_is_shown_and_nothing_fetched(browser, report):
    asked, complaints = open_page(browser, report)
    assert report.as_uri() in asked and not complaints
    assert not [url for url in asked if url != report.as_uri() and not url.startswith('data:')]
    images = browser.execute_script(
        'return [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight])')
    assert len(images) == 4 and all(done and min(size) > 100 for done, *size in images)
    metrics = json.loads((report.parent / 'metrics.json').read_text())
    heading = browser.execute_script('return document.querySelector("h1").innerText')
    assert heading == f"data: {metrics['top1']:.1f} % of {metrics['images']} test files" == browser.title
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
