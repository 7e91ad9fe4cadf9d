"""The method in use: training, several adapters, mixed batches, combinations, and no side effects."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import assert_same_bytes, logits, packed_bytes, randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import ExpertsLora, MoeQLoraConfig, prepare_model_for_training, quantize_experts

MODEL_TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"]


def adapted_model(model_type: str = "qwen3_moe", device: str = "cpu", dtype=torch.float32, **options):
    model = get_peft_model(tiny_model(model_type, device, dtype), MoeQLoraConfig(**{"r": 4, **options}))
    randomize_adapter(model)
    return model.eval()


def train(model: nn.Module, ids: torch.Tensor, steps: int = 3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_training_changes_only_the_adapter(model_type, target_modules, device):
    model = get_peft_model(tiny_model(model_type, device), MoeQLoraConfig(r=4, target_modules=target_modules))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = packed_bytes(model)
    losses = train(model, token_ids(device), steps=8)
    assert losses[-1] < losses[0] - 0.1
    assert_same_bytes(packed_bytes(model), before)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", None])
def test_every_trainable_parameter_gets_a_gradient_and_no_other(model_type, quant_type, device):
    model = adapted_model(model_type, device, target_modules="all-linear", quant_type=quant_type)
    # enough tokens that no expert is idle
    model(input_ids=token_ids(device, 4, 32), labels=token_ids(device, 4, 32)).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (".lora_" in name), name
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeated_forwards_are_identical(dtype, device):
    model = adapted_model(device=device, dtype=dtype, target_modules="all-linear")
    ids = token_ids(device)
    first = logits(model, ids)
    for _ in range(4):
        assert torch.equal(logits(model, ids), first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, device):
    ids = token_ids(device)

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base = tiny_model(device=device)
        quantize_experts(base, progressbar=False)
        prepare_model_for_training(base, checkpointing, {"use_reentrant": use_reentrant})
        model = get_peft_model(base, MoeQLoraConfig(r=4))
        randomize_adapter(model)
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_prepare_casts_nothing_and_freezes_all():
    model = tiny_model(dtype=torch.bfloat16)
    prepare_model_for_training(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert model.is_gradient_checkpointing


def test_new_adapter_changes_nothing():
    """B starts at zero."""
    model = tiny_model()
    quantize_experts(model, progressbar=False)
    before = logits(model, token_ids())
    assert torch.equal(logits(get_peft_model(model, MoeQLoraConfig()), token_ids()), before)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_factors_are_distributed_as_in_peft(init):
    base = tiny_model()
    model = get_peft_model(base, MoeQLoraConfig(r=8, init_lora_weights=init))
    layer = base.model.layers[0].mlp.experts
    in_features = 64
    linear = get_peft_model(
        nn.Sequential(nn.Linear(in_features, 4096, bias=False)),
        LoraConfig(r=8, target_modules=["0"], init_lora_weights=init),
    ).base_model.model[0]
    A, B = layer.gate_up_proj.factors("default")
    assert A.std().item() == pytest.approx(linear.lora_A["default"].weight.std().item(), rel=0.1)
    assert B.std().item() == pytest.approx(linear.lora_B["default"].weight.std().item(), rel=0.1)
    assert not torch.equal(A[0], A[1])
    assert model is not None


def test_dropout_applies_to_experts_inputs_in_training_only():
    model = adapted_model(lora_dropout=0.5)
    ids = token_ids()
    evaluated = logits(model, ids)
    assert torch.equal(logits(model, ids), evaluated)
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dropout_keeps_the_mean():
    """The mean over many masks converges to the result without dropout."""
    model = adapted_model(lora_dropout=0.2, target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(4, 64), torch.tensor([[0, 1]] * 4), torch.full((4, 2), 0.5)
    with torch.no_grad():
        expected = layer(x, index, weights)
        with model.disable_adapter():
            base = layer(x, index, weights)
        layer.train()
        mean = torch.stack([layer(x, index, weights) for _ in range(2000)]).mean(0)
    assert (mean - expected).norm() <= 0.1 * (expected - base).norm()


def test_trained_biases_are_applied_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = adapted_model("gpt_oss", bias="lora_only")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    biases = {name for name in trainable if name.endswith(("gate_up_proj_bias", "down_proj_bias"))}
    assert len(biases) == 4
    train(model, token_ids())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("gpt_oss"), tmp_path)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


def test_disabled_adapter_is_the_quantized_base():
    base = tiny_model()
    quantize_experts(base, progressbar=False)
    expected = logits(base, token_ids())
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear"))
    randomize_adapter(model)
    live = logits(model, token_ids())
    with model.disable_adapter():
        assert torch.equal(logits(model, token_ids()), expected)
    assert torch.equal(logits(model, token_ids()), live)
    assert not torch.equal(live, expected)


@pytest.fixture
def two_adapters():
    model = adapted_model(target_modules="all-linear")
    model.add_adapter("other", MoeQLoraConfig(r=4, lora_alpha=16, target_modules="all-linear"))
    randomize_adapter(model, seed=11)
    return model.eval()


def test_switching_between_adapters(two_adapters):
    ids = token_ids()
    first = logits(two_adapters, ids)
    two_adapters.set_adapter("other")
    second = logits(two_adapters, ids)
    assert not torch.equal(first, second)
    trainable = {name for name, p in two_adapters.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".other" in name for name in trainable)
    two_adapters.set_adapter("default")
    assert torch.equal(logits(two_adapters, ids), first)


def test_deleting_an_adapter_keeps_the_other(two_adapters):
    first = logits(two_adapters, token_ids())
    two_adapters.delete_adapter("other")
    assert torch.equal(logits(two_adapters, token_ids()), first)
    for layer in two_adapters.base_model.expert_layers():
        assert layer._all_available_adapter_names() == ["default"]


def test_several_active_adapters_add_up():
    """In the layer where nothing nonlinear follows the sum: the down projection."""
    model = adapted_model(target_modules=["down_proj"])
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["down_proj"]))
    randomize_adapter(model)
    layer = model.base_model.model.model.layers[0].mlp.experts
    x, index, weights = torch.randn(6, 64), torch.randint(0, 8, (6, 2)), torch.rand(6, 2)

    def output(active: list[str]) -> torch.Tensor:
        layer.down_proj.set_adapter(active)
        with torch.no_grad():
            return layer(x, index, weights)

    base, both = output([]), output(["default", "other"])
    torch.testing.assert_close(both - base, output(["default"]) + output(["other"]) - 2 * base)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_exact_combinations_equal_the_weighted_sum_of_deltas(two_adapters, kind):
    weights = [0.7, -0.4]
    rank = 8 if kind == "svd" else None  # the rank of the sum: nothing is truncated
    two_adapters.add_weighted_adapter(["default", "other"], weights, "sum", combination_type=kind, svd_rank=rank)
    for layer in two_adapters.base_model.expert_layers():
        parts = [layer.get_delta_weight(name) for name in ("default", "other")]
        torch.testing.assert_close(layer.get_delta_weight("sum"), weights[0] * parts[0] + weights[1] * parts[1])


COMBINATIONS = ["linear", "cat", "svd", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("kind", [*COMBINATIONS, "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_combinations_match_peft_for_each_expert(kind, use_rslora):
    """Stock LoRA on one linear layer with one expert's factors combines to the same delta."""
    options = {"r": 4, "lora_alpha": 8, "use_rslora": use_rslora}
    model = get_peft_model(tiny_model(), MoeQLoraConfig(**options))
    model.add_adapter("other", MoeQLoraConfig(**options))
    randomize_adapter(model)
    layer = model.base_model.model.model.layers[1].mlp.experts.gate_up_proj
    expert = 3
    linear_options = {"r": 4, "lora_alpha": 8, "target_modules": ["0"], "use_rslora": use_rslora}
    linear = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), LoraConfig(**linear_options))
    linear.add_adapter("other", LoraConfig(**linear_options))
    lora = linear.base_model.model[0]
    for name in ("default", "other"):
        A, B = layer.factors(name)
        lora.lora_A[name].weight.data = A[expert].detach().clone()
        lora.lora_B[name].weight.data = B[expert].detach().clone()
    # dare drops values at random; density 1 keeps them all
    density = 1.0 if kind.startswith("dare") else 0.4
    for peft_model in (model, linear):
        peft_model.add_weighted_adapter(
            ["default", "other"],
            [0.5, -0.3],
            "new",
            combination_type=kind,
            svd_rank=3 if kind.endswith("svd") else None,
            density=density,
        )
    # PEFT gives the result alpha = r and then scales by alpha / sqrt(r) with rslora; only the product of the factors
    # is the same in both
    A, B = layer.factors("new")
    expected = lora.lora_B["new"].weight @ lora.lora_A["new"].weight
    torch.testing.assert_close(B[expert] @ A[expert], expected)
    assert expected.any()
    assert layer.scaling["new"] == pytest.approx(1)


def test_combined_adapter_round_trips_through_a_file(two_adapters, tmp_path):
    from peft import PeftModel

    two_adapters.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    two_adapters.set_adapter("sum")
    two_adapters.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "sum")
    assert torch.equal(logits(again, token_ids()), logits(two_adapters, token_ids()))


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_values_are_dropped_randomly_in_each_expert(two_adapters, kind):
    two_adapters.add_weighted_adapter(["default"] * 2, [0.5, 0.5], "halves", combination_type=kind, density=0.5)
    layer = next(two_adapters.base_model.expert_layers())
    shares = [
        (factor.weight == 0).float().mean(dim=(1, 2)) for factor in (layer.lora_A["halves"], layer.lora_B["halves"])
    ]
    assert all((share > 0.1).all() and (share < 0.6).all() for share in shares)


def test_unknown_combinations_are_rejected(two_adapters):
    names = set(two_adapters.peft_config)
    with pytest.raises(ValueError, match="Invalid combination_type: nonsense"):
        two_adapters.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="nonsense")
    assert set(two_adapters.peft_config) == names


@pytest.mark.parametrize("options", [{"svd_clamp": 3.0}, {"combination_type": "ties", "density": None}], ids=str)
def test_failed_combination_leaves_nothing(two_adapters, options):
    """Otherwise the next call would find the name in use and do nothing."""
    two_adapters.set_adapter("other")
    before = {name: value.clone() for name, value in two_adapters.state_dict().items()}
    with pytest.raises((RuntimeError, TypeError)):
        two_adapters.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", **options)
    assert set(two_adapters.peft_config) == {"default", "other"}
    assert two_adapters.base_model.active_adapters == ["other"]
    after = two_adapters.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_combination_with_a_rank_above_the_number_of_features():
    """An SVD of a delta with 32 inputs and 64 outputs gives 32 columns of B, and all requested rows of A."""
    options = {"r": 24, "target_modules": ["k_proj", "experts"]}
    model = get_peft_model(tiny_model(), MoeQLoraConfig(**options)).eval()
    model.add_adapter("other", MoeQLoraConfig(**options))
    randomize_adapter(model)
    model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "sum", svd_rank=48)
    layer = model.base_model.model.model.layers[0].self_attn.k_proj
    parts = [layer.get_delta_weight(name) for name in ("default", "other")]
    torch.testing.assert_close(layer.get_delta_weight("sum"), 0.7 * parts[0] - 0.4 * parts[1])


def test_linear_combination_of_different_ranks_is_rejected():
    model = adapted_model(expert_r=2)
    model.add_adapter("other", MoeQLoraConfig(r=4, expert_r=3))
    with pytest.raises(ValueError, match="requires adapters of the same rank"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")


def test_mixed_batch_gives_each_sample_its_adapter(two_adapters):
    ids = token_ids(batch=3)
    mixed = logits(two_adapters, ids, adapter_names=["other", "__base__", "default"])
    alone = {}
    for name in ("default", "other"):
        two_adapters.set_adapter(name)
        alone[name] = logits(two_adapters, ids)
    with two_adapters.disable_adapter():
        alone["__base__"] = logits(two_adapters, ids)
    for sample, name in enumerate(["other", "__base__", "default"]):
        torch.testing.assert_close(mixed[sample], alone[name][sample], rtol=0, atol=1e-4)
    assert (mixed[0] - alone["default"][0]).abs().max() > 1e-2


def test_mixed_batch_generates_with_beams(two_adapters):
    ids = token_ids(batch=2)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    mixed = two_adapters.generate(input_ids=ids, adapter_names=["other", "default"], **options)
    two_adapters.set_adapter("other")
    assert torch.equal(mixed[0], two_adapters.generate(input_ids=ids, **options)[0])


@pytest.mark.parametrize(
    ("names", "prepare", "message"),
    [
        (["default", "nobody"], lambda model: None, "no adapter .*nobody"),
        (["default"] * 7, lambda model: None, "7 entries for a batch of 2 samples"),
        (["default"], lambda model: None, "1 entries for a batch of 2 samples"),
        (["default"] * 2, lambda model: model.merge_adapter(), "merged"),
        (["default"] * 2, lambda model: model.train(), "training"),
    ],
)
def test_invalid_mixed_batches_are_rejected(names, prepare, message):
    model = adapted_model()
    prepare(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=token_ids(batch=2, length=7), adapter_names=names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_are_fp32_on_a_16_bit_model_by_default(dtype):
    for autocast, expected in ((True, torch.float32), (False, dtype)):
        model = get_peft_model(tiny_model(dtype=dtype), MoeQLoraConfig(), autocast_adapter_dtype=autocast)
        assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {expected}
        assert logits(model, token_ids()).dtype == dtype


def test_autocast_computes_in_16_bits(device):
    """As close to fp32 as transformers' experts under autocast; every token goes to all, so no routing changes."""
    base = tiny_model("qwen3_moe", device, num_experts_per_tok=8)
    model = get_peft_model(base, MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    ids = token_ids(device)
    exact = logits(model, ids)
    with torch.autocast(device, torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
        error = (logits(model, ids) - exact).norm()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    merged = model.merge_and_unload(dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        assert 0 < error <= 1.25 * (logits(merged, ids) - exact).norm()


def test_copies_are_independent():
    model = adapted_model()
    twin = copy.deepcopy(model)
    before = logits(twin, token_ids())
    train(model, token_ids())
    assert torch.equal(logits(twin, token_ids()), before)
    assert not torch.equal(logits(model, token_ids()), before)


def test_moving_and_casting_the_model_keeps_the_packed_bytes(device):
    model = adapted_model(device="cpu")
    before = packed_bytes(model)
    model.to(device).to(torch.bfloat16)
    assert_same_bytes({name: value.cpu() for name, value in packed_bytes(model).items()}, before)
    assert torch.isfinite(logits(model, token_ids(device))).all()


def test_repr_of_layers():
    model = adapted_model()
    layer = next(model.base_model.expert_layers())
    assert isinstance(layer, ExpertsLora)
    assert "nf4/64" in repr(model)
    assert "moe_qlora.ExpertsLora" in repr(model)
    assert layer.in_features == layer.out_features == 64
    experts = model.base_model.model.model.layers[0].mlp.experts
    assert experts.num_experts == 8
    assert experts.config.model_type == "qwen3_moe"
