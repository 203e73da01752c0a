"""What a run computes on."""
from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from .precision import Precision, resolve_precision

__all__ = ['accelerator_on', 'fused']

_FUSED = ('sgd', 'momentum', 'nesterov', 'adam', 'adamw')


def accelerator_on(device: str, precision: Precision = 'no', **kwargs: Any) -> Accelerator:
    """accelerate on this device, whatever an earlier run of this process was on.

    Args:
        device: 'cpu' or 'cuda'.
        precision: Of `accelerator.autocast()`, as `resolve_precision` takes it.
        **kwargs: Of `accelerate.Accelerator`.

    Raises:
        ValueError: The device is another, or torch finds no GPU.
    """
    if device not in ('cpu', 'cuda') or (device == 'cuda' and not torch.cuda.is_available()):
        raise ValueError(f"device is {device!r}; choose 'cpu', or 'cuda' on a machine where torch finds a GPU")
    AcceleratorState._reset_state(reset_partial_state=int(os.environ.get('WORLD_SIZE', 1)) == 1)
    return Accelerator(cpu=device == 'cpu', mixed_precision=resolve_precision(precision, device), **kwargs)


def fused(opt: str) -> dict[str, bool]:
    """The option of timm's `create_optimizer_v2` that updates in one pass over memory, where this optimiser has it."""
    return {'fused': True} if opt in _FUSED else {}
