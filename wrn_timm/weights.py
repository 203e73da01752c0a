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
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, list_models
from timm.models._pretrained import PretrainedCfg

__all__ = ['Weights', 'find', 'list_weights', 'locate', 'sha256_of', 'sources', 'verify']

# The account on the Hub that holds our weights. Empty until its owner sets it: any other name could be a stranger's.
HUB_NAMESPACE = ''

WEIGHTS_FILE = 'model.safetensors'
_PACKAGE = Path(__file__).resolve().parent
_SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


@dataclasses.dataclass(frozen=True)
class Weights:
    """What is known of one tag.

    Attributes:
        name: `<arch>.<tag>`.
        location: Folder on this machine, `hf-hub:<repository>`, or '' where they cannot be had.
        size: Bytes of the weights file; None if not on this machine.
        sha256: Of the weights file; None if not on this machine.
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


def _config(folder: Path) -> dict[str, Any]:
    """A folder's `config.json`, {} where there is none."""
    file = folder / 'config.json'
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as e:
        raise RuntimeError(f'{file} is damaged: {e}. Restore the folder from where it came.') from e


def verify(folder: Path) -> Path:
    """The weights file of a folder, once it is the one that the folder's `config.json` names.

    Raises:
        FileNotFoundError: The folder holds no weights file.
        RuntimeError: The file's sha256 is not the one that `config.json` names (both are given), or it is damaged.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f'{folder} holds no {WEIGHTS_FILE}')
    expected = _config(folder).get('sha256')
    if expected and (found := sha256_of(file)) != expected:
        raise RuntimeError(
            f'{file} is damaged or is another file: sha256 {found}, but config.json names {expected}. '
            f'Restore the folder from where it came.')
    try:
        with safe_open(file, 'pt'):
            return file
    except SafetensorError as e:
        raise RuntimeError(f'{file} is damaged: {e}. Restore the folder from where it came.') from e


def sources(name: str) -> dict[str, str]:
    """Where the weights of our own `<arch>.<tag>` can be had now, as fields of timm's pretrained configuration."""
    folder = find(name)
    namespace = os.environ.get('WRN_TIMM_HUB_NAMESPACE', HUB_NAMESPACE)
    out = {'file': str(folder / WEIGHTS_FILE)} if folder else {}
    return {**out, 'hf_hub_id': f'{namespace}/{name}'} if namespace else out


def _download(name: str, hub_id: str, cache_dir: str | Path | None) -> str:
    from huggingface_hub import hf_hub_download
    repo_id, _, revision = hub_id.partition('@')
    try:
        return hf_hub_download(repo_id, WEIGHTS_FILE, revision=revision or None, cache_dir=cache_dir)
    except (OSError, ValueError, RuntimeError) as e:  # every fault of the Hub's client is one of these
        raise RuntimeError(
            f'No weights for {name}: {_searched()}, nor could the Hub give {hub_id} '
            f'({type(e).__name__}: {str(e).strip().partition(chr(10))[0]}). Connect to the network, or put a folder '
            f'called {name} with {WEIGHTS_FILE} into a place that $WRN_TIMM_WEIGHTS names.') from e


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
    if any(overlay.get(k) for k in _SOURCES):
        file = overlay.get('file')
        if file and not Path(file).is_file():
            raise FileNotFoundError(f'pretrained_cfg_overlay names {file}, which is not there')
        return out
    if pretrained_cfg is not None and not isinstance(pretrained_cfg, str):
        cfg = pretrained_cfg if isinstance(pretrained_cfg, PretrainedCfg) else PretrainedCfg(**pretrained_cfg)
        if cfg.source == 'local-dir':
            verify(Path(cfg.file))
        if cfg.source or any(getattr(cfg, k) for k in _SOURCES):
            return out
    else:
        cfg = get_pretrained_cfg(f'{variant}.{pretrained_cfg}' if pretrained_cfg else variant)
    name = f'{variant}.{cfg.tag}'
    if folder := find(name):
        overlay['file'] = str(verify(folder))
    elif hub_id := cfg.hf_hub_id or sources(name).get('hf_hub_id'):
        overlay['file'] = _download(name, hub_id, cache_dir)
    else:
        raise RuntimeError(
            f'No weights for {name}: {_searched()}, and no Hub account is set ($WRN_TIMM_HUB_NAMESPACE). '
            f'Set $WRN_TIMM_WEIGHTS to the folder that holds {name}/, or use pretrained=False for random weights.')
    return out


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
        folder, hub_id = find(name), cfg.hf_hub_id
        if folder:
            file = folder / WEIGHTS_FILE
            metrics_file = folder / 'metrics.json'
            metrics = json.loads(metrics_file.read_text()) if metrics_file.is_file() else {}
            rows.append(Weights(
                name, str(folder), file.stat().st_size, sha256_of(file), cfg.license or '', metrics.get('top1')))
        elif hub_id:
            rows.append(Weights(name, f'hf-hub:{hub_id}', None, None, cfg.license or '', None))
    return rows
