"""Wide Residual Networks for timm: importing this package registers every `wrn*` model.

    import timm, wrn_timm
    model = timm.create_model('wrn16_1.cifar10', pretrained=True)

`wrn_timm.finetune`, `predict`, `FinetuneConfig` and `Machine` are imported on first use, because they need the extra
`[train]`, which the models do not. The same holds for `open_detector`, `find_objects`, `train_detector` and
`DetectConfig`, which need the extra `[detect]`.
"""
import importlib
import importlib.util
from typing import Any

from . import wrn_imagenet  # noqa: F401  (registers its models)
from .checkpoints import convert_checkpoint
from .weights import list_weights
from .wrn import WideResNet, register_wrn

__version__ = '0.1.0'
__all__ = ['WideResNet', 'convert_checkpoint', 'list_weights', 'register_wrn']

_TRAINING = {  # imported on first use, so not in __all__
    'FinetuneConfig': 'recipes', 'Machine': 'train.machine', 'finetune': 'train.finetune', 'predict': 'train.predict'}
_DETECTION = {
    'DetectConfig': 'recipes', 'find_objects': 'train.find_objects', 'open_detector': 'detection',
    'train_detector': 'train.detector'}


def __getattr__(name: str) -> Any:
    places = _TRAINING | _DETECTION
    if name not in places:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    try:
        return getattr(importlib.import_module(f'.{places[name]}', __name__), name)
    except ModuleNotFoundError as e:
        extra = 'detect' if name in _DETECTION else 'train'
        raise ImportError(
            f'wrn_timm.{name} needs {e.name}, which is not installed; in a clone of wrn_timm: '
            f'pip install -e ".[{extra}]"') from e


def __dir__() -> list[str]:
    there = [names for names, needed in ((_TRAINING, 'accelerate'), (_DETECTION, 'pycocotools'))
             if importlib.util.find_spec(needed)]
    return sorted([*globals(), *(name for names in there for name in names)])
