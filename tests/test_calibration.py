"""Merging with calibration inputs that are not finite, or whose squares overflow."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from merged_checkpoints import save_adapter
from peft import PeftModel, get_peft_model
from tiny_models import randomize_adapter, tiny_model

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, experts_report
from peft_moe_qlora.merge import calibration as module
from peft_moe_qlora.merge import merge_quantized
from peft_moe_qlora.merge.calibration import merge_layer
from peft_moe_qlora.merge.second_order import MergedExpert, quantize_second_order
from peft_moe_qlora.quantization import FourBitFormat, QuantizedStack

NUM_TOKENS, NUM_EXPERTS, CHOSEN = 96, 8, 2


def adapted(dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    model = get_peft_model(tiny_model(dtype=dtype), MoeQLoraConfig(r=4, **options)).eval()
    randomize_adapter(model)
    return model


def routed(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of a layer: hidden states, chosen experts and their weights."""
    chosen = torch.rand(NUM_TOKENS, NUM_EXPERTS).topk(CHOSEN).indices
    return torch.randn(NUM_TOKENS, 64, dtype=dtype), chosen, torch.rand(NUM_TOKENS, CHOSEN, dtype=dtype)


def merged(
    hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **options
) -> dict[str, QuantizedStack]:
    """The stacks of one layer, merged with these inputs."""
    model = adapted(hidden_states.dtype, **options)
    layer = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    merge_layer(layer, ["default"], hidden_states, top_k_index, top_k_weights)
    return {name: layer.stack(name) for name in ("gate_up_proj", "down_proj")}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["hidden states", "weights"])
def test_nonfinite_rows_are_ignored(value, place):
    """The result is the same as without these tokens."""
    hidden_states, chosen, weights = routed()
    is_bad = torch.arange(NUM_TOKENS) % 7 == 0
    expected = merged(hidden_states[~is_bad], chosen[~is_bad], weights[~is_bad])
    if place == "weights":
        weights[is_bad] = value
    else:
        hidden_states[is_bad, 3] = value
    found = merged(hidden_states, chosen, weights)
    counts = chosen[is_bad].flatten().bincount(minlength=NUM_EXPERTS).tolist()
    for name, stack in found.items():
        assert torch.equal(stack.codes, expected[name].codes)
        assert torch.equal(stack.block_absmax, expected[name].block_absmax)
        (note,) = stack.merge_notes
        assert note.startswith("28 of 192 rows of calibration inputs are not finite and were ignored (")
        assert {int(e): int(n) for n, e in re.findall(r"(\d+) of expert (\d+)", note)} == {
            expert: count for expert, count in enumerate(counts) if count
        }
        assert not expected[name].merge_notes


def test_all_rows_nonfinite():
    hidden_states, chosen, weights = routed()
    found = merged(hidden_states * torch.nan, chosen, weights)
    assert all("no rows are left" in stack.merge_notes[0] for stack in found.values())
    assert all(stack.fidelity.relative_error < 0.2 for stack in found.values())


@pytest.mark.parametrize("exponent", [-100, 100])
def test_rows_whose_squares_overflow_or_underflow(exponent):
    """The scale of the inputs does not matter."""
    hidden_states, chosen, weights = routed()
    options = {"target_modules": ["experts.gate_up_proj"]}
    expected = merged(hidden_states, chosen, weights, **options)["gate_up_proj"]
    found = merged(hidden_states * 2.0**exponent, chosen, weights, **options)["gate_up_proj"]
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.block_absmax, expected.block_absmax)
    assert not found.merge_notes


def test_activations_that_overflow_fp16():
    """The inputs are finite, the outputs of the gate are not."""
    hidden_states, chosen, weights = routed(torch.float16)
    hidden_states[5] *= 10_000
    assert hidden_states.isfinite().all()
    found = merged(hidden_states, chosen, weights)
    assert not found["gate_up_proj"].merge_notes
    assert found["down_proj"].merge_notes[0].startswith("2 of 192 rows")


def test_moments_that_cannot_be_factorized():
    """These experts are rounded to nearest, the others as usual."""
    stack = QuantizedStack.from_dense(torch.randn(4, 32, 64), False, FourBitFormat())
    inputs = torch.randn(4, 256, 64) * torch.linspace(0.1, 3, 64)
    moments = inputs.transpose(1, 2) @ inputs / 256

    def quantize(change: Callable[[torch.Tensor], None]) -> QuantizedStack:
        changed = moments.clone()
        change(changed)

        def of_expert(expert: int) -> MergedExpert:
            weight = stack.decode_expert(expert, torch.float32) + 0.1 * torch.sin(torch.arange(64.0))
            return MergedExpert(weight, changed[expert], torch.zeros(0, 64))

        return quantize_second_order(stack, of_expert, moments.mean(dim=0))

    def break_two(moments: torch.Tensor) -> None:
        moments[0] = torch.nan
        moments[2] = 5 + torch.eye(64)  # a matrix of second moments has its largest values on the diagonal
        moments[2].diagonal().fill_(1)

    def flatten_two(moments: torch.Tensor) -> None:
        moments[::2] = 1e6 * torch.eye(64)

    found, expected = quantize(break_two), quantize(lambda _: None)
    nearest = quantize(flatten_two)
    assert found.merge_notes == (
        "the Cholesky factorization of the inputs' second moments failed; "
        "experts 0, 2 were rounded to the nearest value",
    )
    assert torch.equal(found.codes[1::2], expected.codes[1::2])
    assert torch.equal(found.codes[::2], nearest.codes[::2])
    assert not torch.equal(found.codes[0], expected.codes[0])
    assert not expected.merge_notes


def with_infinities(monkeypatch) -> None:
    """One token in each call of a layer has a value that is not finite."""
    inputs = module._inputs

    def poisoned(layer, args, kwargs):
        hidden_states, chosen, weights = inputs(layer, args, kwargs)
        hidden_states = hidden_states.clone()
        hidden_states[9, 0] = torch.inf
        return hidden_states, chosen, weights

    monkeypatch.setattr(module, "_inputs", poisoned)


def test_ignored_rows_are_reported(monkeypatch):
    """Once, by path and expert, and in the report."""
    with_infinities(monkeypatch)
    with pytest.warns(RuntimeWarning, match="not finite") as warnings:
        model = adapted().merge_and_unload()
    (message,) = [str(warning.message) for warning in warnings if "not finite" in str(warning.message)]
    assert len(re.findall(r"layers\.[01]\.mlp\.experts\.\w+: 2 of 4096 rows .*?1 of expert \d", message)) == 4
    report = experts_report(model)
    for stack in report.stacks:
        note = f"{stack.path}.{stack.projection}: {stack.merge_notes[0]}"
        assert note in message
        assert note in str(report)


def test_ignored_rows_are_in_the_report_of_a_checkpoint_merge(monkeypatch, tmp_path):
    save_adapter(tmp_path, target_modules=["experts"])
    with_infinities(monkeypatch)
    with pytest.warns(RuntimeWarning, match="not finite"):
        report = merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progressbar=False)
    assert len(report.notes) == 4
    assert all(re.match(r"model\.layers\.[01]\.mlp\.experts\.\w+: 2 of 4096 rows", note) for note in report.notes)
