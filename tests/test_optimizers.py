"""Optimizers on factors of experts: a stack is stepped like its matrices, or the page lists the difference."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import optimizer_table
import pytest
import torch
from optimizer_table import KNOWN, ONE_CLIP, SAME, Known
from peft import get_peft_model
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig

SHAPE = (4, 16, 256)
"""Each expert has 4,096 values, the minimum for which bitsandbytes and torchao quantize the state."""


def available(known: Known) -> Known:
    package = known.path.partition(".")[0]
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return known


def steps(known: Known, start: torch.Tensor, gradients: list[torch.Tensor], **options) -> torch.Tensor:
    """A stack after some steps."""
    parameter = nn.Parameter(start.clone())
    optimizer = known.make([parameter], **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def both_ways(known: Known, shape: tuple[int, ...], **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The results for a stack, and for separate optimizers of its matrices."""
    start, gradients = 0.1 * torch.randn(shape), [torch.randn(shape) for _ in range(3)]
    of_stack = steps(known, start, gradients, **options)
    of_matrices = [
        steps(known, start[expert], [gradient[expert] for gradient in gradients], **options)
        for expert in range(shape[0])
    ]
    assert not torch.equal(of_stack, start)
    return of_stack, torch.stack(of_matrices)


@pytest.mark.parametrize("known", [known for known in KNOWN if known.stacks == SAME], ids=lambda known: known.title)
def test_stack_is_stepped_like_its_matrices(known):
    of_stack, of_matrices = both_ways(available(known), SHAPE)
    assert torch.equal(of_stack, of_matrices)


@pytest.mark.parametrize("known", [known for known in KNOWN if known.stacks != SAME], ids=lambda known: known.title)
def test_updates_that_depend_on_the_size_of_a_stack(known):
    """In most cases the update, by a small amount."""
    of_stack, of_matrices = both_ways(known, SHAPE)
    assert not torch.equal(of_stack, of_matrices)
    torch.testing.assert_close(of_stack, of_matrices, rtol=0, atol=1e-2)


def test_adafactor_differs_by_its_clipping_only():
    known = next(known for known in KNOWN if known.optim == "adafactor")
    assert known.stacks == ONE_CLIP
    of_stack, of_matrices = both_ways(known, SHAPE, clip_threshold=1e9)
    assert torch.equal(of_stack, of_matrices)


def test_blocks_that_extend_over_experts():
    """Two experts then share scales of 8-bit states, which changes values by the rounding of a state."""
    known = next(known for known in KNOWN if known.optim == "adamw_8bit")
    of_stack, of_matrices = both_ways(known, (4, 16, 264))
    torch.testing.assert_close(of_stack, of_matrices, rtol=0, atol=2e-3)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.title)
def test_bytes_of_state(known):
    """At the size of real factors, where scalars and tables are negligible."""
    available(known)
    parameter = nn.Parameter(torch.randn(8, 16, 2048))
    optimizer = known.make([parameter])
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    total = sum(tensor.numel() * tensor.element_size() for tensor in state_tensors(optimizer.state[parameter]))
    assert total / parameter.numel() == pytest.approx(known.state_bytes, abs=0.005)


def state_tensors(value: object, name: str = "") -> Iterator[torch.Tensor]:
    """Plain tensors of a state, also inside of subclasses, without tables of code values."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from state_tensors(entry, str(key))
    elif hasattr(value, "__tensor_flatten__"):
        for key in value.__tensor_flatten__()[0]:
            yield from state_tensors(getattr(value, key), key)
    elif isinstance(value, torch.Tensor) and not name.startswith("qmap") and value.dim():
        yield value


def with_gradients() -> nn.Module:
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, target_modules="all-linear")).train()
    randomize_adapter(model)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    return model


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def projecting(package: str) -> type[torch.optim.Optimizer]:
    """An optimizer like GaLore and APOLLO, whose own errors only mention shapes."""

    def step(self) -> None:
        raise RuntimeError("t() expects a tensor with <= 2 dimensions")

    methods = {"__module__": f"{package}.adamw", "step": step}
    return type("AdamW", (torch.optim.AdamW,), methods)


@pytest.mark.parametrize("package", ["galore_torch", "apollo_torch"])
def test_projections_of_stacks_are_rejected(package):
    model = with_gradients()
    before = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    optimizer = projecting(package)([{"params": trained(model).values(), "rank": 2}])
    message = (
        rf"{package}'s AdamW supports only 2-D factors, but the factors of .*experts\.gate_up_proj are 3-D stacks"
    )
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trained(model).items())


def test_projections_of_linear_layers_are_accepted():
    """As a Trainer groups them: experts are in the group without projection."""
    model = with_gradients()
    named = trained(model).items()
    groups = [
        {"params": [parameter for _, parameter in named if parameter.dim() == 2], "rank": 2},
        {"params": [parameter for _, parameter in named if parameter.dim() == 3]},
    ]
    with pytest.raises(RuntimeError, match="t\\(\\) expects"):  # its own step is reached
        projecting("galore_torch")(groups).step()


def test_muon_rejects_stacks():
    with pytest.raises(ValueError, match="Muon only supports 2D"):
        torch.optim.Muon(trained(with_gradients()).values())


def test_page_is_up_to_date():
    assert optimizer_table.PAGE.read_text(encoding="utf-8").startswith(optimizer_table.documentation())
