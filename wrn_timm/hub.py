"""Publish weights folders as repositories of the Hugging Face Hub, with checks before and after."""
from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id

from .card import GOLDEN_FILE, GOLDEN_TOLERANCE, TRANSFER_FILE, check_golden
from .detection import DETECTOR_FILE, find_detector
from .detector_card import check_golden_detector, detector_name
from .download import hub_fault
from .names import some
from .weights import WEIGHTS_FILE, verify, version_tag, weights_folder

__all__ = ['check_folder', 'preview', 'publish']

_NO_PATHS = ('hf-hub:', 'torchvision/')  # prefixes of model names with a slash
SIZE_LIMIT = 5_000_000  # in bytes, for any file but the weights


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Kind of weights folder: classifier or detector.

    Attributes:
        config: JSON file with the architecture of the network and the sha256 of its weights.
        name: Function that returns the name of the repository, given the content of `config`.
        record: JSON file that records the training.
        settings: Function that returns the training settings, given the content of `record`; {} without a training run.
        optional: Optional files of the folder.
        check_golden: Function that returns the largest difference between the golden outputs and the current ones,
            given the folder.
        golden: Name of these outputs, for messages.
        metrics: Fields of `metrics.json` that are in the model-index of the card.
        library: `library_name` of the card.
        calls: Functions in the code of the card whose first argument names the weights.
        classes: Function that returns the class names or their number, given the content of `config`.
        writers: Command that writes the folder, and command that rewrites the files beside the weights.
    """
    config: str
    name: Callable[[dict[str, Any]], str]
    record: str
    settings: Callable[[dict[str, Any]], dict[str, Any]]
    optional: tuple[str, ...]
    check_golden: Callable[[Path], float]
    golden: str
    metrics: tuple[str, ...]
    library: str
    calls: tuple[str, ...]
    classes: Callable[[dict[str, Any]], Any]
    writers: tuple[str, str]

    @property
    def files(self) -> tuple[str, ...]:
        """Required files of the folder."""
        return tuple(dict.fromkeys((
            WEIGHTS_FILE, self.config, 'README.md', 'metrics.json', self.record, 'history.csv', 'curves.png',
            GOLDEN_FILE)))


_CLASSIFIER = _Kind(
    config='config.json', name=lambda config: f"{config['architecture']}.{config['pretrained_cfg']['tag']}",
    record='recipe.json', settings=lambda run: run.get('recipe') or run.get('finetune') or {},
    optional=(TRANSFER_FILE,), check_golden=check_golden, golden='logits', metrics=('top1',), library='timm',
    calls=('create_model',), classes=lambda config: (
        config.get('label_names') or config.get('pretrained_cfg', {}).get('label_names') or config.get('num_classes')),
    writers=('wrn-timm train or finetune', 'wrn-timm validate --write'))
_DETECTOR = _Kind(
    config=DETECTOR_FILE, name=detector_name, record=DETECTOR_FILE,
    settings=lambda run: {**run.get('detect', {}), 'data': run.get('data', '')},
    optional=(), check_golden=check_golden_detector, golden='scores', metrics=('map', 'map_50'), library='torchvision',
    calls=('open_detector', 'find_objects'), classes=lambda config: config['classes'],
    writers=('wrn-timm detect', 'wrn-timm detect --resume'))


def _found(path: str | Path) -> tuple[Path, _Kind]:
    """Weights folder at a path, or in the run directory there, and its kind."""
    if not Path(path).is_dir():
        raise FileNotFoundError(f'no weights folder at {path}')
    if detector := find_detector(path):
        return detector, _DETECTOR
    if (Path(path) / WEIGHTS_FILE).is_file():
        return Path(path), _CLASSIFIER
    return weights_folder(path), _CLASSIFIER


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding='utf-8'))


def _file_faults(folder: Path, kind: _Kind) -> Iterator[str]:
    """Yield a message for each file that is unexpected, unsuitable or missing."""
    for path in sorted(folder.iterdir()):
        if path.name not in kind.files + kind.optional:
            yield f'{path.name} is not part of a weights folder: move it away'
        elif path.is_symlink() or not path.is_file():
            yield f'{path.name} is a link or a folder: replace it with the file itself'
        elif path.name != WEIGHTS_FILE and path.stat().st_size > SIZE_LIMIT:
            yield f'{path.name} has {path.stat().st_size:,} bytes; the limit is {SIZE_LIMIT:,}'
    for name in kind.files:
        if not (folder / name).exists():
            yield f'{name} is missing: it is written by {kind.writers[0]} or {kind.writers[1]}'


def _content_faults(folder: Path, kind: _Kind) -> Iterator[str]:
    """Yield a message for each fault in the content of the files."""
    try:
        config, metrics, record = (_read(folder / name) for name in (kind.config, 'metrics.json', kind.record))
        verify(folder, config.get('sha256'), named_by=kind.config)
        if 'sha256' not in config:
            yield f'{kind.config} names no sha256 of {WEIGHTS_FILE}'
        settings = kind.settings(record)
        for key, value in settings.items():
            if isinstance(value, str) and re.search(r'[/\\]', value) and not value.startswith(_NO_PATHS):
                yield f'{kind.record} has a path of this machine as {key}: {value}; replace it with a name'
        if not settings:
            yield f'{kind.record} describes no training run: converted weights of other authors are not published'
        difference = kind.check_golden(folder)
        if not difference <= GOLDEN_TOLERANCE:
            yield f'the {kind.golden} differ by {difference:.2g} from {GOLDEN_FILE}; the limit is {GOLDEN_TOLERANCE:g}'
        yield from _card_faults(
            (folder / 'README.md').read_text(encoding='utf-8'), kind, config.get('pretrained_cfg', {}), metrics)
    except Exception as e:  # damaged archives, JSON, YAML and weights files raise unrelated errors
        yield f'{type(e).__name__}: {e}'


def _card_faults(text: str, kind: _Kind, cfg: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    data = ModelCard(text).data
    code = re.search(r'^```python\n(.*)', text, flags=re.M)
    stated = {result.metric_value for result in data.eval_results or ()}
    complete = {
        f'library_name: {kind.library}': data.library_name == kind.library,
        'the tag wrn_timm': 'wrn_timm' in (data.tags or ()),
        f"the licence {cfg.get('license')}": data.license == cfg.get('license') or not cfg.get('license'),
        **{f'the accuracy {metrics[key]} in its model-index': metrics[key] in stated for key in kind.metrics},
        '`import wrn_timm` as the first line of code': code is not None and code[1] == 'import wrn_timm',
        **{part: part in text for part in (
            '## Accuracy', '## Training', '## Limits', '## Citation', '![curves](curves.png)', 'Preprocessing')},
    }
    if not (data.license or cfg.get('license')):
        yield 'README.md names no licence: write yours after "license:" in its first lines'
    for part, there in complete.items():
        if not there:
            yield f'README.md lacks {part}: rewrite it with {kind.writers[1]}'


def check_folder(folder: str | Path) -> str:
    """Check that a weights folder can be published, and return its name.

    The name is `<arch>.<tag>`, or `<detector>_<arch>.<data>` for a detector. The folder must hold all required files
    and no unexpected ones. The weights must have the sha256 in `config.json` or `detector.json`, and reproduce the
    golden logits or scores. The card must be complete, agree with the metrics and name a licence.

    Args:
        folder: Weights folder of a classifier or detector, or the run directory that holds it.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder cannot be published. The message lists every fault.
    """
    folder, kind = _found(folder)
    faults = list(_file_faults(folder, kind)) or list(_content_faults(folder, kind))
    if faults:
        raise ValueError('\n  '.join([f'{folder} cannot be published:', *faults]))
    return kind.name(_read(folder / kind.config))


def _repository(folder: str | Path, namespace: str, tag: str) -> tuple[str, dict[str, bytes]]:
    """Name and files of the repository for a folder. The code in its card loads the model from this repository."""
    name = check_folder(folder)
    repo_id = f'{namespace}/' + (f'{name.rpartition(".")[0]}.{tag}' if tag else name)
    validate_repo_id(repo_id)
    folder, kind = _found(folder)
    files = {name: path.read_bytes() for name in kind.files + kind.optional if (path := folder / name).is_file()}
    card = files['README.md'].decode()
    for call in kind.calls:
        card = re.sub(rf'\b{call}\("[^"]*"', f'{call}("hf-hub:{repo_id}"', card, count=1)
    return repo_id, {**files, 'README.md': card.encode()}


def preview(folder: str | Path, namespace: str, tag: str = '') -> str:
    """Describe what `publish` would upload: each file with its size, and the card. This needs no network."""
    repo_id, files = _repository(folder, namespace, tag)
    sizes = [f'{len(data):>12,}  {name}' for name, data in files.items()]
    return '\n'.join([repo_id, *sizes, '', files['README.md'].decode()])


def publish(
        folder: str | Path,
        namespace: str,
        private: bool = False,
        endpoint: str | None = None,
        tag: str = '',
) -> str:
    """Publish a weights folder as the repository `<namespace>/<name>` of the Hub, and read it back.

    The name is the one that `check_folder` returns. A repository that holds a model with other classes is not changed.

    Files that are already in the repository are not uploaded again, so an interrupted upload can simply be repeated.
    Other files in the repository are kept. The commit is tagged with the sha256 of the weights (`version_tag`). A tag
    is never moved: it stays at the first commit that has these weights.

    Args:
        folder: Weights folder of a classifier or detector, or the run directory that holds it.
        namespace: User or organisation.
        private: Make the repository private.
        endpoint: URL of the Hub; None for $HF_ENDPOINT or the Hub itself.
        tag: Last part of the repository's name; '' for the name of the data.

    Returns:
        URL of the commit.

    Raises:
        FileNotFoundError, ValueError: The folder cannot be published (`check_folder`), its name is not allowed on the
            Hub, or the repository exists and holds another model or, with `private`, is public.
        RuntimeError: The Hub refused the upload, could not be reached, or returned different bytes. The message says
            what to do.
    """
    repo_id, files = _repository(folder, namespace, tag)
    folder, kind = _found(folder)
    api = HfApi(endpoint=endpoint, library_name='wrn_timm')
    version = version_tag(hashlib.sha256(files[WEIGHTS_FILE]).hexdigest())
    with _explained(repo_id, endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        public = not api.repo_info(repo_id).private
        there = _there(api, repo_id, kind)
    classes = kind.classes(json.loads(files[kind.config]))
    if there not in (None, classes):
        raise ValueError(f'{repo_id} holds another model, which predicts {_in_words(there)}; this one predicts '
                         f'{_in_words(classes)}: choose another --tag, or delete that repository')
    if private and public:
        raise ValueError(f'{repo_id} already exists and is public: make it private on the Hub, or publish '
                         f'without --private')
    operations = [  # by path where possible, because the client shows progress only for paths
        CommitOperationAdd(name, data if name == 'README.md' else folder / name) for name, data in files.items()]
    with _explained(repo_id, endpoint):
        commit = api.create_commit(
            repo_id, operations, commit_message=f'{repo_id.partition("/")[2]} {version}')
        api.create_tag(repo_id, tag=version, revision=commit.oid, exist_ok=True)
        differ = _differ(api, repo_id, commit.oid, files)
    if differ:
        raise RuntimeError(f'{repo_id} returned different bytes for {", ".join(differ)}; publish it again')
    return commit.commit_url


@contextlib.contextmanager
def _explained(repo_id: str, endpoint: str | None) -> Iterator[None]:
    try:
        yield
    except Exception as e:  # the errors of the client and of its HTTP libraries have no common base
        raise RuntimeError(
            f'{repo_id} is not published yet. {hub_fault(e, repo_id, endpoint)} Files that were already uploaded will '
            f'not be uploaded again.'
        ) from e


def _there(api: HfApi, repo_id: str, kind: _Kind) -> list[str] | int | None:
    """Classes of the model in a repository: [] if its configuration names none, None if there is no model."""
    if not api.file_exists(repo_id, kind.config):
        return None
    with tempfile.TemporaryDirectory() as cache, contextlib.suppress(ValueError, KeyError, AttributeError):
        return kind.classes(_read(Path(api.hf_hub_download(repo_id, kind.config, cache_dir=cache)))) or []
    return []


def _in_words(classes: list[str] | int) -> str:
    return some(classes) if isinstance(classes, list) and classes else f'{classes or "unknown"} classes'


def _differ(api: HfApi, repo_id: str, commit: str, files: dict[str, bytes]) -> list[str]:
    """Names of the files that the Hub does not return byte for byte."""
    with tempfile.TemporaryDirectory() as cache:
        there = Path(api.snapshot_download(repo_id, revision=commit, cache_dir=cache, allow_patterns=list(files)))
        return [n for n, data in files.items() if not (there / n).is_file() or (there / n).read_bytes() != data]
