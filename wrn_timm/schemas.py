"""Checks of the JSON files that this package reads, one for each kind of file."""
from __future__ import annotations

import dataclasses
import json
import re
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ['check_config', 'check_detector', 'check_metrics', 'check_scan', 'read_json',
           'read_record']


@dataclasses.dataclass(frozen=True)
class _Field:
    """Allowed values of a field.

    Attributes:
        fits: Function that tells whether a value is allowed.
        words: Description of the allowed values.
        missing: Whether the field may be missing.
        null: Whether the value may be null.
    """
    fits: Callable[[Any], bool]
    words: str
    missing: bool = True
    null: bool = True

    def but(self, **changes: bool) -> _Field:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


_Schema = Mapping[str, _Field]


def read_json(file: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read the object in a JSON file.

    Args:
        file: Path of the file.
        check: Function that raises ValueError if the object is not valid for its kind of file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not valid JSON, not an object, or has an invalid field. The message names file and
            field.
    """
    try:
        found = json.loads(file.read_text(encoding='utf-8'))
        if not isinstance(found, dict):
            raise ValueError('it is not a JSON object')
        check(found)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{file} is damaged: {e}') from e
    return found


def _check_fields(found: dict[str, Any], schema: _Schema, above: str = '') -> None:
    """Refuse an object with an invalid field; fields that are not in the schema are ignored."""
    for name, field in schema.items():
        value = found.get(name)
        if name not in found:
            fault = '' if field.missing else 'missing'
        elif value is None:
            fault = '' if field.null else 'null'
        else:
            fault = '' if field.fits(value) else reprlib.repr(value)
        if fault:
            raise ValueError(f'its {above}{name} is {fault}; it must be {field.words}')


def _number(low: float, high: float, whole: bool = False) -> _Field:
    kinds = int if whole else (int, float)
    return _Field(lambda v: isinstance(v, kinds) and not isinstance(v, bool) and low <= v <= high,
                 f'a {"whole " * whole}number from {low:g} to {high:g}')


def _list(field: _Field, words: str) -> _Field:
    return _Field(lambda v: isinstance(v, list) and all(map(field.fits, v)), words)


_TEXT = _Field(lambda v: isinstance(v, str), 'a string')
_TEXTS = _list(_TEXT, 'a list of strings')
_NAMES = _Field(lambda v: _TEXT.fits(v) or _TEXTS.fits(v), 'a name or a list of names')
_LEFT_OUT = _Field(lambda v: False, 'left out')
_OBJECT = _Field(lambda v: isinstance(v, dict), 'an object')
_SHA256 = _Field(lambda v: isinstance(v, str) and re.fullmatch('[0-9a-f]{64}', v) is not None, '64 hexadecimal digits')
_CLASSES = _number(0, 1_000_000, whole=True).but(null=False)
_SIDE = _number(1, 4096, whole=True)
_SIZE = _Field(lambda v: isinstance(v, list) and len(v) == 3 and all(map(_SIDE.fits, v)),
              'channels, height and width, whole numbers from 1 to 4096')

# The fields of `pretrained_cfg` in the `config.json` of a weights folder that timm and this package read.
_PRETRAINED_CFG: _Schema = {
    'tag': _TEXT, 'license': _TEXT, 'num_classes': _CLASSES, 'label_names': _TEXTS,
    'input_size': _SIZE.but(null=False), 'test_input_size': _SIZE, 'min_input_size': _SIZE,
    'fixed_input_size': _Field(lambda v: isinstance(v, bool), 'true or false'),
    'mean': _list(_number(-1000, 1000), 'a list of numbers from -1000 to 1000'),
    'std': _list(_number(1e-6, 1000), 'a list of numbers from 1e-06 to 1000'),
    'interpolation': _Field(
        lambda v: v in ('nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos', 'random'),
        'nearest, bilinear, bicubic, box, hamming, lanczos or random'),
    'crop_pct': _number(0.1, 2), 'test_crop_pct': _number(0.1, 2), 'crop_mode': _TEXT,
    'label_offset': _number(0, 1000, whole=True), 'first_conv': _NAMES, 'classifier': _NAMES,
    'state_dict': _LEFT_OUT,
}

_MODEL_ARGS: _Schema = {
    'num_classes': _CLASSES, 'in_chans': _number(1, 64, whole=True), 'drop_rate': _number(0, 1),
    'drop_path_rate': _number(0, 1), 'features_only': _LEFT_OUT,
}
_CONFIG: _Schema = {
    'architecture': _TEXT.but(null=False), 'num_classes': _CLASSES, 'label_names': _TEXTS, 'sha256': _SHA256,
    'model_args': _OBJECT.but(null=False), 'pretrained_cfg': _OBJECT.but(null=False),
}
_DETECTOR: _Schema = {
    'detect': _OBJECT.but(missing=False, null=False), 'sha256': _SHA256, 'threshold': _number(0, 1),
    'classes': _Field(lambda v: _TEXTS.fits(v) and len(v) > 0, 'a list of class names', False, False),
}
_SCAN: _Schema = {
    'split': _TEXT, 'bad': _TEXTS, 'summary': _TEXTS, 'tested_on': _TEXT,
    'leaks': _list(_Field(lambda v: _TEXTS.fits(v) and len(v) == 2, ''), 'a list of pairs of paths'),
}
_METRICS: _Schema = {'top1': _number(0, 100)}


def check_config(config: dict[str, Any]) -> None:
    """Refuse a `config.json` of a weights folder with invalid or contradictory fields.

    Raises:
        ValueError: A field is invalid (the message says what it must be), the number of class names is not the number
            of classes, or the length of `mean` or `std` is not the number of channels.
    """
    _check_fields(config, _CONFIG)
    _check_fields(config.get('model_args', {}), _MODEL_ARGS, 'model_args.')
    cfg = config.get('pretrained_cfg', config)  # older files have everything at the top level
    _check_fields(cfg, _PRETRAINED_CFG, 'pretrained_cfg.' * ('pretrained_cfg' in config))
    classes = config.get('num_classes', cfg.get('num_classes'))
    names = config.get('label_names', cfg.get('label_names'))
    if names and classes and len(names) != classes:
        raise ValueError(f'it names {len(names)} classes; its num_classes is {classes}')
    channels = cfg.get('input_size', (3,))[0]
    for name in ('mean', 'std'):
        if cfg.get(name) and len(cfg[name]) not in (1, channels):
            raise ValueError(f'its {name} has {len(cfg[name])} values; its input_size has {channels} channels')


def check_detector(found: dict[str, Any]) -> None:
    """Refuse an invalid `detector.json` of a finished detector."""
    _check_fields(found, _DETECTOR)


def check_scan(found: dict[str, Any]) -> None:
    """Refuse an invalid `scan.json` of a fine-tuning run."""
    _check_fields(found, _SCAN)


def check_metrics(found: dict[str, Any]) -> None:
    """Refuse a `metrics.json` with an invalid accuracy."""
    _check_fields(found, _METRICS)


def read_record(file: Path) -> dict[str, Any]:
    """Read a JSON file of a run, such as `recipe.json` with its settings and environment.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged.
    """
    try:
        return read_json(file, lambda found: None)
    except ValueError as e:
        raise ValueError(f'{e}. Restore it, or begin a new run') from e


def environments(record: dict[str, Any]) -> list[dict[str, str]]:
    """The environments in a `recipe.json`: where the run began, and others in which it was resumed."""
    return [record.get('environment', {}), *record.get('resumed', ())]
