"""The modules that a configuration reaches, by current and older names; the router only on request."""

from __future__ import annotations

import re

import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from shrunken_models import shrunken_model_or_skip
from tiny_models import tiny_model

from peft_moe_qlora import ExpertsLora, MoeQLoraConfig

BOTH = ("gate_up_proj", "down_proj")


def adapted(model) -> dict[str, tuple[str, ...]]:
    """Path -> adapted projections of experts, or () for a linear layer."""
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, ExpertsLora):
            experts, _, projection = path.rpartition(".")
            found[experts] = (*found.get(experts, ()), projection)
        elif isinstance(module, LoraLayer):
            found[path] = ()
    return found


def adapt(model_type: str = "qwen3_moe", **options) -> dict[str, tuple[str, ...]]:
    return adapted(get_peft_model(tiny_model(model_type), MoeQLoraConfig(**options)))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "phimoe"])
def test_default_is_all_routed_experts_and_nothing_else(model_type):
    assert adapt(model_type) == {f"model.layers.{i}.mlp.experts": BOTH for i in range(2)}


def test_default_leaves_shared_experts_and_dense_layers_alone():
    assert adapt("deepseek_v3") == {"model.layers.1.mlp.experts": BOTH}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"])
def test_all_linear_excludes_routers(model_type):
    model = tiny_model(model_type)
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and name != "lm_head"
        and not name.endswith((".gate", ".router"))  # phimoe's router is a linear layer
    }
    experts = {name for name, _ in model.named_modules() if name.endswith(".experts")}
    found = adapted(get_peft_model(model, MoeQLoraConfig(target_modules="all-linear")))
    assert set(found) == linear | experts
    assert all(found[name] == BOTH for name in experts)


@pytest.mark.parametrize(
    ("model_type", "names", "projections"),
    [
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], BOTH),
        ("mixtral", ["w1", "w2", "w3"], BOTH),
        ("qwen3_moe", ["down_proj"], ("down_proj",)),
        ("mixtral", ["w2"], ("down_proj",)),
        ("qwen3_moe", ["gate_up_proj"], ("gate_up_proj",)),
        ("qwen3_moe", ["experts.down_proj"], ("down_proj",)),
        ("qwen3_moe", ["mlp.experts"], BOTH),
        ("qwen3_moe", [f"experts.{i}.{p}_proj" for i in range(8) for p in ("gate", "up", "down")], BOTH),
        ("qwen3_moe", r".*\.experts\.\d+\.(gate|up|down)_proj", BOTH),
        ("qwen3_moe", r".*\.mlp\.experts", BOTH),
    ],
)
def test_names_of_experts_and_their_projections(model_type, names, projections):
    assert adapt(model_type, target_modules=names) == {f"model.layers.{i}.mlp.experts": projections for i in range(2)}


@pytest.mark.parametrize("names", [["gate_proj", "down_proj"], ["up_proj"], ["q_proj", "w1"]])
def test_half_of_a_fused_stack_is_rejected(names):
    with pytest.raises(ValueError, match="one fused stack"):
        adapt(target_modules=names)


def test_linear_layers_only():
    found = adapt(target_modules=["q_proj"])
    assert set(found) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


def test_names_of_shared_experts_do_not_match_routed_ones():
    found = adapt("deepseek_v3", target_modules=["shared_experts.down_proj"])
    assert set(found) == {"model.layers.1.mlp.shared_experts.down_proj"}


def test_one_projection_and_all_linear_layers():
    found = adapt(target_modules="all-linear", exclude_modules=["experts.gate_up_proj"])
    assert found["model.layers.0.mlp.experts"] == ("down_proj",)
    assert "model.layers.0.self_attn.q_proj" in found


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [1]},
        {"layers_to_transform": 1, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.mlp.experts"]},
        {"exclude_modules": r".*\.0\.mlp\.experts"},
    ],
    ids=str,
)
def test_layer_choice_and_exclusion_apply_to_experts(options):
    assert adapt(target_modules=["experts"], **options) == {"model.layers.1.mlp.experts": BOTH}


def test_layer_choice_applies_to_linear_layers_and_experts():
    found = adapt(target_modules=["q_proj", "experts"], layers_to_transform=[1])
    assert found == {"model.layers.1.self_attn.q_proj": (), "model.layers.1.mlp.experts": BOTH}


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["down_proj"]},
        {"exclude_modules": r".*down_proj"},
        {"exclude_modules": ["w2"], "target_modules": ["experts"]},
        {"exclude_modules": ["down_proj"], "target_modules": ["gate_up_proj", "down_proj"]},
    ],
    ids=str,
)
def test_projections_can_be_excluded(options):
    found = adapt(**options)
    assert found == {f"model.layers.{i}.mlp.experts": ("gate_up_proj",) for i in range(2)}


def test_patterns_set_rank_and_alpha():
    config = MoeQLoraConfig(
        r=8,
        expert_r=4,
        target_modules=["experts"],
        rank_pattern={"layers.0.mlp.experts.down_proj": 2, r"layers.1.mlp.experts\..*": 6},
        alpha_pattern={"layers.1.*experts.*": 12},
    )
    model = get_peft_model(tiny_model(), config)
    found = [
        (name, layer.r["default"], layer.scaling["default"])
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, ExpertsLora)
    ]
    assert found == [
        ("model.layers.0.mlp.experts.gate_up_proj", 4, 1.0),
        ("model.layers.0.mlp.experts.down_proj", 2, 2.0),
        ("model.layers.1.mlp.experts.gate_up_proj", 6, 2.0),
        ("model.layers.1.mlp.experts.down_proj", 6, 2.0),
    ]


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_rank_patterns_of_experts_modules_are_rejected(option):
    """Ranks belong to projections; PEFT would ignore the pattern."""
    with pytest.raises(
        ValueError, match=rf"{option} matches experts modules by 'layers.1.mlp.experts'.*experts.down_proj"
    ):
        adapt(**{option: {"layers.1.mlp.experts": 6}})


def test_patterns_that_match_nothing_are_named(recwarn):
    in_full = "model.layers.0.mlp.experts.gate_up_proj"
    get_peft_model(tiny_model(), MoeQLoraConfig(rank_pattern={"down_proj": 2, "nothing_like_it": 3, in_full: 5}))
    messages = [str(warning.message) for warning in recwarn if "pattern" in str(warning.message)]
    assert len(messages) == 1
    assert "['nothing_like_it']" in messages[0]


def test_router_is_trained_in_full_on_request():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(modules_to_save=["gate"]))
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".mlp.gate.modules_to_save.default" in name for name in trainable)


UNADAPTABLE = [
    ("nemotron_h", "mixer", "in_proj", ["out_proj"], "reads the weight"),
    ("granitemoehybrid", "mamba", "in_proj", ["out_proj", "conv1d"], "reads the weight"),
    ("jamba", "mamba", "x_proj", ["dt_proj"], "reads the weight"),
    ("axk2", "indexer", None, ["wk", "wq_b"], "only selects tokens for attention"),
    ("minimax_m3_vl_text", "indexer", None, ["k_proj", "q_proj"], "only selects tokens for attention"),
    ("deepseek_v4", "self_attn", "o_b_proj", ["o_a_proj"], "one weight for each group"),
]


@pytest.mark.parametrize(("model_type", "parent", "adaptable", "names", "reason"), UNADAPTABLE)
def test_layers_that_lora_cannot_train(model_type, parent, adaptable, names, reason):
    """The value "all-linear" excludes them; their names are rejected, with the option that excludes them."""

    def adapt_it(**options) -> dict[str, tuple[str, ...]]:
        model = shrunken_model_or_skip(model_type, dtype=torch.float32)
        return adapted(get_peft_model(model, MoeQLoraConfig(r=2, quant_type=None, **options)))

    def of_parent(found: dict[str, tuple[str, ...]]) -> set[str]:
        return {path.rpartition(".")[2] for path in found if path.split(".")[-2] == parent}

    found = of_parent(adapt_it(target_modules="all-linear"))
    assert not found & set(names)
    assert adaptable is None or adaptable in found
    excluding = [f"{parent}.{name}" for name in sorted(names)]
    with pytest.raises(ValueError, match=re.escape(f"exclude_modules={excluding}")) as refused:
        adapt_it(target_modules=["experts", *names])
    assert reason in str(refused.value)
    assert not of_parent(adapt_it(target_modules=["experts", *names], exclude_modules=excluding)) & set(names)


@pytest.mark.parametrize(("model_type", "name", "is_refused"), [("axk2", "wq_b", False), ("jamba", "dt_proj", True)])
def test_loading_adapters_of_such_layers(model_type, name, is_refused, tmp_path):
    """Other tools may have trained an indexer, or adapted a layer without effect."""
    model = shrunken_model_or_skip(model_type, dtype=torch.float32)
    MoeQLoraConfig(r=2, quant_type=None, target_modules=["experts", name]).save_pretrained(tmp_path)
    config = MoeQLoraConfig.from_pretrained(tmp_path)
    if is_refused:
        with pytest.raises(ValueError, match="LoRA cannot train"):
            get_peft_model(model, config)
    else:
        assert any(path.endswith(name) for path in adapted(get_peft_model(model, config)))
