"""accelerate, with the device and the precision of each run."""
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
    """Have an Accelerator of the caller go on afterwards with its own gradient accumulation, which all share."""
    before = GradientState().plugin_kwargs
    try:
        yield
    finally:
        GradientState().plugin_kwargs = before


class RunAccelerator(Accelerator):
    """An Accelerator whose device and precision are those of one run.

    accelerate fixes both for as long as the process lives. A notebook that fine-tunes on the CPU and then on the GPU,
    or in bfloat16 and then in float32, needs others for each run. The processes that `torchrun` or `accelerate launch`
    started share one kind of device.

    Networks compute in this precision within `autocast()` only; `prepare` leaves their forward pass as it is.

    Args:
        device: 'cpu' or 'cuda'.
        precision: Of `autocast()`, as `resolve_precision` takes it. With 'fp16', `backward` scales the loss.
        **kwargs: Of `accelerate.Accelerator`.

    Raises:
        ValueError: The device is another, or torch finds no GPU; or what `resolve_precision` raises.
    """

    def __init__(self, device: str, precision: Precision = 'no', **kwargs: Any):
        if device not in ('cpu', 'cuda') or (device == 'cuda' and not torch.cuda.is_available()):
            raise ValueError(f"device is {device!r}; choose 'cpu', or 'cuda' on a machine where torch finds a GPU")
        self._device, self._precision = torch.device(device), resolve_precision(precision, device)
        several = 'LOCAL_RANK' in os.environ  # by which accelerate goes too
        super().__init__(cpu=several and device == 'cpu', **kwargs)
        if several:
            self._device = self.state.device  # the GPU of this process
        self.native_amp = False  # in whatever precision an earlier Accelerator of the process was
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
    """The device, the precision and the processes of a run."""
    return RunAccelerator(
        device, config.precision, gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True, dispatch_batches=False, non_blocking=True),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.train != 'all')])
