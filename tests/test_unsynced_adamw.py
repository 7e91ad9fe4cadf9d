"""The 8-bit AdamW without synchronization equals bitsandbytes' own bit by bit."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from torch import nn

from peft_moe_qlora.training import UnsyncedAdamW8bit, unsynced_adamw


def parameters(device: str) -> list[nn.Parameter]:
    """Large ones and a small one, whose state is kept in 32 bits; the last gets no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4, 512), (8, 512, 4), (16, 16), (64, 128)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in trained[:-1]:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        optimizer.step()
        optimizer.zero_grad()


def test_steps_and_state(device):
    found, expected = parameters(device), parameters(device)
    optimizers = [
        kind([{"params": trained[:2], "lr": 1e-2}, {"params": trained[2:]}], weight_decay=0.1)
        for kind, trained in ((UnsyncedAdamW8bit, found), (bitsandbytes.optim.AdamW8bit, expected))
    ]
    for optimizer, trained in zip(optimizers, (found, expected)):
        steps(optimizer, trained, 0, 3)
        state = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(state)
        steps(optimizer, trained, 3, 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    states = [[optimizer.state[one] for one in trained] for optimizer, trained in zip(optimizers, (found, expected))]
    for ours, theirs in zip(*states):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])) for name in ours)
    assert states[0][0]["state1"].dtype == torch.uint8
    assert not states[0][-1]


@pytest.mark.parametrize("is_paged", [False, True])
def test_waits_once_per_step_if_states_are_paged(device, is_paged, monkeypatch):
    """And prefetches them; these are too small to be paged without a GPU."""
    trained, waits, prefetched = parameters(device), [], []
    optimizer = UnsyncedAdamW8bit(trained, lr=1e-2, is_paged=is_paged)
    monkeypatch.setattr(unsynced_adamw, "sync_gpu", waits.append)
    monkeypatch.setattr(optimizer, "prefetch_state", prefetched.append)
    steps(optimizer, trained, 0, 2)
    assert [id(one) for one in waits] == [id(trained[-2])] * 2 * is_paged
    assert [id(one) for one in prefetched] == 2 * [id(one) for one in trained[:-1]]


def test_closure():
    trained = parameters("cpu")
    optimizer = UnsyncedAdamW8bit(trained, lr=1e-2)

    def closure() -> torch.Tensor:
        loss = sum(one.square().sum() for one in trained)
        loss.backward()
        return loss

    before = [one.detach().clone() for one in trained]
    assert optimizer.step(closure) > 0
    assert all((one < old).sum() + (one > old).sum() > 0 for one, old in zip(trained, before))
