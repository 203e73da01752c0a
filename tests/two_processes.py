"""Started by torchrun: two_processes.py FILE OPTIONS.

The first process saves the gradients of one batch, shared by the processes, with BatchNorm frozen, to FILE. Then they
train with these options.
"""
import os
import sys

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import wrn_timm  # noqa: F401
from wrn_timm.cli import train
from wrn_timm.data.augment import TrivialAugment
from wrn_timm.data.on_device import DeviceLoader
from wrn_timm.data.small_sets import load


def gradients(rank: int, world: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model('wrn16_1').eval()
    forward = DistributedDataParallel(model) if world > 1 else model
    loader = DeviceLoader(load('synthetic', '', train=True), 64, 'cpu', cutout=8, augment=TrivialAugment(),
                          rank=rank, world_size=world)
    images, labels = next(loader.epoch(0))
    F.cross_entropy(forward(images), labels).backward()
    return [p.grad for p in model.parameters()]


if __name__ == '__main__':
    dist.init_process_group('gloo')
    rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    found = gradients(rank, world)
    if rank == 0:
        torch.save(found, sys.argv[1])
    status = train.main(sys.argv[2:])
    dist.destroy_process_group()
    sys.exit(status)
