"""Rounding to 4 bits that minimizes the error of the outputs for the calibration inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, experts_report
from peft_moe_qlora.merge.calibration import random_token_ids
from peft_moe_qlora.merge.second_order import (
    MergedExpert,
    choose_scales,
    quantize_second_order,
    round_second_order,
)
from peft_moe_qlora.merge.unmerged import kl_divergence
from peft_moe_qlora.quantization import FourBitFormat, QuantizedStack, code_values

STORAGES = [FourBitFormat(), FourBitFormat("fp4", 32), FourBitFormat("nf4", 128, double_quant=True)]


def randn(*shape: int, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def second_moment(features: int, rank: int, experts: int = 1) -> torch.Tensor:
    """`(E, in, in)` of inputs that are large in a few directions."""
    inputs = randn(experts, 256, rank) @ randn(experts, rank, features, seed=1) + 0.1 * randn(256, features, seed=2)
    return inputs.transpose(1, 2) @ inputs / 256


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_nearest_codes_equal_bitsandbytes(storage, device):
    weight = randn(1, 48, 64, device=device)
    stack = QuantizedStack.from_dense(weight, False, storage)
    again = QuantizedStack.from_dense(torch.zeros_like(weight), False, storage)
    scales = weight.abs().view(-1, storage.blocksize).amax(dim=1)
    of_weights = scales.repeat_interleave(storage.blocksize).view(48, 64)
    again.set_scales(0, scales)
    again.set_codes(0, storage.nearest(weight[0], of_weights))
    assert torch.equal(again.decode(torch.float32), stack.decode(torch.float32))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("scale", [1.5, 1e-30, 0.0, -0.0, -1e-30, -0.7])
def test_nearest_codes_are_nearest_for_any_scale(quant_type, scale, device):
    """Among all 16. 8-bit scales become negative if they are small compared with others of their group."""
    storage = FourBitFormat(quant_type)
    weights = (abs(scale) or 1.0) * randn(2000, device=device)
    values = scale * code_values(quant_type, weights.device)
    codes = storage.nearest(weights, torch.full_like(weights, scale))
    least = (weights[:, None] - values).abs().amin(dim=1)
    torch.testing.assert_close((weights - values[codes.int()]).abs(), least, rtol=1e-6, atol=1e-6 * abs(scale))


def test_negative_scales_in_8_bits():
    """Blocks of one group with very different sizes: codes fit the stored scales."""
    weight = randn(1, 64, 64) * torch.tensor([1e-3] * 60 + [10.0] * 4)[:, None]
    stack = QuantizedStack.from_dense(weight, False, FourBitFormat(double_quant=True))
    merged = quantize_second_order(
        stack, lambda _: MergedExpert(weight[0], torch.zeros(64, 64), torch.zeros(0, 64)), torch.zeros(64, 64)
    )
    scales = merged.scales(slice(0, 1))[0]
    assert (scales < 0).any()
    values = scales[:, None] * code_values("nf4", torch.device("cpu"))
    least = (weight[0][:, :, None] - values[:, None]).abs().amin(dim=2)
    torch.testing.assert_close((merged.decode_expert(0, torch.float32) - weight[0]).abs(), least)


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_isotropic_inputs_give_the_nearest_codes(storage, device):
    weights = randn(2, 24, 96, device=device)
    scales = torch.full_like(weights, 2.5)
    codes, is_nearest = round_second_order(weights, scales, torch.eye(96, device=device).expand(2, 96, 96), storage)
    assert not is_nearest.any()
    assert torch.equal(codes, storage.nearest(weights, scales))


@pytest.mark.parametrize("features", [64, 130, 300])
def test_error_of_the_outputs_decreases(features, device):
    """By the definition of the error, for every expert."""
    storage = FourBitFormat()
    weights = randn(3, 32, features, device=device)
    scales = weights.abs().amax(dim=2, keepdim=True).expand_as(weights)
    moments = second_moment(features, 8, experts=3).to(device) + 0.01 * torch.eye(features, device=device)
    table = code_values("nf4", torch.device(device))

    def cost(codes: torch.Tensor) -> torch.Tensor:
        error = table[codes.int()] * scales - weights
        return torch.einsum("eoi,eij,eoj->e", error, moments, error)

    nearest = cost(storage.nearest(weights, scales))
    found = cost(round_second_order(weights, scales, moments, storage)[0])
    assert (found < 0.5 * nearest).all()


def test_scales_are_the_best_of_those_tried():
    matrix = randn(16, 128)
    matrix[0, 0] = 30.0  # a weight so large that clipping it may be better for its block
    storage = FourBitFormat()
    largest = matrix.view(-1, 64).abs().amax(dim=1)
    before = largest * 0.97

    def error(scales: torch.Tensor) -> torch.Tensor:
        stack = QuantizedStack.from_dense(matrix[None], False, storage)
        stack.set_scales(0, scales)
        stack.set_codes(0, storage.nearest(matrix, scales.repeat_interleave(64).view_as(matrix)))
        return (stack.decode_expert(0, torch.float32) - matrix).view(-1, 64).square().sum(dim=1)

    found = error(choose_scales(matrix, before, storage))
    assert (found <= error(largest)).all()
    assert (found <= error(before)).all()
    assert found.sum() < 0.99 * error(largest).sum()


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True])
# blocks that end inside a row, an odd number of weights, a square
@pytest.mark.parametrize("shape", [(3, 40, 24), (2, 7, 9), (2, 64, 64)], ids=str)
def test_stack_without_a_delta_is_unchanged(storage, is_transposed, shape, device):
    stack = QuantizedStack.from_dense(randn(*shape, device=device), is_transposed, storage)
    features = stack.in_features

    def merged(expert: int) -> MergedExpert:
        weight = stack.decode_expert(expert, torch.float32)
        moment = second_moment(features, 3)[0].to(device) * (expert > 0)  # the first expert has no tokens
        return MergedExpert(weight.T if is_transposed else weight, moment, torch.zeros(0, features, device=device))

    found = quantize_second_order(stack, merged, second_moment(features, 3)[0].to(device))
    assert found.fidelity.relative_error < (0.02 if storage.double_quant else 1e-6)
    if not storage.double_quant:
        torch.testing.assert_close(found.decode(torch.float32), stack.decode(torch.float32))


def test_no_tokens():
    """All directions then have the same weight, except for those that the adapter reads."""
    stack = QuantizedStack.from_dense(randn(2, 32, 64), False, FourBitFormat())
    delta = 0.5 * randn(32, 64, seed=3)

    def merged(expert: int) -> MergedExpert:
        weight = stack.decode_expert(expert, torch.float32) + delta
        return MergedExpert(weight, torch.zeros(64, 64), torch.linalg.qr(delta).R[:4])

    found = quantize_second_order(stack, merged, torch.zeros(64, 64))
    assert 0.01 < found.fidelity.relative_error < 0.2


def test_nonfinite_weights_are_rejected():
    stack = QuantizedStack.from_dense(randn(1, 8, 64), False, FourBitFormat())
    moment = torch.eye(64)
    with pytest.raises(ValueError, match="NaNs or infinite values detected in the merged weights"):
        quantize_second_order(
            stack, lambda _: MergedExpert(torch.full((8, 64), torch.inf), moment, torch.zeros(0, 64)), moment
        )


def load(directory, dtype: torch.dtype = torch.float32) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)
    return PeftModel.from_pretrained(base, directory / "adapter").eval()


def test_divergence_is_half_that_of_rounding_to_nearest(trained):
    """The cost of requantizing a trained adapter; no text is given."""
    directory, ids = trained
    model = load(directory)
    live = logits(model, ids)
    with model.disable_adapter():
        assert kl_divergence(live, logits(model, ids)) >= 0.5
    nearest = kl_divergence(live, logits(load(directory).merge_and_unload(rounding="nearest"), ids))
    found = kl_divergence(live, logits(load(directory).merge_and_unload(), ids))
    assert 0 < found <= 0.5 * nearest


def test_more_of_a_small_delta_is_kept(trained):
    """A twentieth of the adapter is too small to change most codes."""
    directory, _ = trained
    kept = {}
    for rounding in ("nearest", "second-order"):
        model = load(directory)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name and ".lora_B." in name:
                    parameter.mul_(0.05)
        merged = model.merge_and_unload(rounding=rounding)
        kept[rounding] = [stack.delta_kept for stack in experts_report(merged).stacks]
    assert all(share < 0.6 for share in kept["nearest"])
    assert all(share > 0.85 for share in kept["second-order"])


MODEL_TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_all_kinds_of_layers(model_type, double_quant, device):
    config = MoeQLoraConfig(r=4, target_modules="all-linear", double_quant=double_quant)
    model = get_peft_model(tiny_model(model_type, device), config).eval()
    randomize_adapter(model, std=0.05)
    ids = token_ids(device)
    live = logits(model, ids)
    nearest = copy.deepcopy(model).merge_and_unload(rounding="nearest")
    merged = model.merge_and_unload()
    experts = [module for module in merged.modules() if isinstance(module, QuantizedExperts)]
    assert experts
    for stack, plain in zip(experts_report(merged).stacks, experts_report(nearest).stacks):
        assert stack.storage == ("nf4/64+dq" if double_quant else "nf4/64")
        assert 0 < stack.merge_error < 0.2
        assert stack.delta_kept > plain.delta_kept - 0.02
    # on random weights not much better, but never much worse
    assert kl_divergence(live, logits(merged, ids)) < 2 * kl_divergence(live, logits(nearest, ids)) + 1e-3


def test_deterministic():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    first, second = (logits(copy.deepcopy(model).merge_and_unload(), token_ids()) for _ in range(2))
    assert torch.equal(first, second)


def test_calibration_text():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    found = logits(copy.deepcopy(model).merge_and_unload(calibration=token_ids()), token_ids())
    assert not torch.equal(found, logits(copy.deepcopy(model).merge_and_unload(), token_ids()))
    with pytest.raises(ValueError, match="calibration applies only to second-order rounding"):
        model.merge_and_unload(calibration=token_ids(), rounding="nearest")
    with pytest.raises(ValueError, match="calibration applies only to second-order rounding"):
        model.merge_and_unload(calibration=token_ids(), dtype=torch.float32)
    with pytest.raises(ValueError, match="rounding='best' is unknown"):
        model.merge_and_unload(rounding="best")


def test_random_tokens_are_not_special():
    config = tiny_model().config
    ids = random_token_ids(config)
    assert ids.shape == (16, 128)  # the model's maximum length
    assert ids.min() >= 3
    assert ids.max() < config.vocab_size
    assert len(ids.unique()) > 50
    assert torch.equal(ids, random_token_ids(config))


def test_layers_without_tokens_are_reported():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    skipped = model.base_model.model.model.layers[1]
    skipped.mlp.forward = lambda hidden_states: hidden_states
    with pytest.warns(RuntimeWarning, match=r"did not run 1 layers of experts, model\.layers\.1\.mlp\.experts first"):
        merged = model.merge_and_unload()
    assert all(stack.merge_error is not None for stack in experts_report(merged).stacks)


@pytest.mark.parametrize("target_modules", [["experts"], "all-linear"], ids=str)
def test_two_adapters_of_which_one_is_already_merged(target_modules):
    def build():
        model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, target_modules=target_modules)).eval()
        model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=target_modules))
        randomize_adapter(model)
        return model

    together = build().merge_and_unload(adapter_names=["default", "other"])
    model = build()
    model.merge_adapter(["default"])
    in_turn = model.merge_and_unload(adapter_names=["other"])
    # in floating-point linear layers, one delta is added, subtracted and added again
    atol = 0 if target_modules == ["experts"] else 1e-3
    torch.testing.assert_close(logits(together, token_ids()), logits(in_turn, token_ids()), rtol=0, atol=atol)
    alone = build().merge_and_unload(adapter_names=["other"])
    assert not torch.allclose(logits(together, token_ids()), logits(alone, token_ids()), atol=0.1)


def test_failed_forward_merges_nothing_twice():
    def build():
        model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
        randomize_adapter(model)
        return model

    live = logits(build(), token_ids())
    model = build()

    def fail(*_):
        raise torch.OutOfMemoryError("too little")

    handle = model.base_model.model.model.norm.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_and_unload()
    handle.remove()
    merged = model.merge_and_unload()
    once = kl_divergence(live, logits(build().merge_and_unload(), token_ids()))
    assert kl_divergence(live, logits(merged, token_ids())) < 1.5 * once


def test_failed_forward_keeps_earlier_merges():
    """Otherwise the same call, which names only the other adapter, would lose it in the remaining layers."""

    def build():
        model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
        model.add_adapter("other", MoeQLoraConfig(r=2))
        randomize_adapter(model)
        return model

    def fail(*_):
        raise torch.OutOfMemoryError("too little")

    model = build()
    model.merge_adapter(["default"])
    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        model.merge_and_unload(adapter_names=["other"])
    handle.remove()
    assert [layer.merged_adapters for layer in model.base_model.expert_layers()] == [["default"]] * 4
    expected = build().merge_and_unload(adapter_names=["default", "other"])
    merged = model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(logits(merged, token_ids()), logits(expected, token_ids()))


def test_disabled_adapter_is_merged_as_usual():
    def merged(is_disabled: bool) -> torch.Tensor:
        model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
        randomize_adapter(model)
        if is_disabled:
            model.base_model.disable_adapter_layers()
        return logits(model.merge_and_unload(), token_ids())

    assert torch.equal(merged(True), merged(False))


def test_invalid_calibration():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4)).eval()
    for calibration in (
        torch.ones(3, dtype=torch.int64),
        torch.ones(2, 3),
        torch.ones(0, 3, dtype=torch.int64),
        [[1]],
    ):
        with pytest.raises(ValueError, match="Expected a non-empty integer tensor of token ids"):
            model.merge_and_unload(calibration=calibration)


class PlainModel(torch.nn.Module):
    """One layer of experts in a model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        source = tiny_model()
        self.embed, self.mlp, self.head = source.model.embed_tokens, source.model.layers[0].mlp, source.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mlp(self.embed(ids)))


class Wrapper(torch.nn.Module):
    """Wraps a transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=ids).logits


@pytest.mark.parametrize(
    "options",
    [{}, {"calibration": token_ids()}, {"rounding": "nearest"}, {"dtype": torch.float32}],
    ids=["random", "calibration", "nearest", "fp32"],
)
@pytest.mark.parametrize("model_class", [PlainModel, Wrapper])
def test_model_without_a_config(model_class, options):
    """It is called with ids only; its experts' config has the vocabulary size."""
    model = get_peft_model(model_class(), MoeQLoraConfig(r=4, target_modules=["experts"])).eval()
    randomize_adapter(model, std=0.05)
    with torch.no_grad():
        live = model(token_ids())
        merged = model.merge_and_unload(**options)
        error = (merged(token_ids()) - live).abs().mean() / live.abs().mean()
    assert isinstance(merged, model_class)
    assert error < (1e-5 if "dtype" in options else 0.2)


def test_model_without_a_vocabulary_size():
    model = PlainModel()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = None
    model = get_peft_model(model, MoeQLoraConfig(r=4)).eval()
    with pytest.raises(ValueError, match=r"PlainModel has no config with a vocabulary size.*rounding='nearest'"):
        model.merge_and_unload()
    assert model.merge_and_unload(calibration=token_ids())(token_ids()).isfinite().all()
