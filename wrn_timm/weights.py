"""Where the weights of a tag are, and whether they are whole.

Searched in this order: what the caller names, `$WRN_TIMM_WEIGHTS`, the checkout's `weights/`, the small weights packed
into the wheel, the Hugging Face Hub.
"""
from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, list_models
from timm.models._pretrained import PretrainedCfg

from .download import snapshot
from .names import is_utf8
from .schemas import check_config, check_metrics, read_json

__all__ = [
    'Weights', 'find', 'list_weights', 'locate', 'pinned', 'read_config', 'released', 'sha256_of', 'sources', 'verify',
    'version_tag']

# The account on the Hub that holds our weights. Empty until its owner sets it: any other name could be a stranger's.
HUB_NAMESPACE = ''

WEIGHTS_FILE = 'model.safetensors'
_PICKLES = ('.bin', '.pth', '.pt', '.ckpt')
_RESTORE = 'Restore the folder from where it came.'
HEADER_LIMIT = 1 << 20  # bytes; the longest of ours has 0.1 MB, and safetensors would parse 100 MB
_PACKAGE = Path(__file__).resolve().parent
_SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is known of one tag.

    Attributes:
        name: `<arch>.<tag>`.
        location: Folder on this machine, or `hf-hub:<repository>`.
        size: Bytes of the weights file; None if it is neither on this machine nor released by us.
        sha256: Of the weights file; None as above.
        license: SPDX identifier.
        top1: Accuracy on the test set in %, by `validate.py`; None if it is not known here.
    """
    name: str
    location: str
    size: int | None
    sha256: str | None
    license: str
    top1: float | None


def places() -> list[Path]:
    """Folders that hold weights folders, in the order they are searched."""
    named = os.environ.get('WRN_TIMM_WEIGHTS')
    return [Path(p) for p in (*([named] if named else []), _PACKAGE.parent / 'weights', _PACKAGE / '_weights')]


def find(name: str) -> Path | None:
    """The first weights folder of `<arch>.<tag>` on this machine."""
    return next((p / name for p in places() if (p / name / WEIGHTS_FILE).is_file()), None)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@cache
def released() -> dict[str, dict[str, Any]]:
    """Size, sha256, licence and accuracy of each released `<arch>.<tag>`, as `scripts/tables.py` wrote them down."""
    return json.loads((Path(__file__).resolve().parent / 'released.json').read_text(encoding='utf-8'))


def version_tag(sha256: str) -> str:
    """The git tag of a Hub repository that holds the weights of this sha256."""
    return f'sha256-{sha256[:12]}'


def read_config(folder: Path, remedy: str = _RESTORE) -> dict[str, Any]:
    """A folder's `config.json`, {} where there is none.

    Raises:
        RuntimeError: It is no JSON object, or not what timm wants of it; the field is named.
    """
    file = folder / 'config.json'
    try:
        return read_json(file, check_config) if file.is_file() else {}
    except ValueError as e:
        raise RuntimeError(f'{e}. {remedy}') from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object none of whose names stands twice: the parsers of safetensors and of Python take the last."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError('its header names a tensor, or a field of one, twice')
    return out


def _check_safetensors(file: Path) -> None:
    with open(file, 'rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        if length > HEADER_LIMIT:
            raise ValueError(f'its header says it is {length:,} bytes long, the limit is {HEADER_LIMIT:,}')
        json.loads(f.read(length), object_pairs_hook=_unique)
    with safe_open(file, 'pt'):
        pass


def verify(
        folder: Path,
        sha256: str | None = None,
        remedy: str = _RESTORE,
        named_by: str = 'wrn_timm/released.json',
) -> Path:
    """The weights file of a folder, once it is whole and the one that is meant.

    Args:
        folder: Weights folder, or a snapshot in the cache of the Hub's client.
        sha256: What the file must have; None for the one that `config.json` names. Where neither is known, a file in
            the cache must have the one that the Hub named when it was fetched; any other is taken as it is.
        remedy: What to do about a damaged file.
        named_by: Where `sha256` is from.

    Raises:
        FileNotFoundError: The folder holds no weights file; a pickle in its place is named, and not read.
        RuntimeError: The file has another sha256 (both are given), is no sound safetensors file, or has a path that is
            not UTF-8.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickle = next((p.name for p in sorted(folder.glob('*')) if p.suffix in _PICKLES), None)
        raise FileNotFoundError(f'{folder} holds no {WEIGHTS_FILE}' + (
            f'; {pickle} is a pickle, and pickles are not read: write its tensors anew, by '
            f"safetensors.torch.save_file(torch.load('{pickle}', weights_only=True), '{WEIGHTS_FILE}')"
            if pickle else ''))
    if not is_utf8(file):
        raise RuntimeError(f'{file} is not UTF-8, and safetensors opens no such path: rename it')
    expected = sha256 or read_config(folder, remedy).get('sha256')
    named_by = named_by if sha256 else 'config.json'
    if not expected and re.fullmatch('[0-9a-f]{64}', blob := file.resolve().name):
        named_by, expected = 'the Hub', blob
    if expected and (found := sha256_of(file)) != expected:
        raise RuntimeError(
            f'{file} is damaged or is another file: sha256 {found}, but {named_by} names {expected}. {remedy}')
    try:
        _check_safetensors(file)
    except (SafetensorError, ValueError, RecursionError) as e:
        raise RuntimeError(f'{file} is damaged: {e}. {remedy}') from e
    return file


def pinned() -> dict[str, dict[str, Any]]:
    """The released weights by where our account on the Hub has them, `<account>/<arch>.<tag>@<version>`."""
    return {f"{HUB_NAMESPACE}/{name}@{version_tag(row['sha256'])}": row
            for name, row in released().items() if HUB_NAMESPACE}


def _hub_id(name: str) -> str:
    """Where the Hub has our own `<arch>.<tag>`, or the account of $WRN_TIMM_HUB_NAMESPACE its own; '' for nowhere."""
    account = os.environ.get('WRN_TIMM_HUB_NAMESPACE', HUB_NAMESPACE)
    if account != HUB_NAMESPACE:
        return f'{account}/{name}' if account else ''
    return next((hub_id for hub_id in pinned() if hub_id.startswith(f'{account}/{name}@')), '')


def sources(name: str) -> dict[str, str]:
    """Where the weights of our own `<arch>.<tag>` can be had now, as fields of timm's pretrained configuration."""
    folder, hub_id = find(name), _hub_id(name)
    out = {'file': str(folder / WEIGHTS_FILE)} if folder else {}
    return {**out, 'hf_hub_id': hub_id} if hub_id else out


def _download(hub_id: str, cache_dir: str | Path | None) -> str:
    folder = snapshot(hub_id, ('config.json', WEIGHTS_FILE), cache_dir)
    return str(verify(
        folder, pinned().get(hub_id, {}).get('sha256'),
        f'Delete {folder.parents[1]} and load again, which downloads it anew.'))


def _searched() -> str:
    named = '' if os.environ.get('WRN_TIMM_WEIGHTS') else ' ($WRN_TIMM_WEIGHTS is not set)'
    return f"not in {', '.join(map(str, places()))}{named}"


def locate(
        variant: str,
        pretrained: bool,
        pretrained_cfg: str | dict[str, Any] | PretrainedCfg | None,
        overlay: dict[str, Any] | None,
        cache_dir: str | Path | None = None,
) -> dict[str, Any]:
    """The `pretrained_cfg` and `pretrained_cfg_overlay` that make timm load the right file for an entrypoint.

    Args:
        variant: Architecture.
        pretrained: Whether weights are wanted; if not, only the tag is checked.
        pretrained_cfg: What the caller gave: a tag, a whole configuration, or None for the default tag.
        overlay: What the caller wants changed in it.
        cache_dir: Where the Hub's client keeps files; None for its default.

    Raises:
        RuntimeError: The tag is unknown (the nearest are named), its weights are damaged, or they are nowhere (says
            where they were looked for and what to set).
    """
    overlay = dict(overlay or {})
    out = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if isinstance(pretrained_cfg, str):
        _check_tag(variant, pretrained_cfg)
    if not pretrained:
        return out
    given = None  # what of the caller's names a source of its own
    if any(overlay.get(k) for k in _SOURCES):
        given = cfg = PretrainedCfg(**overlay)
    elif pretrained_cfg is None or isinstance(pretrained_cfg, str):
        cfg = get_pretrained_cfg(f'{variant}.{pretrained_cfg}' if pretrained_cfg else variant)
    else:
        cfg = pretrained_cfg if isinstance(pretrained_cfg, PretrainedCfg) else PretrainedCfg(**pretrained_cfg)
        given = cfg if cfg.source or any(getattr(cfg, k) for k in _SOURCES) else None
    if given:
        overlay.update(_verified(given, cache_dir))
        return out
    name = f'{variant}.{cfg.tag}'
    if folder := find(name):
        overlay['file'] = str(verify(folder))
    elif hub_id := cfg.hf_hub_id or sources(name).get('hf_hub_id'):
        try:
            overlay['file'] = _download(hub_id, cache_dir)
        except RuntimeError as e:
            raise RuntimeError(
                f'No weights for {name}: {_searched()}, and {e} Or put a folder called {name} with {WEIGHTS_FILE} into '
                f'a place that $WRN_TIMM_WEIGHTS names.') from e
    else:
        raise RuntimeError(
            f'No weights for {name}: {_searched()}, and no Hub account is set ($WRN_TIMM_HUB_NAMESPACE). '
            f'Set $WRN_TIMM_WEIGHTS to the folder that holds {name}/, or use pretrained=False for random weights.')
    return out


def _verified(cfg: PretrainedCfg, cache_dir: str | Path | None) -> dict[str, Any]:
    """What makes timm load the verified file of a folder or repository that the caller names, and no other of it."""
    if cfg.source == 'local-dir':
        return dict(source=None, custom_load=False, file=str(verify(Path(cfg.file))))
    if cfg.source == 'hf-hub' or (cfg.hf_hub_id and not (cfg.state_dict or cfg.file or cfg.hf_hub_filename)):
        return dict(source=None, custom_load=False, file=_download(cfg.hf_hub_id, cache_dir))
    if cfg.file and not cfg.state_dict and not Path(cfg.file).is_file():
        raise FileNotFoundError(f'pretrained_cfg_overlay names {cfg.file}, which is not there')
    return {}


def _check_tag(variant: str, tag: str) -> None:
    tags = [name.partition('.')[2] for name in get_arch_pretrained_cfgs(variant)]
    if tag not in tags:
        nearest = difflib.get_close_matches(tag, tags, n=1, cutoff=0)
        raise RuntimeError(f'{variant} has no tag {tag!r}; nearest: {nearest[0]}; known: {", ".join(tags)}')


def list_weights() -> list[Weights]:
    """Every tag of every WRN whose weights are on this machine or on the Hub, in timm's order of names."""
    rows = []
    for name in list_models('wrn*', include_tags=True):
        cfg = get_pretrained_cfg(name)
        known = {'size': None, 'sha256': None, 'license': cfg.license or '', 'top1': None}
        if folder := find(name):
            file, metrics = folder / WEIGHTS_FILE, folder / 'metrics.json'
            top1 = read_json(metrics, check_metrics).get('top1') if metrics.is_file() else None
            known.update(size=file.stat().st_size, sha256=sha256_of(file), top1=top1)
            rows.append(Weights(name, str(folder), **known))
        elif hub_id := _hub_id(name) if name in released() else cfg.hf_hub_id:
            known.update(pinned().get(hub_id, {}))
            rows.append(Weights(name, f'hf-hub:{hub_id}', **known))
    return rows
