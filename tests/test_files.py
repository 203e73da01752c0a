"""Files that are whole or not there: what is on the disk when, what a full disk says, and who may write."""
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
from conftest import ROOT, SAMPLE, files_of_at_most
from processes import Command

from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import train as train_script
from wrn_timm.files import FolderLock, atomic_folder, atomic_write
from wrn_timm.train.run import RunDir
from wrn_timm.weights import export_weights

posix = pytest.mark.skipif(os.name == 'nt', reason='folders cannot be synced there, nor files locked in this way')


@pytest.fixture
def done(monkeypatch):
    """What is synced and renamed, in its order, by name."""
    seen, fsync, replace = [], os.fsync, os.replace

    def name(file):
        status = os.fstat(file)
        return next(n for n in names() if os.path.exists(n) and os.path.samestat(os.stat(n), status))

    def names():
        return [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')
                if os.path.islink(f'/proc/self/fd/{n}')]

    monkeypatch.setattr(os, 'fsync', lambda file: (seen.append(('sync', Path(name(file)).name)), fsync(file)))
    monkeypatch.setattr(
        os, 'replace', lambda a, b: (seen.append(('rename', Path(a).name, Path(b).name)), replace(a, b)))
    return seen


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='finds the names of open files as Linux has them')
def test_contents_are_on_the_disk_before_their_name_and_both_at_the_end(done, tmp_path):
    atomic_write(tmp_path / 'a.txt', 'a')
    part = f'.a.txt.part{os.getpid()}.txt'
    assert done == [('sync', part), ('rename', part, 'a.txt'), ('sync', tmp_path.name)]
    done.clear()

    def fill(new):
        (new / 'deep').mkdir()
        (new / 'deep' / 'b').write_text('b')

    for _ in range(2):
        atomic_folder(tmp_path / 'new' / 'folder', fill)
    first, rename, second = done[:5], ('rename', '.folder.part', 'folder'), done[7:]
    assert first[:2] == [('sync', tmp_path.name), ('sync', 'deep')] and first[2:] == [
        ('sync', 'b'), ('sync', '.folder.part'), rename]
    assert done[5:7] == [('sync', 'new'), ('sync', 'deep')]
    assert second == [('sync', 'b'), ('sync', '.folder.part'), ('rename', 'folder', '.folder.old'), rename,
                      ('sync', 'new')]
    assert [p.name for p in (tmp_path / 'new').iterdir()] == ['folder']
    assert (tmp_path / 'new' / 'folder' / 'deep' / 'b').read_text() == 'b'


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='finds the names of open files as Linux has them')
def test_checkpoints_records_and_weights_are_synced(done, tmp_path):
    run = RunDir(tmp_path / 'runs' / 'run', {'seed': 0})
    run.save({'epoch': 1, 'step': 0, 'history': []}, [{'epoch': 1, 'holdout_accuracy': 1.}], draw=False)
    export_weights(timm.create_model('wrn16_1'), run.path / 'weights', {'tag': 'x'})
    synced, renamed = ({row[-1] for row in done if row[0] == kind} for kind in ('sync', 'rename'))
    assert {'runs', 'run', 'checkpoints', 'model.safetensors', 'config.json'} <= synced
    assert renamed == {'recipe.json', 'history.csv', 'epoch-0001-step-000000.pt', 'best.pt', 'weights'}
    for row in done:
        assert row[0] == 'sync' or ('sync', row[1]) in done[:done.index(row)]


def test_what_fails_leaves_what_was_there(tmp_path):
    def fail(path):
        (path / 'half' if path.is_dir() else path).write_text('half')
        raise OSError(28, 'No space left on device')

    atomic_write(tmp_path / 'file', 'whole')
    atomic_folder(tmp_path / 'folder', lambda new: (new / 'x').write_text('whole'))
    for write, name in ((atomic_write, 'file'), (atomic_folder, 'folder')):
        with pytest.raises(OSError, match=rf'{name} cannot be written \(\[Errno 28\] No space .* MB are free there'):
            write(tmp_path / name, fail)
    assert sorted(p.name for p in tmp_path.rglob('*')) == ['file', 'folder', 'x']
    assert (tmp_path / 'file').read_text() == (tmp_path / 'folder' / 'x').read_text() == 'whole'


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, monkeypatch):
    replace = os.replace

    def refuse(a, b):
        if Path(a).name == '.folder.part':
            raise PermissionError(13, 'in use')
        replace(a, b)

    atomic_folder(tmp_path / 'folder', lambda new: (new / 'x').write_text('old'))
    monkeypatch.setattr(os, 'replace', refuse)
    with pytest.raises(OSError, match='folder cannot be written'):
        atomic_folder(tmp_path / 'folder', lambda new: (new / 'x').write_text('new'))
    assert [p.name for p in tmp_path.iterdir()] == ['folder'] and (tmp_path / 'folder' / 'x').read_text() == 'old'


@pytest.mark.parametrize('name', [245 * 'x' + '.jpg', 80 * '鳥' + '.png'])
def test_names_may_be_as_long_as_the_disk_allows(tmp_path, name):
    atomic_write(tmp_path / name, 'x')
    assert [p.name for p in tmp_path.iterdir()] == [name]


@posix
def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / 'disk' / 'folder').mkdir(parents=True)
    (tmp_path / 'link').symlink_to(tmp_path / 'disk' / 'folder')
    for text in ('first', 'second'):
        atomic_folder(tmp_path / 'link', lambda new, text=text: (new / 'x').write_text(text))
        assert (tmp_path / 'disk' / 'folder' / 'x').read_text() == text
    assert (tmp_path / 'link').is_symlink() and sorted(p.name for p in tmp_path.rglob('*')) == [
        'disk', 'folder', 'link', 'x']


HOLDER = '''
import os, sys, time
from pathlib import Path
from wrn_timm.cli import finetune as finetune_script
from wrn_timm.cli import train as train_script
from wrn_timm.files import FolderLock
lock = FolderLock(Path(sys.argv[1]))
if os.fork():
    print('held', flush=True)
time.sleep(60)
'''


@posix
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_a_folder_is_one_processs_and_free_as_soon_as_that_is_killed(tmp_path):
    """Workers that it has forked, and that outlive it for a while, do not keep it."""
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, 'PYTHONPATH': str(ROOT)}, start_new_session=True)
    try:
        assert holder.stdout.readline() == 'held\n'
        with pytest.raises(BlockingIOError, match=rf'another run \(process {holder.pid}\) is writing to .*choose'):
            FolderLock(tmp_path)
        holder.kill()
        holder.wait()
        FolderLock(tmp_path)
        assert (tmp_path / '.lock').read_text() == str(os.getpid())
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def _held(path, answers):
    try:
        FolderLock(Path(path))
        answers.put('free')
    except BlockingIOError:
        answers.put('held')


@posix
@pytest.mark.filterwarnings('ignore:.*fork:DeprecationWarning')
def test_a_folder_is_free_when_its_run_is_forgotten(tmp_path):
    server = multiprocessing.get_context('fork')
    answers = server.Queue()
    run = RunDir(tmp_path / 'run', {'seed': 0})
    for expected in ('held', 'free'):
        process = server.Process(target=_held, args=(str(run.path if run else tmp_path / 'run'), answers))
        process.start()
        assert answers.get(timeout=60) == expected
        process.join()
        run = None
    answers.close()


@posix
def test_a_second_run_on_one_folder_is_refused(tmp_path, capsys):
    options = ['--recipe', 'smoke', '--device', 'cpu', '--epochs', '999', '--checkpoint-every', '0', '--out',
               str(tmp_path / 'run')]
    first = Command('train', *options, errors=tmp_path / 'errors')
    try:
        while first.has_not_ended() and not list(tmp_path.glob('run/checkpoints/epoch-*.pt')):
            time.sleep(0.02)
        assert train_script.main([*options, '--resume']) == 1
    finally:
        first.process.kill()
        first.end()
    error = capsys.readouterr().err
    assert 'Traceback' not in error
    assert f'error: another run (process {first.process.pid}) is writing to {tmp_path / "run"}' in error


@posix
def test_a_disk_that_is_full_when_the_weights_are_exported(weights, tmp_path, capsys):
    """Files may not grow over 300 kB: the records of the fit do not, the network's 700 kB do."""
    for name in ('ketch', 'pizza'):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for path in sorted((SAMPLE / name).iterdir())[:6]:
            shutil.copy(path, tmp_path / 'data' / name)
    with files_of_at_most(300_000):
        assert finetune_script.main([
            '--model', weights, '--out', str(tmp_path / 'run'), '--device', 'cpu', '--input-size', '32', '--epochs',
            '1', '--train', 'head', '--messages', 'quiet', '--data', str(tmp_path / 'data')]) == 1
    error = capsys.readouterr().err
    assert 'Traceback' not in error and f'error: {tmp_path / "run" / "last"} cannot be written (' in error
    assert not list((tmp_path / 'run').glob('.last.part'))
    assert (tmp_path / 'run' / 'history.csv').is_file()
