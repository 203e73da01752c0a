"""A weights folder out of a repository of the Hugging Face Hub, and what to say when it cannot be had."""
from __future__ import annotations

import re
from pathlib import Path
from urllib.request import getproxies

__all__ = ['hub_fault', 'snapshot']

_PROXY = 'correct $HTTPS_PROXY and $HTTP_PROXY, or unset them'


def snapshot(hub_id: str, files: tuple[str, ...], cache_dir: str | Path | None = None) -> Path:
    """The folder of the Hub client's cache that holds `files` of one commit.

    What is in the cache is taken without a call to the network; what is not is downloaded, and a download that was cut
    off goes on.

    Args:
        hub_id: `<account>/<name>`, or `<account>/<name>@<branch, tag or commit>`.
        files: Names of files.
        cache_dir: None for the client's own ($HF_HUB_CACHE, $HF_HOME).

    Raises:
        RuntimeError: The files cannot be had; says why, and what to do.
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
                raise RuntimeError(f'the Hub could not give {hub_id}. {hub_fault(e, hub_id)}') from e
        except Exception as e:  # the client's errors have no base of their own, nor have those of its HTTP libraries
            raise RuntimeError(f'the Hub could not give {hub_id}. {hub_fault(e, hub_id)}') from e


def hub_fault(error: BaseException, hub_id: str, endpoint: str | None = None) -> str:
    """A fault of the Hub's client in a sentence, and what to do about it in another.

    The classes change with the client's HTTP library (requests, httpx, httpx2), so a fault is known by its HTTP status
    or, where the Hub has not answered, by the name of its class.

    Args:
        error: The fault.
        hub_id: The repository that was asked for.
        endpoint: URL of the Hub that was asked; None for the client's own.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import LocalEntryNotFoundError
    host, named_by = (endpoint, '--endpoint') if endpoint else (constants.ENDPOINT, '$HF_ENDPOINT')
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    wrappers = (LocalEntryNotFoundError, RuntimeError)  # that the client puts around what went wrong
    first = next((e for e in chain if not isinstance(e, wrappers)), error)
    said = next((line.strip() for line in str(first).splitlines() if line.strip()), 'no reason given')
    names = ' '.join(type(e).__name__ for e in chain)
    response = next((e.response for e in chain if getattr(e, 'response', None) is not None), None)
    if response is not None:
        advice = _of_answer(response.status_code, response.headers, hub_id)
    elif constants.HF_HUB_OFFLINE:
        advice = 'HF_HUB_OFFLINE is set and the file is not in the cache: unset it to download'
    elif re.search('Consistency|Protocol|Incomplete|ReadError|ReadTimeout|ChunkedEncoding', f'{said} {names}'):
        advice = 'The transfer was cut off: run it again'
    elif 'FileMetadataError' in names:
        advice = f'What answers at {host} is no Hub: correct {named_by}'
    elif 'Validation' in names:
        advice = 'A repository is named <account>/<architecture>.<tag>'
    elif 'ProxyError' in names or getproxies().keys() & {'http', 'https', 'all'}:
        advice = f'The way to {host} is by a proxy: {_PROXY}'
    else:
        advice = f'Connect to the network; the Hub is looked for at {host} ({named_by})'
    return f'{type(first).__name__}: {said.rstrip(".")}. {advice}.'


def _of_answer(status: int, headers: dict[str, str], hub_id: str) -> str:
    """What to do about an answer of the Hub that is none of success."""
    repo_id, _, revision = hub_id.partition('@')
    code = headers.get('X-Error-Code')
    if code == 'RevisionNotFound':
        return f'{repo_id} has no revision {revision or "main"}: take one that it lists, or none for the newest'
    if code == 'EntryNotFound':
        return f'{repo_id} holds no such file, so it is no weights folder: correct the name'
    if status in (401, 403, 404):
        return (f'There is no repository {repo_id}, or it is not open to you: correct the name, or log in with a token '
                f'that has the right to it (`hf auth login`, $HF_TOKEN)')
    if status == 407:
        return f'The proxy does not let you through: {_PROXY}'
    if status == 429:
        limit, after = headers.get('RateLimit', ''), headers.get('Retry-After', '')
        said = re.search(r'\bt=(\d+)', limit) or re.fullmatch(r'(\d+)', after)
        wait = f'{said[1]} seconds' if said else 'some minutes'
        return f'The Hub asks for fewer requests: wait {wait} and run it again'
    if status >= 500:
        return 'The Hub has a fault of its own: run it again later'
    return 'Read what the Hub says, and correct the request'
