"""Publishing: a weights folder becomes a repository of the Hugging Face Hub, checked before and after."""
from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from .card import GOLDEN_FILE, GOLDEN_TOLERANCE, TRANSFER_FILE, check_golden
from .download import hub_fault
from .weights import WEIGHTS_FILE, verify, version_tag

__all__ = ['check_folder', 'preview', 'publish']

FILES = (
    WEIGHTS_FILE, 'config.json', 'README.md', 'metrics.json', 'recipe.json', 'history.csv', 'curves.png', GOLDEN_FILE)
OPTIONAL_FILES = (TRANSFER_FILE,)
SIZE_LIMIT = 5_000_000  # bytes of any file but the weights


def _file_faults(folder: Path) -> Iterator[str]:
    """What is there that should not be, and the other way round."""
    for path in sorted(folder.iterdir()):
        if path.name not in FILES + OPTIONAL_FILES:
            yield f'{path.name} is no part of a weights folder: move it away'
        elif path.is_symlink() or not path.is_file():
            yield f'{path.name} is a link or a folder: put the file itself there'
        elif path.name != WEIGHTS_FILE and path.stat().st_size > SIZE_LIMIT:
            yield f'{path.name} has {path.stat().st_size:,} bytes; the limit is {SIZE_LIMIT:,}'
    for name in FILES:
        if not (folder / name).exists():
            yield f'{name} is missing: wrn-timm train or finetune writes it, and wrn-timm validate --write'


def _content_faults(folder: Path) -> Iterator[str]:
    """What the files say that is not so."""
    try:
        verify(folder)
        config, metrics, run = (
            json.loads((folder / f'{n}.json').read_text(encoding='utf-8')) for n in ('config', 'metrics', 'recipe'))
        if 'sha256' not in config:
            yield f'config.json names no sha256 of {WEIGHTS_FILE}'
        for key, value in (run.get('recipe') or run.get('finetune') or {}).items():
            if isinstance(value, str) and re.search(r'[/\\]', value) and not value.startswith('hf-hub:'):
                yield f'recipe.json names a path of this machine, {key} {value}: put the name of what is there'
        if not (run.get('recipe') or run.get('finetune')):
            yield 'recipe.json says nothing of a training run: converted weights of others are not published'
        difference = check_golden(folder)
        if not difference <= GOLDEN_TOLERANCE:
            yield f'the logits differ by {difference:.2g} from {GOLDEN_FILE}; the limit is {GOLDEN_TOLERANCE:g}'
        yield from _card_faults((folder / 'README.md').read_text(encoding='utf-8'), config['pretrained_cfg'], metrics)
    except Exception as e:  # a damaged archive, JSON, YAML or weights file raises what it likes
        yield f'{type(e).__name__}: {e}'


def _card_faults(text: str, cfg: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    data = ModelCard(text).data
    code = re.search(r'^```python\n(.*)', text, flags=re.M)
    complete = {
        'library_name: timm': data.library_name == 'timm',
        'the tag wrn_timm': 'wrn_timm' in (data.tags or ()),
        f"the licence {cfg.get('license')}": data.license == cfg.get('license') or not cfg.get('license'),
        f"the accuracy {metrics['top1']} in its model-index": any(
            result.metric_value == metrics['top1'] for result in data.eval_results or ()),
        '`import wrn_timm` as the first line of code': code is not None and code[1] == 'import wrn_timm',
        **{part: part in text for part in (
            '## Accuracy', '## Training', '## Limits', '## Citation', '![curves](curves.png)', 'Preprocessing')},
    }
    if not (data.license or cfg.get('license')):
        yield 'README.md names no licence: write yours after "license:" in its first lines'
    for part, there in complete.items():
        if not there:
            yield f'README.md lacks {part}: wrn-timm validate --write writes it again'


def check_folder(folder: str | Path) -> str:
    """The name, `<arch>.<tag>`, of a weights folder that is fit to be published.

    It is fit if it holds the files of a weights folder and no others, the weights have the sha256 that `config.json`
    names and give the golden logits, the card is complete and agrees with the metrics, and a licence is named.

    Raises:
        FileNotFoundError: There is no folder.
        ValueError: It is not fit; every fault is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'no weights folder at {folder}')
    faults = list(_file_faults(folder)) or list(_content_faults(folder))
    if faults:
        raise ValueError('\n  '.join([f'{folder} is not fit to be published:', *faults]))
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"


def _repository(folder: str | Path, namespace: str) -> tuple[str, dict[str, bytes]]:
    """Name and files of a folder's repository. The card there loads the model from there, whatever the account."""
    repo_id = f'{namespace}/{check_folder(folder)}'
    validate_repo_id(repo_id)
    files = {name: path.read_bytes() for name in FILES + OPTIONAL_FILES if (path := Path(folder) / name).is_file()}
    usage = f'create_model("hf-hub:{repo_id}"'.encode()
    return repo_id, {**files, 'README.md': re.sub(rb'create_model\("[^"]*"', usage, files['README.md'], count=1)}


def preview(folder: str | Path, namespace: str) -> str:
    """What `publish` would upload: each file with its size, and the card. Asks nothing of the network."""
    repo_id, files = _repository(folder, namespace)
    sizes = [f'{len(data):>12,}  {name}' for name, data in files.items()]
    return '\n'.join([repo_id, *sizes, '', files['README.md'].decode()])


def publish(folder: str | Path, namespace: str, private: bool = False, endpoint: str | None = None) -> str:
    """Publish a weights folder as the repository `<namespace>/<arch>.<tag>` of the Hub, and read it back.

    What is there already is not uploaded again, so a run that was cut off is repeated. Files of others in the
    repository stay. The commit is tagged by the sha256 of the weights (`version_tag`); a tag is never moved, so it
    stays with the first commit that has these weights.

    Args:
        folder: Weights folder.
        namespace: User or organisation.
        private: Make the repository private.
        endpoint: URL of the Hub; None for $HF_ENDPOINT or the Hub itself.

    Returns:
        The commit's URL.

    Raises:
        FileNotFoundError, ValueError: The folder is not fit (`check_folder`), or has no name that the Hub allows.
        RuntimeError: The Hub refused or could not be reached, or gave back other bytes; says what to do.
    """
    repo_id, files = _repository(folder, namespace)
    api = HfApi(endpoint=endpoint, library_name='wrn_timm')
    tag = version_tag(hashlib.sha256(files[WEIGHTS_FILE]).hexdigest())
    with _explained(repo_id, endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        public = not api.repo_info(repo_id).private
    if private and public:
        raise ValueError(f'{repo_id} is there already and is public: make it private on the Hub, or publish in public')
    operations = [  # by path where it can be: the client shows progress for these only
        CommitOperationAdd(name, data if name == 'README.md' else Path(folder) / name) for name, data in files.items()]
    with _explained(repo_id, endpoint):
        commit = api.create_commit(
            repo_id, operations, commit_message=f'{repo_id.partition("/")[2]} {tag}')
        api.create_tag(repo_id, tag=tag, revision=commit.oid, exist_ok=True)
        differ = _differ(api, repo_id, commit.oid, files)
    if differ:
        raise RuntimeError(f'{repo_id} gave back other bytes of {", ".join(differ)}; publish it again')
    return commit.commit_url


@contextlib.contextmanager
def _explained(repo_id: str, endpoint: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the client's errors have no base of their own, nor have those of its HTTP libraries
        raise RuntimeError(
            f'{repo_id} is not published yet. {hub_fault(e, repo_id, endpoint)} What is uploaded is not uploaded again.'
        ) from e


def _differ(api: HfApi, repo_id: str, commit: str, files: dict[str, bytes]) -> list[str]:
    """Names of the files that the Hub does not give back byte for byte."""
    with tempfile.TemporaryDirectory() as cache:
        there = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache, allow_patterns=list(files)))
        return [n for n, data in files.items() if not (there / n).is_file() or (there / n).read_bytes() != data]
