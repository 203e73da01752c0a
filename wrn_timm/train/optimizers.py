"""The optimizer of a recipe."""
from __future__ import annotations

import functools
from typing import Any

import timm.optim
import torch
from timm.optim import create_optimizer_v2, muon

from ..recipes import Recipe
from .machine import fast_bfloat16

__all__ = ['Muon', 'create_optimizer']


class Muon(timm.optim.Muon):
    """timm's Muon, orthogonalising in float32 on devices where bfloat16 is slow.

    Args:
        params: As in timm's Muon.
        **kwargs: As in timm's Muon.
    """

    def __init__(self, params: Any, **kwargs: Any):
        super().__init__(params, **kwargs)
        device = self.param_groups[0]['params'][0].device
        self.dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32

    def step(self, closure: Any = None) -> Any:
        """Take a step; the dtype is patched into the function that timm's `step` calls without one."""
        orthogonalise = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = functools.partial(orthogonalise, dtype=self.dtype)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = orthogonalise


def create_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum for all parameters, or Muon for the convolutions and AdamW for the rest.

    With Muon, the stem also goes to AdamW, like the classifier: neither maps features to features. So do depthwise
    convolutions, which are no matrices. Only the weights that Muon updates are decayed.
    """
    if recipe.opt == 'nesterov':
        return create_optimizer_v2(
            model, 'nesterov', lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum,
            filter_bias_and_bn=not recipe.decay_norm, fused=True)
    stem = model.pretrained_cfg['first_conv']
    kernels = [m.weight for name, m in model.named_modules()
               if isinstance(m, torch.nn.Conv2d) and name != stem and m.weight.shape[1] > 1]
    known = {id(p) for p in kernels}
    rest = [p for p in model.parameters() if id(p) not in known]
    return Muon(
        [{'params': kernels, 'use_fallback': False},
         {'params': rest, 'use_fallback': True, 'weight_decay': 0., 'nesterov': False}],  # else it would be NAdamW
        lr=recipe.lr, weight_decay=recipe.weight_decay, momentum=recipe.momentum, nesterov=True,
        adjust_lr_fn='original', fallback_lr_scale=recipe.adamw_scale)
