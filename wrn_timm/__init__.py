"""Wide Residual Networks for timm: importing this package registers every `wrn*` model.

    import timm, wrn_timm
    model = timm.create_model('wrn16_1.cifar10', pretrained=True)
"""
from . import wrn_imagenet  # noqa: F401  (registers its models)
from .checkpoints import convert_checkpoint
from .weights import list_weights
from .wrn import WideResNet, register_wrn

__version__ = '0.1.0'
__all__ = ['WideResNet', 'convert_checkpoint', 'list_weights', 'register_wrn']
