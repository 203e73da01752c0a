"""Download files from the Hugging Face Hub or from a pinned URL, and explain failures."""
from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, getproxies, urlopen

import torch

from .files import atomic_write, digest

__all__ = ['hub_fault', 'kept_at', 'snapshot', 'unpacked']

LIMIT = 200_000_000  # in bytes, for an archive and for the file in it; the largest pinned one has 147 million
_TIMEOUT = 30  # in seconds, without receiving a byte
_PROXY = 'correct $HTTPS_PROXY and $HTTP_PROXY, or unset them'


def snapshot(hub_id: str, files: tuple[str, ...], cache_dir: str | Path | None = None) -> Path:
    """Folder in the Hub client's cache that holds `files` of one commit.

    Cached files are used without a network request. Others are downloaded; an interrupted download is continued.

    Args:
        hub_id: `<account>/<name>`, or `<account>/<name>@<branch, tag or commit>`.
        files: Names of the files.
        cache_dir: Cache folder; None for the client's own ($HF_HUB_CACHE, $HF_HOME).

    Raises:
        RuntimeError: The files cannot be downloaded. The message says why, and what to do.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import LocalEntryNotFoundError
    repo_id, _, revision = hub_id.partition('@')
    for cached in (True, False):
        try:
            commit = revision or None
            for name in files:
                path = hf_hub_download(repo_id, name, revision=commit, cache_dir=cache_dir, local_files_only=cached)
                commit = Path(path).parent.name
            return Path(path).parent
        except LocalEntryNotFoundError as e:
            if not cached:
                raise RuntimeError(f'{hub_id} could not be downloaded from the Hub. {hub_fault(e, hub_id)}') from e
        except Exception as e:  # the errors of the client and of its HTTP libraries have no common base
            raise RuntimeError(f'{hub_id} could not be downloaded from the Hub. {hub_fault(e, hub_id)}') from e


def hub_fault(error: BaseException, hub_id: str, endpoint: str | None = None) -> str:
    """Describe an error of the Hub client in one sentence, and give advice in another.

    The classes change with the client's HTTP library (requests, httpx, httpx2), so an error is recognised by its HTTP
    status or, if the Hub has not answered, by the name of its class.

    Args:
        error: Error of the client.
        hub_id: Requested repository.
        endpoint: URL of the Hub; None for the client's own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import LocalEntryNotFoundError
    host, named_by = (endpoint, '--endpoint') if endpoint else (constants.ENDPOINT, '$HF_ENDPOINT')
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    wrappers = (LocalEntryNotFoundError, RuntimeError)  # raised around the actual cause
    first = next((e for e in chain if not isinstance(e, wrappers)), error)
    said = next((line.strip() for line in str(first).splitlines() if line.strip()), 'no reason given')
    names = ' '.join(type(e).__name__ for e in chain)
    response = next((e.response for e in chain if getattr(e, 'response', None) is not None), None)
    if response is not None:
        advice = _of_answer(response.status_code, response.headers, hub_id)
    elif constants.HF_HUB_OFFLINE:
        advice = 'HF_HUB_OFFLINE is set and the file is not in the cache: unset it to download'
    elif re.search('Consistency|Protocol|Incomplete|ReadError|ReadTimeout|ChunkedEncoding', f'{said} {names}'):
        advice = 'The transfer was interrupted: try again'
    elif 'FileMetadataError' in names:
        advice = f'The server at {host} is not a Hub: correct {named_by}'
    elif 'Validation' in names:
        advice = 'Repository names have the form <account>/<architecture>.<tag>'
    elif 'ProxyError' in names or getproxies().keys() & {'http', 'https', 'all'}:
        advice = f'Requests to {host} go through a proxy: {_PROXY}'
    else:
        advice = f'Check the network connection; the address of the Hub is {host} ({named_by})'
    return f'{type(first).__name__}: {said.rstrip(".")}. {advice}.'


def _of_answer(status: int, headers: dict[str, str], hub_id: str) -> str:
    """Advice about an error status from the Hub."""
    repo_id, _, revision = hub_id.partition('@')
    code = headers.get('X-Error-Code')
    if code == 'RevisionNotFound':
        return f'{repo_id} has no revision {revision or "main"}: use one that it lists, or none for the newest'
    if code == 'EntryNotFound':
        return f'{repo_id} does not have this file, so it is not a weights folder: correct the name'
    if status in (401, 403, 404):
        return (f'There is no repository {repo_id}, or you have no access to it: correct the name, or log in with a '
                f'token that has access (`hf auth login`, $HF_TOKEN)')
    if status == 407:
        return f'The proxy refuses access: {_PROXY}'
    if status == 429:
        limit, after = headers.get('RateLimit', ''), headers.get('Retry-After', '')
        said = re.search(r'\bt=(\d+)', limit) or re.fullmatch(r'(\d+)', after)
        wait = f'{said[1]} seconds' if said else 'a few minutes'
        return f'The Hub has received too many requests: wait {wait} and try again'
    if status >= 500:
        return 'The Hub has an internal error: try again later'
    return 'Read the message of the Hub, and correct the request'


def kept_at(url: str, cache_dir: str | Path | None = None) -> Path:
    """Path of the unpacked file from the archive at `url`, in torch hub's cache unless `cache_dir` is given."""
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / 'checkpoints'
    return folder / url.rpartition('/')[2].removesuffix('.zip')


def unpacked(url: str, sha1: str, cache_dir: str | Path | None = None) -> Path:
    """Single file from the zip archive at a pinned URL, downloaded once and named like the archive without `.zip`.

    An interrupted download leaves nothing behind and starts again.

    Args:
        url: URL of the archive.
        sha1: Expected sha1 of the file.
        cache_dir: Cache folder; None for torch hub's own ($TORCH_HOME).

    Raises:
        RuntimeError: The archive cannot be downloaded, is too large or does not hold exactly this file, or the file
            has another sha1. The message says which, and what to do.
    """
    file = kept_at(url, cache_dir)
    if file.is_file():
        if (found := digest(file, 'sha1')) != sha1:
            raise RuntimeError(f'{file} is damaged or is another file: sha1 {found}, but wrn_timm/published.json names '
                               f'{sha1}. Delete it and load again to download it.')
        return file

    def fetch(part: Path) -> None:
        with tempfile.TemporaryFile(dir=file.parent) as archive:
            for block in _received(url):
                archive.write(block)
            _unpack(archive, part, url)
        if (found := digest(part, 'sha1')) != sha1:
            raise RuntimeError(f'{url} is refused: the file in it has sha1 {found}, but wrn_timm/published.json names '
                               f'{sha1}.')

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, fetch)
    except OSError as e:
        raise RuntimeError(f'{file} cannot be written ({e}). Free some space, or choose another folder with '
                           f'$TORCH_HOME or cache_dir=.') from e
    return file


def _received(url: str) -> Iterator[bytes]:
    """Download a URL in blocks, with a progress bar."""
    from huggingface_hub.utils import tqdm  # obeys $HF_HUB_DISABLE_PROGRESS_BARS
    try:
        with urlopen(Request(url, headers={'User-Agent': 'wrn_timm'}), timeout=_TIMEOUT) as answer:
            size, done = int(answer.headers.get('Content-Length', 0)), 0
            with tqdm(total=size or None, desc=url.rpartition('/')[2], unit='B', unit_scale=True) as bar:
                while max(size, done) <= LIMIT and (block := answer.read(1 << 16)):
                    yield block
                    done += len(block)
                    bar.update(len(block))
            if max(size, done) > LIMIT:
                raise RuntimeError(
                    f'{url} is refused: it has at least {max(size, done):,} bytes; the limit is {LIMIT:,}.')
            if done < size:
                raise ConnectionError(f'{done:,} of {size:,} bytes were received')
    except (OSError, HTTPException) as e:
        if isinstance(e, HTTPError):
            e.close()  # it keeps the connection open
        raise RuntimeError(f'{url} could not be downloaded. {_url_fault(e)}') from e


def _unpack(archive: BinaryIO, to: Path, url: str) -> None:
    """Extract the file from the archive of `url`, which may hold no other."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members, name = opened.infolist(), kept_at(url).name
            if [m.filename for m in members] != [name]:
                names = ', '.join(repr(m.filename) for m in members[:3])
                raise RuntimeError(f'{url} is refused: it holds {len(members)} files ({names}) instead of {name} only.')
            if members[0].file_size > LIMIT:
                raise RuntimeError(f'{url} is refused: the file in it has {members[0].file_size:,} bytes; the limit is '
                                   f'{LIMIT:,}.')
            with opened.open(name) as source, open(to, 'wb') as out:
                shutil.copyfileobj(source, out, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as e:
        raise RuntimeError(f'{url} is refused: it is not a valid zip archive ({e}).') from e


def _url_fault(error: BaseException) -> str:
    """Say why a download failed in one sentence, and give advice in another."""
    if isinstance(error, HTTPError):
        said = f'The server answered {error.code} {error.reason}'
        if error.code in (404, 410):
            advice = 'The publisher has moved or removed it: see whether a newer wrn_timm has another address'
        elif error.code == 407:
            advice = f'The proxy refuses access: {_PROXY}'
        else:
            advice = 'Try again later'
    else:
        said = f'{type(error).__name__}: {error}'
        if not isinstance(error, URLError):
            advice = 'The transfer was interrupted: try again'
        elif getproxies().keys() & {'http', 'https', 'all'}:
            advice = f'Requests go through a proxy: {_PROXY}'
        else:
            advice = 'Check the network connection'
    return f'{said}. {advice}.'
