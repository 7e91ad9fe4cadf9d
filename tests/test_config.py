"""The configuration: defaults for experts, rejected values, and round trips through files."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from peft import PeftConfig
from tiny_models import tiny_model

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.config import FORMAT_VERSION

REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "fan_in_fan_out": True,
    "ensure_weight_tying": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [(0, 1)],
}


@pytest.mark.parametrize(("option", "value"), REFUSED.items(), ids=REFUSED)
def test_unsupported_options_of_experts_are_rejected_by_name(option, value):
    with pytest.raises(ValueError, match=f"{option}=.*is not supported for fused experts"):
        MoeQLoraConfig(**{option: value})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "loftq", "eva", "orthogonal", "corda", "mica"])
def test_weight_dependent_initializations_are_rejected(init):
    options = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    with pytest.raises(ValueError, match=r"(init_lora_weights|loftq_config)=.*is not supported for fused experts"):
        MoeQLoraConfig(init_lora_weights=init, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int8"}, "quant_type='int8'"),
        ({"blocksize": 63}, "blocksize=63"),
        ({"expert_r": 0}, "expert_r=0"),
        ({"expert_r": True}, "expert_r=True"),
        ({"r": 0}, "r=0"),
        ({"rank_pattern": {"experts": 0}}, "rank_pattern=.*experts.*0.*ranks of at least 1"),
        ({"expert_alpha": "much"}, "expert_alpha='much'"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
        ({"bias": "some"}, "bias='some'"),
        ({"format_version": FORMAT_VERSION + 1}, "Upgrade peft-moe-qlora"),
        ({"format_version": "1"}, "format_version='1'"),
        ({"double_quant": "no"}, "double_quant='no'"),
        ({"use_rslora": "no"}, "use_rslora='no'"),
        ({"expert_alpha": True}, "expert_alpha=True"),
        ({"lora_dropout": "0.1"}, "lora_dropout='0.1'"),
        ({"rank_pattern": None}, "rank_pattern=None: expected an object"),
        ({"alpha_pattern": "x"}, "alpha_pattern='x': expected an object"),
        ({"target_modules": 5}, "target_modules=5: expected a list of names"),
        ({"exclude_modules": [5]}, r"exclude_modules=\[5\]: expected a list of names"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head': expected a list of names"),
        ({"layers_to_transform": "0"}, "layers_to_transform='0'"),
        ({"trainable_token_indices": "x"}, "trainable_token_indices='x'"),
    ],
)
def test_bad_values_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        MoeQLoraConfig(**options)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("expert_r", [None, 1, 4, 32])
def test_default_scaling_of_experts_equals_linear_layers(use_rslora, expert_r):
    config = MoeQLoraConfig(r=16, lora_alpha=32, expert_r=expert_r, use_rslora=use_rslora)
    linear = config.scaling(config.r, config.lora_alpha)
    assert config.resolved_expert_r == (expert_r or 16)
    assert config.scaling(config.resolved_expert_r, config.resolved_expert_alpha) == pytest.approx(linear)


def test_explicit_expert_alpha_is_kept():
    assert MoeQLoraConfig(r=16, expert_r=4, expert_alpha=3).resolved_expert_alpha == 3


def test_documented_cost_of_rank_16_on_qwen3_30b_a3b():
    """48 layers, 128 experts, hidden 2048, intermediate 768."""
    gate_up, down = 2048 + 2 * 768, 768 + 2048
    assert round(48 * 128 * 16 * (gate_up + down) / 1e6) == 629
    assert "629 million" in MoeQLoraConfig.__doc__


def test_config_round_trips_through_json_pickle_and_deepcopy(tmp_path):
    config = MoeQLoraConfig(r=4, expert_r=2, expert_alpha=6.0, quant_type="fp4", blocksize=128, double_quant=True)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "MOE_QLORA"
    assert saved["format_version"] == FORMAT_VERSION
    for other in (PeftConfig.from_pretrained(tmp_path), pickle.loads(pickle.dumps(config)), copy.deepcopy(config)):
        assert isinstance(other, MoeQLoraConfig)
        assert other.to_dict() == config.to_dict()


def test_importing_twice_is_harmless():
    import importlib

    import peft_moe_qlora

    importlib.reload(peft_moe_qlora)
    assert tiny_model() is not None
    from peft import get_peft_model

    get_peft_model(tiny_model(), MoeQLoraConfig())
