"""An Accelerator whose device and precision can change from run to run."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.state import GradientState

from ..recipes import FinetuneConfig, Precision
from .machine import autocast, resolve_precision

__all__ = ['RunAccelerator', 'kept_accumulation', 'make_accelerator']


@contextlib.contextmanager
def kept_accumulation() -> Iterator[None]:
    """Restore the caller's gradient accumulation settings, which all Accelerators share, on exit."""
    before = GradientState().plugin_kwargs
    try:
        yield
    finally:
        GradientState().plugin_kwargs = before


class RunAccelerator(Accelerator):
    """An Accelerator with its own device and precision.

    accelerate fixes both for the lifetime of a process, but a notebook may fine-tune on the CPU and then on the GPU, or
    in bfloat16 and then in float32. The processes started by `torchrun` or `accelerate launch` share one kind of
    device.

    Networks compute in this precision only within `autocast()`; `prepare` does not change their forward pass.

    Args:
        device: 'cpu' or 'cuda'.
        precision: Precision of `autocast()`, as in `resolve_precision`. With 'fp16', `backward` scales the loss.
        **kwargs: Arguments of `accelerate.Accelerator`.

    Raises:
        ValueError: The device is neither 'cpu' nor 'cuda', or torch finds no GPU.
        Any error of `resolve_precision`.
    """

    def __init__(self, device: str, precision: Precision = 'no', **kwargs: Any):
        if device not in ('cpu', 'cuda') or (device == 'cuda' and not torch.cuda.is_available()):
            raise ValueError(f"device is {device!r}; choose 'cpu', or 'cuda' on a machine where torch finds a GPU")
        self._device, self._precision = torch.device(device), resolve_precision(precision, device)
        several = 'LOCAL_RANK' in os.environ  # accelerate checks it too
        super().__init__(cpu=several and device == 'cpu', **kwargs)
        if several:
            self._device = self.state.device  # the GPU of this process
        self.native_amp = False  # whatever the precision of earlier Accelerators in this process
        self.scaler = torch.amp.GradScaler(device) if self._precision == 'fp16' else None

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def mixed_precision(self) -> str:
        return self._precision

    def autocast(self) -> torch.autocast:
        """A context in which networks compute in the run's precision."""
        return autocast(self._device, self._precision)


def make_accelerator(config: FinetuneConfig, device: str) -> Accelerator:
    """The Accelerator of a fine-tuning run."""
    return RunAccelerator(
        device, config.precision, gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False, non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.train != 'all')])
