"""What stays in memory, counted: every storage that a forward pass makes and that outlives it."""
import pytest
import timm
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wrn_timm  # noqa: F401


class Made(TorchDispatchMode):
    """Remembers, without keeping them, the storages that operations return."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes_alive(self):
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
@pytest.mark.parametrize('name,kwargs', [('wrn16_2', {}), ('wrn16_2', dict(out_indices=(1,))), ('wrn18_1_5', {})])
@torch.no_grad()
def test_features_only_keeps_what_it_returns_and_no_more(name, kwargs, feature_cls):
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, **kwargs).eval()
    x = torch.randn(1, 3, 64, 64)
    with Made() as made:
        features = model(x)
    returned = {f.untyped_storage()._cdata: f.untyped_storage().nbytes() for f in tree_leaves(features)}
    assert 0 < made.bytes_alive() == sum(returned.values())
    del features
    assert made.bytes_alive() == 0


def activation_bytes(model, x):
    """Bytes that a training step keeps from the forward pass for the backward."""
    with Made() as made:
        loss = model(x).square().mean()
    kept = made.bytes_alive()
    loss.backward()
    return kept


@pytest.mark.parametrize('name,kwargs', [('wrn16_2', {}), ('wrn28_2', {}), ('wrn28_2', dict(features_only=True))])
def test_grad_checkpointing_halves_activation_memory(name, kwargs):
    model, x = timm.create_model(name, **kwargs).train(), torch.randn(2, 3, 32, 32)

    def forward(x):
        out = model(x)
        return out[-1] if kwargs else out

    plain = activation_bytes(forward, x)
    model.set_grad_checkpointing()
    assert activation_bytes(forward, x) < plain / 2
