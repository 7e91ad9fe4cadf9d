"""Losses of 50 steps are those of plain layers in fp32, for every combination of the settings of a step."""

from __future__ import annotations

from functools import cache, partial
from itertools import product

import pytest
import torch
from prepared_models import POLICIES, batch, train, trained_model

from peft_moe_qlora.training import graphs_report, layer_runner
from peft_moe_qlora.training.compiled import compiled_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where Liger's kernels run; without a GPU in Triton's interpreter."""

SWITCHES = ("compile_layers", "cuda_graphs", "liger_head")
PLAIN = (False, False, False, False)
COMBINATIONS = [one for one in product(POLICIES, *[(False, True)] * len(SWITCHES)) if one != PLAIN]


def name(combination: tuple) -> str:
    policy, *switches = combination
    return "-".join([str(policy), *(switch for switch, is_on in zip(SWITCHES, switches) if is_on)])


def losses(**options) -> tuple[torch.Tensor, str]:
    """Losses with two alternating lengths, and the report on graphs."""
    batches = [batch(DEVICE, length, seed) for seed, length in enumerate([12, 8] * 25)]
    model = trained_model(DEVICE, **options)
    return torch.stack(train(model, batches)[0]), graphs_report(model)


@cache
def plain_losses() -> torch.Tensor:
    return losses(use_gradient_checkpointing=False)[0]


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("device", [DEVICE])
@pytest.mark.parametrize("combination", COMBINATIONS, ids=name)
def test_losses_match_plain_layers(device, combination, request, monkeypatch):
    expected = plain_losses()
    assert expected.unique().numel() == len(expected)
    policy, compile_layers, cuda_graphs, has_liger_head = combination
    if device == "cpu":  # inductor takes minutes for all of them
        monkeypatch.setattr(layer_runner, "compiled_forward", partial(compiled_forward, backend="aot_eager"))
    if has_liger_head:
        liger = request.getfixturevalue("liger")
        liger.apply_liger_kernel_to_qwen3_moe(rms_norm=False, rope=False, swiglu=False)
    found, report = losses(use_gradient_checkpointing=policy, compile_layers=compile_layers, cuda_graphs=cuda_graphs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert report == ("4 graphs of layers, for 2 input shapes" if cuda_graphs else "Layers run without CUDA graphs.")
