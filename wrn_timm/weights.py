"""Find and verify the weights of a tag, open weights folders as models, and write models as weights folders.

Places are searched in this order: the source that the caller names, `$WRN_TIMM_WEIGHTS`, `weights/` of the checkout,
the small weights packed into the wheel, the Hugging Face Hub. Third-party weights are downloaded from their publisher.
"""
from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, list_models, save_for_hf
from timm.models._pretrained import PretrainedCfg

from .download import kept_at, snapshot, unpacked
from .files import atomic_folder, digest
from .names import counted, is_utf8
from .schemas import check_config, check_metrics, read_json

__all__ = [
    'SOURCES', 'Weights', 'check_colours', 'check_weights', 'default_tag', 'eval_transform', 'export_weights', 'find',
    'list_weights', 'locate', 'more_accurate', 'not_finite', 'open_model', 'pinned', 'published', 'read_config',
    'released', 'sha256_of', 'source_of', 'sources', 'verify', 'version_tag', 'weights_folder', 'weights_name']

# Hub account that holds our weights. Empty until its owner sets it, because any other name could be a stranger's.
HUB_NAMESPACE = ''

WEIGHTS_FILE = 'model.safetensors'
_PICKLES = ('.bin', '.pth', '.pt', '.ckpt')
_RESTORE = 'Restore the folder from its source.'
HEADER_LIMIT = 1 << 20  # in bytes; our longest header has 0.1 MB, and safetensors would parse up to 100 MB
_PACKAGE = Path(__file__).resolve().parent
SOURCES = ('file', 'url', 'hf_hub_id', 'state_dict')


@dataclasses.dataclass(frozen=True)
class Weights:
    """Information about the weights of one tag.

    Attributes:
        name: Full name, `<arch>.<tag>`.
        location: Local folder or file, `hf-hub:<repository>`, or the URL of a published file.
        size: Size of the weights file in bytes; None if the file is neither on this machine nor released by us.
        sha256: sha256 of the weights file; None in the same cases as `size`.
        license: SPDX identifier of the licence.
        top1: Accuracy on the test set in %, measured by `wrn-timm validate`; None if unknown.
        published_error: Error on the test set in % that pytorchcv published with its weights, not measured here; None
            for all other weights.
        default: Whether `create_model(<arch>, pretrained=True)` loads these weights.
        more_accurate: Name of the listed weights of the same network and classes with the lowest error; '' if no others
            have a lower error.
    """
    name: str
    location: str
    size: int | None
    sha256: str | None
    license: str
    top1: float | None
    published_error: float | None = None
    default: bool = False
    more_accurate: str = ''


def places() -> list[Path]:
    """Folders that are searched for weights folders, in this order."""
    named = os.environ.get('WRN_TIMM_WEIGHTS')
    return [*([Path(named).expanduser()] if named else []), _PACKAGE.parent / 'weights', _PACKAGE / '_weights']


def find(name: str) -> Path | None:
    """First local weights folder of `<arch>.<tag>`; None if there is none."""
    return next((p / name for p in places() if (p / name / WEIGHTS_FILE).is_file()), None)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    return digest(path, 'sha256')


@cache
def released() -> dict[str, dict[str, Any]]:
    """Size, sha256, licence and accuracy of each released `<arch>.<tag>`, written by `scripts/tables.py`."""
    return json.loads((Path(__file__).resolve().parent / 'released.json').read_text(encoding='utf-8'))


@cache
def published() -> dict[str, dict[str, Any]]:
    """URL of the archive, sha1 of the file in it, and published test error in % of each third-party `<arch>.<tag>`.

    The entries are from the model table of pytorchcv 0.0.74.
    """
    return json.loads((Path(__file__).resolve().parent / 'published.json').read_text(encoding='utf-8'))


def default_tag(arch: str, tags: Iterable[str]) -> str:
    """Default tag of a network, for names without a tag. It is the same on every machine.

    It is the first of `tags` that we released, else the first that others published, else the first of all.
    """
    tags = list(tags)
    return next((tag for known in (released(), published()) for tag in tags if f'{arch}.{tag}' in known), tags[0])


def more_accurate(name: str, errors: dict[str, float]) -> str:
    """Name of the weights of the same network and classes with the lowest error; '' if `name` is at least as good.

    Args:
        name: Name of the weights, `<arch>.<tag>`.
        errors: Test errors by name.
    """
    rivals = [n for n in errors if n.replace('.pcv_', '.') == name.replace('.pcv_', '.')]
    best = min(rivals, key=errors.__getitem__, default=name)
    return best if best != name and errors[best] < errors.get(name, math.inf) else ''


def version_tag(sha256: str) -> str:
    """Git tag of the weights with this sha256 in a Hub repository."""
    return f'sha256-{sha256[:12]}'


def read_config(folder: Path, remedy: str = _RESTORE) -> dict[str, Any]:
    """Read the `config.json` of a folder; {} if there is none.

    Raises:
        RuntimeError: The file is not a JSON object, or has an invalid field, which is named.
    """
    file = folder / 'config.json'
    try:
        return read_json(file, check_config) if file.is_file() else {}
    except ValueError as e:
        raise RuntimeError(f'{e}. {remedy}') from e


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for `json.loads` that refuses duplicate names, of which safetensors and Python take the last."""
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
    """Verify the weights file of a folder, and return its path.

    Args:
        folder: Weights folder, or a snapshot in the cache of the Hub client.
        sha256: Expected sha256; None for the one in `config.json`. If there is none either, a file in the cache must
            have the sha256 that the Hub gave when it was downloaded; the sha256 of any other file is not checked.
        remedy: Advice for the error message about a damaged file.
        named_by: Source of `sha256`, for the error message.

    Raises:
        FileNotFoundError: The folder holds no weights file. A pickle in its place is named, but not read.
        RuntimeError: The file has another sha256 (both are given), is not a valid safetensors file, or has a path that
            is not UTF-8.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        pickle = next((p.name for p in sorted(folder.glob('*')) if p.suffix in _PICKLES), None)
        raise FileNotFoundError(f'{folder} holds no {WEIGHTS_FILE}' + (
            f'; {pickle} is a pickle, and pickles are not read: convert it with '
            f"safetensors.torch.save_file(torch.load('{pickle}', weights_only=True), '{WEIGHTS_FILE}')"
            if pickle else ''))
    if not is_utf8(file):
        raise RuntimeError(f'{file} is not UTF-8, which safetensors cannot open: rename it')
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
    """Released weights by their place in our Hub account, `<account>/<arch>.<tag>@<version>`."""
    return {f"{HUB_NAMESPACE}/{name}@{version_tag(row['sha256'])}": row
            for name, row in released().items() if HUB_NAMESPACE}


def _hub_id(name: str) -> str:
    """Hub repository of `<arch>.<tag>` in our account, or in the account $WRN_TIMM_HUB_NAMESPACE; '' if none."""
    if name in published():  # third-party weights, which our account does not hold
        return ''
    account = os.environ.get('WRN_TIMM_HUB_NAMESPACE', HUB_NAMESPACE)
    if account != HUB_NAMESPACE:
        return f'{account}/{name}' if account else ''
    return next((hub_id for hub_id in pinned() if hub_id.startswith(f'{account}/{name}@')), '')


def sources(name: str) -> dict[str, str]:
    """Available sources of the weights of `<arch>.<tag>`, as fields of timm's pretrained configuration."""
    folder = find(name)
    hub_id = _hub_id(name) if name in released() else ''  # the Hub may hold others, but this is not known
    found = {'file': folder and str(folder / WEIGHTS_FILE), 'hf_hub_id': hub_id,
             'url': published().get(name, {}).get('url')}
    return {field: value for field, value in found.items() if value}


def _download(hub_id: str, cache_dir: str | Path | None) -> str:
    folder = snapshot(hub_id, ('config.json', WEIGHTS_FILE), cache_dir)
    return str(verify(
        folder, pinned().get(hub_id, {}).get('sha256'),
        f'Delete {folder.parents[1]} and load again to download the weights.'))


def _published_at(url: str | None) -> dict[str, Any] | None:
    return next((entry for entry in published().values() if entry['url'] == url), None)


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
    """Find the `pretrained_cfg` and `pretrained_cfg_overlay` that make timm load the right file for an entrypoint.

    Args:
        variant: Name of the architecture.
        pretrained: Whether to find weights; otherwise, only the tag is checked.
        pretrained_cfg: Tag or whole configuration from the caller; None for the default tag.
        overlay: Changes to the configuration from the caller.
        cache_dir: Folder for downloaded files; None for the default cache.

    Raises:
        RuntimeError: The tag is unknown (the nearest is named), or its weights are damaged or not found (the message
            says where they were searched for and what to set).
    """
    overlay = dict(overlay or {})
    out = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay)
    if isinstance(pretrained_cfg, str):
        _check_tag(variant, pretrained_cfg)
    if not pretrained:
        return out
    given = None  # the caller's configuration, if it names a source
    if any(overlay.get(k) for k in SOURCES):
        given = cfg = PretrainedCfg(**overlay)
        overlay.update({k: None for k in SOURCES if not overlay.get(k)})  # timm would prefer some sources of the tag
        overlay.setdefault('source', None)  # and a folder or repository to all others
    elif pretrained_cfg is None or isinstance(pretrained_cfg, str):
        cfg = get_pretrained_cfg(f'{variant}.{pretrained_cfg}' if pretrained_cfg else variant)
    else:
        cfg = pretrained_cfg if isinstance(pretrained_cfg, PretrainedCfg) else PretrainedCfg(**pretrained_cfg)
        given = cfg if cfg.source or any(getattr(cfg, k) for k in SOURCES) else None
    if given:
        overlay.update(_verified(given, cache_dir))
        return out
    if not cfg.tag:
        raise RuntimeError(f'The pretrained_cfg for {variant} names no weights; give it a source, such as file or '
                           f'hf_hub_id, or use pretrained=False for random weights.')
    name = f'{variant}.{cfg.tag}'
    overlay['file'] = _found(name, cfg, cache_dir)
    return out


def _found(name: str, cfg: PretrainedCfg, cache_dir: str | Path | None) -> str:
    """Verified file of a registered `<arch>.<tag>`, downloaded if it is not on this machine."""
    if folder := find(name):
        return str(verify(folder))
    hub_id, entry = cfg.hf_hub_id or _hub_id(name), _published_at(cfg.url)
    try:
        if hub_id:
            return _download(hub_id, cache_dir)
        if entry:
            return str(unpacked(cfg.url, entry['sha1'], cache_dir))
    except RuntimeError as e:
        remedy = (f'Or put a folder called {name} with {WEIGHTS_FILE} into the folder that $WRN_TIMM_WEIGHTS points to.'
                  f'{_nearest(name)}' if hub_id else
                  f'Or download it on another machine, and save the file in it as {kept_at(cfg.url, cache_dir)}.')
        raise RuntimeError(f'No weights for {name}: {_searched()}, and {e} {remedy}') from e
    raise RuntimeError(
        f'No weights for {name}: {_searched()}, and no Hub account is set ($WRN_TIMM_HUB_NAMESPACE). '
        f'Set $WRN_TIMM_WEIGHTS to the folder that holds {name}/, or use pretrained=False for random weights.'
        f'{_nearest(name)}')


def _nearest(name: str) -> str:
    """Sentence that names the network nearest in size with weights for the same classes; '' if there is none."""
    def size(name: str) -> float:
        depth, width = re.match(r'wrn(\d+)_([\d_]+)', name).groups()
        return math.log((int(depth) - 4) * float(width.replace('_', '.')) ** 2)  # as the number of parameters

    tag = name.partition('.')[2].removeprefix('pcv_')
    there = [n for n in list_models('wrn*', include_tags=True)
             if n != name and n.partition('.')[2].removeprefix('pcv_') == tag
             and (find(n) or n in published() or n in released() and _hub_id(n))]
    if tag == 'untrained':  # an ImageNet network; timm has weights of some others
        there = [n for n in list_models('wrn*', include_tags=True) if n.endswith('in1k')]
    nearest = min(there, key=lambda n: abs(size(n) - size(name)), default='')
    return f' The nearest network with weights is {nearest}.' if nearest else ''


def _verified(cfg: PretrainedCfg, cache_dir: str | Path | None) -> dict[str, Any]:
    """Overlay that makes timm load only the verified file of the source that the caller names."""
    if cfg.source == 'local-dir':
        return dict(source=None, custom_load=False, file=str(verify(Path(cfg.file))))
    if cfg.source == 'hf-hub' or (cfg.hf_hub_id and not (cfg.state_dict or cfg.file or cfg.hf_hub_filename)):
        return dict(source=None, custom_load=False, file=_download(cfg.hf_hub_id, cache_dir))
    if (entry := _published_at(cfg.url)) and not (cfg.state_dict or cfg.file):
        return dict(file=str(unpacked(cfg.url, entry['sha1'], cache_dir)))
    file = Path(cfg.file) if cfg.file and not cfg.state_dict else None
    if file and file.name == WEIGHTS_FILE and file.is_file():
        return dict(file=str(verify(file.parent)))
    if file and not file.is_file():
        what = 'is a folder; name the file in it' if file.is_dir() else 'does not exist'
        raise FileNotFoundError(f'pretrained_cfg_overlay names {cfg.file}, which {what}')
    return {}


def _check_tag(variant: str, tag: str) -> None:
    tags = sorted(name.partition('.')[2] for name in get_arch_pretrained_cfgs(variant))
    if tag not in tags:
        nearest = difflib.get_close_matches(tag, tags, n=1, cutoff=0)
        raise RuntimeError(f'{variant} has no tag {tag!r}; nearest: {nearest[0]}; known: {", ".join(tags)}')


def list_weights() -> list[Weights]:
    """List the weights of all WRNs that are on this machine, on the Hub or published by others.

    Sorted by name as in timm, with pytorchcv's weights at the end.
    """
    rows = []
    for name in list_models('wrn*', include_tags=True):
        if not (cfg := get_pretrained_cfg(name)):  # the user's own model
            continue
        entry = published().get(name, {})
        known = {'size': None, 'sha256': None, 'license': cfg.license or '', 'top1': None,
                 'published_error': entry.get('error'), 'default': get_pretrained_cfg(cfg.architecture).tag == cfg.tag}
        if folder := find(name):
            file, metrics = folder / WEIGHTS_FILE, folder / 'metrics.json'
            top1 = read_json(metrics, check_metrics).get('top1') if metrics.is_file() else None
            known.update(size=file.stat().st_size, sha256=sha256_of(file), top1=top1)
            rows.append(Weights(name, str(folder), **known))
        elif hub_id := _hub_id(name) if name in released() else cfg.hf_hub_id:
            known.update(pinned().get(hub_id, {}))
            rows.append(Weights(name, f'hf-hub:{hub_id}', **known))
        elif entry:
            if (file := kept_at(entry['url'])).is_file():
                known.update(size=file.stat().st_size, sha256=sha256_of(file))
            rows.append(Weights(name, str(file) if file.is_file() else entry['url'], **known))
    errors = {w.name: w.published_error if w.top1 is None else 100 - w.top1 for w in rows}
    errors = {name: error for name, error in errors.items() if error is not None}
    rows = [dataclasses.replace(w, more_accurate=more_accurate(w.name, errors)) for w in rows]
    return sorted(rows, key=lambda w: w.published_error is not None)


_LOCAL = 'local-dir:'


def open_model(name: str, pretrained: bool = True, **kwargs: Any) -> torch.nn.Module:
    """Open a model by timm name (`wrn16_1.cifar10`) or weights folder, in evaluation mode.

    Args:
        name: timm name, weights folder or run directory.
        pretrained: Load the weights. Those of a folder are verified first, for any network.
        kwargs: Passed to `timm.create_model`.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no weights file.
        RuntimeError: The weights file or its configuration is damaged, or they do not agree.
        ValueError: timm has no such model; the nearest are named.
        Any error of `timm.create_model`.
    """
    source = source_of(name)
    if not source.startswith(_LOCAL):
        return timm.create_model(source, pretrained=pretrained, **kwargs).eval()
    folder = Path(source.removeprefix(_LOCAL))
    architecture = read_config(folder).get('architecture')
    if not architecture or not timm.is_model(architecture):
        raise ValueError(
            f'{folder / "config.json"} names the architecture {architecture!r}; {_nearest_models(architecture)}')
    if pretrained:
        verify(folder)
    try:
        return timm.create_model(source, pretrained=pretrained, **kwargs).eval()
    except (AssertionError, AttributeError, KeyError, TypeError) as e:
        if kwargs:  # the caller's arguments may be the cause
            raise
        raise RuntimeError(f'{folder / "config.json"} is not valid for {architecture}: {type(e).__name__}: {e}') from e


def source_of(name: str) -> str:
    """Argument of `timm.create_model` for a timm name or weights folder; raises the same errors as `open_model`."""
    if Path(folder := name.removeprefix(_LOCAL)).is_dir():
        return f'{_LOCAL}{weights_folder(folder)}'
    if ':' in name:
        return name
    if Path(name).is_file():
        raise FileNotFoundError(f'{name} is a file; give the weights folder that contains it')
    if '/' in name or os.sep in name:
        raise FileNotFoundError(f'no weights folder at {name}; a repository of the Hub is written hf-hub:OWNER/NAME')
    if not timm.is_model(name):
        raise ValueError(f'timm knows no model {name}; {_nearest_models(name)}')
    if name not in timm.list_models('wrn*', include_tags=True) and (folder := find(name)):
        return f'{_LOCAL}{folder}'  # weights of another architecture, kept beside ours
    return name


def _nearest_models(name: str | None) -> str:
    found = difflib.get_close_matches((name or '').partition('.')[0], timm.list_models(), n=3, cutoff=0.5)
    return f'nearest: {", ".join(found) or "none"}'


def weights_folder(path: str | Path) -> Path:
    """Weights folder at a path or in the run directory there: `best/` after fine-tuning, `weights/` after `train`.

    Raises:
        FileNotFoundError: The path is neither.
    """
    path = Path(path)
    for folder in (path, path / 'best', path / 'weights'):
        if (folder / 'config.json').is_file():
            return folder
    if seeds := sorted(path.glob('seed-*')):
        raise FileNotFoundError(f'{path} holds the runs of several seeds; give one of them, such as {seeds[0]}')
    raise FileNotFoundError(f'{path} is neither a weights folder nor a finished run: there is no config.json')


def weights_name(name: str) -> str:
    """Display name of the weights that `open_model` opens by timm name or folder: `<arch>.<tag>`, without a path."""
    local = name.removeprefix(_LOCAL)
    if not Path(local).is_dir():  # the folder may be gone
        return Path(local).name if local != name or ':' not in name else name
    try:
        config = read_config(weights_folder(local))
        return f"{config['architecture']}.{config['pretrained_cfg']['tag']}"
    except (FileNotFoundError, KeyError, RuntimeError):  # it has no tag, or was removed meanwhile
        return Path(local).resolve().name


def not_finite(weights: dict[str, torch.Tensor]) -> str:
    """Name of the first tensor that holds NaN or infinity; '' if none does."""
    return next((name for name, t in weights.items() if not t.isfinite().all()), '')


def check_weights(weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Refuse to export weights that are not finite.

    Raises:
        FloatingPointError: A tensor holds NaN or infinity; it is named.
    """
    if name := not_finite(weights):
        raise FloatingPointError(f'{name} is not finite in {weights[name].dtype}; nothing is exported to {folder}')


def export_weights(
        model: torch.nn.Module,
        folder: Path,
        pretrained_cfg: dict[str, Any],
        half: bool = False,
) -> None:
    """Write a model's weights and configuration as a weights folder.

    Args:
        model: Model made by `timm.create_model`; it is not modified.
        folder: Weights folder. An existing one is replaced as a whole, but its other files (metrics, card...) are kept
            if the weights are the same.
        pretrained_cfg: Changes to the model's own configuration (`tag`, `mean`, `label_names`...).
        half: Store convolution and linear weights in half precision; BatchNorm stays in float32.

    Raises:
        FloatingPointError: A weight is not finite. An existing folder is left unchanged.
    """
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)
    if half:
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.half()
    check_weights(model.state_dict(), folder)

    def fill(new: Path) -> None:
        save_for_hf(
            model, str(new), safe_serialization=True,
            model_config={'pretrained_cfg': pretrained_cfg | (  # else timm may drop the names
                {'num_classes': model.num_classes} if 'label_names' in pretrained_cfg else {})},
            data_config={k: v for k, v in pretrained_cfg.items() if k in ('input_size', 'crop_pct')})
        shutil.copymode(new / 'config.json', new / WEIGHTS_FILE)  # safetensors creates it with mode 0600
        config = json.loads((new / 'config.json').read_text(encoding='utf-8'))
        if info := getattr(model, 'feature_info', None):  # timm sets no pool_size for a new input size
            _, *sides = config['pretrained_cfg']['input_size']
            config['pretrained_cfg']['pool_size'] = [math.ceil(side / info[-1]['reduction']) for side in sides]
        config['sha256'] = sha256_of(new / WEIGHTS_FILE)
        (new / 'config.json').write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
        if (folder / WEIGHTS_FILE).is_file() and sha256_of(folder / WEIGHTS_FILE) == config['sha256']:
            for file in folder.iterdir():
                if file.is_file() and not (new / file.name).exists():
                    shutil.copy(file, new)

    atomic_folder(folder, fill)


def check_colours(model: torch.nn.Module) -> None:
    """Refuse a model that does not take RGB images, as photographs are read.

    Raises:
        ValueError: It takes images of another number of channels.
    """
    if (channels := getattr(model, 'in_chans', 3)) != 3:
        raise ValueError(f'the model takes images of {counted(channels, "channel")}, but photographs have three')


def eval_transform(model: torch.nn.Module) -> Any:
    """timm's evaluation transform of PIL images for this model, from its own configuration.

    Raises:
        Any error of `check_colours`.
    """
    check_colours(model)
    return create_transform(**resolve_model_data_config(model), is_training=False)
