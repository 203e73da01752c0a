"""Names of any bytes: shown without harm, and given back as they were."""
import csv
import io
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, SAMPLE

from wrn_timm.cli import predict as predict_script
from wrn_timm.cli.common import pass_any_name
from wrn_timm.names import as_cell, from_cell, printable

linux = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='where names are bytes')


def test_what_a_terminal_obeys_is_escaped():
    assert printable('\x1b[2Ja\rb\nc\x9b\u202e\udce9') == r'\x1b[2Ja\rb\nc\x9b\u202e\udce9'
    assert printable('two\n\tlines\x1b', lines=True) == 'two\n\tlines\\x1b'
    for name in ("l'été 鳥", 'a\\x1b', 'می\u200cشود', '👩\u200d🚀'):
        assert printable(name) == name
    assert printable(FileNotFoundError(2, 'no', 'a\x1b')) == r"[Errno 2] no: 'a\x1b'"


@pytest.mark.parametrize('name', [
    '=cmd|x', '+x', '-x', '@x', '\tx', '\rx', "'=x", "''=x", '-1', '+1.5', "'-1", 'x', '', "'", "l'été", '1=2'])
def test_cells_go_there_and_back(name):
    cell = as_cell(name)
    assert from_cell(cell) == name
    assert (cell != name) == (name.lstrip("'")[:1] in tuple('=+-@\t\r') and name.strip("'") not in ('', '-1', '+1.5'))
    assert not cell.startswith(('=', '@', '\t', '\r')) and (cell in ('-1', '+1.5') or not cell.startswith(('-', '+')))


@pytest.fixture
def odd(tmp_path):
    """Photographs with names of ill will, and of bytes that are not UTF-8."""
    names = [b'\xe9.jpg', b'\x1b[2J.jpg', b'=cmd.jpg', b'l\xc3\xa9.jpg']
    for name in names:
        shutil.copy(SAMPLE / 'pizza' / 'image_0020.jpg', os.path.join(os.fsencode(tmp_path), name))
    (tmp_path / 'none.png').write_text('no')
    return tmp_path, sorted([*names, b'none.png'])


def test_output_to_a_file_of_a_narrow_encoding_takes_any_name(monkeypatch):
    """As on Windows, where it is cp1252."""
    written = io.BytesIO()
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(written, encoding='cp1252'))
    pass_any_name()
    print('鳥.jpg', end='', flush=True)
    assert written.getvalue().decode() == '鳥.jpg'


@linux
def test_predict_prints_names_without_harm_and_tables_with_every_byte(odd, capfdbinary, monkeypatch):
    folder, names = odd
    monkeypatch.chdir(folder)
    assert predict_script.main(['--device', 'cpu', '.']) == 1
    out, err = capfdbinary.readouterr()
    assert b'\x1b' not in out + err and b'./\\udce9.jpg\n' in out and b'1 file could not be read' in err
    listed = b''.join(name + b'\n' for name in names)
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(listed), encoding='utf-8'))
    assert predict_script.main(['--device', 'cpu', '--csv', '-']) == 1
    text = capfdbinary.readouterr().out.decode(errors='surrogateescape')
    rows = list(csv.DictReader(text.splitlines()))
    assert [os.fsencode(from_cell(row['image'])) for row in rows] == names
    assert "\n'=cmd.jpg," in text and '\n=cmd' not in text
    assert [row['image'] for row in rows if row['error']] == ['none.png']


def test_whoever_reads_the_predictions_may_stop(tmp_path):
    """As `head` does: the exit status of other programs, and not a word."""
    for i in range(300):
        (tmp_path / f'{"x" * 200}{i}.jpg').write_text('no')
    command = [sys.executable, str(ROOT / 'scripts' / 'predict.py'), '--model', 'wrn16_1.cifar10', '--device', 'cpu',
               str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b'' and process.wait() == 141
    process.stderr.close()
