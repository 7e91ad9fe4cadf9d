"""Adapters converted for engines have the same effect there, as laid out in the engine's source."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import saved_deltas
from test_import_adapters import edit_config, edit_tensors, tensors_of

from peft_moe_qlora import MoeQuantizationConfig
from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import TARGETS, convert_adapter, read_adapter

ENGINES = ("vllm", "sglang", "llama.cpp", "mlx")
OPTIONS = {
    "one rank": {"target_modules": ["experts", "q_proj", "v_proj"]},
    "rslora and patterns": {
        "target_modules": ["experts", "q_proj", "o_proj"],
        "use_rslora": True,
        "expert_r": 3,
        "rank_pattern": {"layers.1.mlp.experts.down_proj": 2, "o_proj": 5},
        "alpha_pattern": {"layers.1.mlp.experts.*": 3, "layers.0.self_attn.q_proj": 9},
    },
    "one projection of one layer": {"target_modules": ["experts.down_proj"], "layers_to_transform": [1]},
}


class Written:
    """A converted adapter, read independently of the code that wrote it."""

    def __init__(self, directory, target: str, base=None):
        out = directory / target
        convert_adapter(directory / "adapter", out, target, base)
        self.config = json.loads((out / "adapter_config.json").read_text())
        name = "adapters" if target == "mlx" else "adapter_model"
        assert {file.name for file in out.iterdir()} == {"adapter_config.json", f"{name}.safetensors"}
        self.tensors = load_file(out / f"{name}.safetensors")
        self.unread = set(self.tensors)

    def pair(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        keys = [f"base_model.model.{name}.lora_{factor}.weight" for factor in "AB"]
        self.unread -= set(keys)
        return self.tensors[keys[0]], self.tensors[keys[1]]

    def delta(self, name: str) -> torch.Tensor:
        """`(out, in)` for a linear layer, `(E, out, in)` for a stack."""
        A, B = self.pair(name)
        assert A.shape[-2] == B.shape[-1] == self.config["r"]
        return self.config["lora_alpha"] / self.config["r"] * (B @ A)

    def fused_delta(self, path: str, num_experts: int) -> torch.Tensor:
        """Split as in vLLM 0.33.0 (model_manager.py)."""
        A, B = self.pair(path)
        A = A.reshape(num_experts, -1, A.shape[1])
        B = B.reshape(B.shape[0], -1, num_experts).permute(2, 0, 1)
        assert A.shape[1] == self.config["r"]
        return self.config["lora_alpha"] / self.config["r"] * (B @ A)

    def mlx_delta(self, name: str) -> torch.Tensor:
        a, b = self.tensors[f"{name}.lora_a"], self.tensors[f"{name}.lora_b"]
        self.unread -= {f"{name}.lora_a", f"{name}.lora_b"}
        parameters = self.config["lora_parameters"]
        assert name.partition("layers.")[2].partition(".")[2] in parameters["keys"]
        return parameters["scale"] * (b @ a if a.dim() == 3 else (a @ b).T)

    def zeros(self) -> set[str]:
        """Names of the remaining layers, whose deltas must be zero."""
        left = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in self.unread}
        assert not any(self.delta(name).any() for name in left)
        return left


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def check_linear(written: Written, deltas: dict[str, torch.Tensor]) -> None:
    adapted = [name.removesuffix(".weight") for name in deltas if "attn" in name and deltas[name].any()]
    for name in adapted:
        assert_same(written.delta(name), deltas[f"{name}.weight"])


def check_nothing_else(deltas: dict[str, torch.Tensor], read: set[str]) -> None:
    left = {name for name, delta in deltas.items() if delta.any() and "attn" not in name} - read
    assert not left, "the adapter changes weights that were not checked"


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("model_type", "pattern", "parts"),
    [
        ("qwen3_moe", "model.layers.{}.mlp.experts.{}.{}", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "model.layers.{}.block_sparse_moe.experts.{}.{}", ("w1", "w3", "w2")),
    ],
)
def test_one_lora_per_expert(model_type, pattern, parts, options, target, tmp_path):
    deltas = saved_deltas(tmp_path, model_type, **options)
    written = Written(tmp_path, target)
    read = set()
    for layer in options.get("layers_to_transform", range(2)):
        path = f"model.layers.{layer}.mlp.experts"
        gate_up, down = deltas[f"{path}.gate_up_proj"], deltas[f"{path}.down_proj"]
        for expert in range(len(down)):
            rows = [*gate_up[expert].chunk(2), down[expert]]
            for part, expected in zip(parts, rows):
                assert_same(written.delta(pattern.format(layer, expert, part)), expected)
        read |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
    check_nothing_else(deltas, read)
    check_linear(written, deltas)
    left = written.zeros()
    assert all(name.endswith(("k_proj", "v_proj")) for name in left)
    assert {"gate_proj", "up_proj", "down_proj"} <= set(written.config["target_modules"])
    check_config(written.config)


def check_config(config: dict) -> None:
    """Options that at least one engine misreads or rejects."""
    assert config["peft_type"] == "LORA"
    assert isinstance(config["target_modules"], list)
    assert config["init_lora_weights"] is True
    assert config["bias"] == "none"
    for option in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias"):
        assert not config[option], option


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_one_directory_for_three_engines(model_type, tmp_path):
    saved_deltas(tmp_path, model_type, **OPTIONS["rslora and patterns"])
    files = []
    for target in ("vllm", "sglang", "llama.cpp"):
        convert_adapter(tmp_path / "adapter", tmp_path / target, target)
        files.append({file.name: file.read_bytes() for file in (tmp_path / target).iterdir()})
    assert files[0] == files[1] == files[2]


def test_scalings_are_multiplied_in_without_rounding(tmp_path):
    """bf16 factors with individual scalings: the products are as exact as the factors."""
    saved_deltas(tmp_path, alpha_pattern={"layers.1.mlp.experts.down_proj": 5}, target_modules=["experts"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    written = Written(tmp_path, "vllm")
    for layer, alpha in ((0, 6), (1, 5)):
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts.down_proj.lora_"
        A, B = (tensors[prefix + factor + ".weight"][2].float() for factor in "AB")
        keys = [f"base_model.model.model.layers.{layer}.mlp.experts.2.down_proj.lora_{one}.weight" for one in "AB"]
        found = (written.tensors[key].float() for key in keys)
        torch.testing.assert_close(next(found), A, rtol=0, atol=0)
        scaling = written.config["lora_alpha"] / written.config["r"]
        torch.testing.assert_close(scaling * next(found), alpha / 4 * B, rtol=1e-6, atol=0)


def test_base_and_task_are_named_for_the_engine(tmp_path):
    """Servers find the base by its name, and tools choose the model's class by the task."""
    saved_deltas(tmp_path, target_modules=["experts"], task_type="CAUSAL_LM", revision="v2")
    config = Written(tmp_path, "vllm").config
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert config["revision"] == "v2"
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_interleaved_rows_stay_interleaved_for_vllm(options, tmp_path):
    deltas = saved_deltas(tmp_path, "gpt_oss", **options)
    written = Written(tmp_path, "vllm")
    read = set()
    for layer in options.get("layers_to_transform", range(2)):
        path = f"model.layers.{layer}.mlp.experts"
        assert_same(written.fused_delta(f"{path}.base_layer", 4), deltas[f"{path}.gate_up_proj"])
        assert_same(written.fused_delta(path, 4), deltas[f"{path}.down_proj"])
        read |= {f"{path}.gate_up_proj", f"{path}.down_proj"}
    check_nothing_else(deltas, read)
    check_linear(written, deltas)
    check_config(written.config)
    written.zeros()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sglang_has_gate_rows_before_up_rows(options, tmp_path):
    deltas = saved_deltas(tmp_path, "gpt_oss", **options)
    written = Written(tmp_path, "sglang")
    for layer in options.get("layers_to_transform", range(2)):
        path = f"model.layers.{layer}.mlp.experts"
        gate_up = deltas[f"{path}.gate_up_proj"]
        assert_same(written.delta(f"{path}.gate_up_proj"), torch.cat([gate_up[:, ::2], gate_up[:, 1::2]], dim=1))
        assert_same(written.delta(f"{path}.down_proj"), deltas[f"{path}.down_proj"])
    check_linear(written, deltas)
    check_config(written.config)
    written.zeros()


def test_class_with_fused_experts_in_vllm(tmp_path):
    deltas = saved_deltas(tmp_path, "qwen3_vl_moe", target_modules=["experts", "q_proj", "v_proj"])
    written = Written(tmp_path, "vllm")
    path = "model.language_model.layers.1.mlp.experts"
    assert_same(written.fused_delta(f"{path}.base_layer", 4), deltas[f"{path}.gate_up_proj"])
    assert_same(written.fused_delta(path, 4), deltas[f"{path}.down_proj"])
    assert "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight" in written.tensors


def test_text_class_of_qwen3_5_is_not_fused_in_vllm(tmp_path):
    deltas = saved_deltas(tmp_path, "qwen3_5_moe_text", target_modules=["experts"])
    name = "model.layers.1.mlp.experts.{}down_proj"
    assert_same(Written(tmp_path, "vllm").delta(name.format("2.")), deltas[name.format("")][2])


def test_gemma_4_is_stacked_for_llama_cpp(tmp_path):
    deltas = saved_deltas(tmp_path, "gemma4_text", target_modules=["experts"])
    written = Written(tmp_path, "llama.cpp")
    for projection in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.experts.{projection}"
        assert_same(written.delta(name), deltas[name])
    with pytest.raises(ValueError, match=r"SGLang .* not support LoRA on experts of this model\. Merge the"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "sglang")
    assert "base_model.model.model.layers.0.experts.3.up_proj.lora_B.weight" in Written(tmp_path, "vllm").tensors


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(
    ("model_type", "module"),
    [("qwen3_moe", "mlp.switch_mlp"), ("mixtral", "block_sparse_moe.switch_mlp"), ("gpt_oss", "mlp.experts")],
)
def test_mlx(model_type, module, options, tmp_path):
    deltas = saved_deltas(tmp_path, model_type, **options)
    written = Written(tmp_path, "mlx")
    assert written.config["num_layers"] == 2 - min(options.get("layers_to_transform", [0]))
    for layer in options.get("layers_to_transform", range(2)):
        path = f"model.layers.{layer}.mlp.experts"
        gate_up = deltas[f"{path}.gate_up_proj"]
        gate, up = (gate_up[:, ::2], gate_up[:, 1::2]) if model_type == "gpt_oss" else gate_up.chunk(2, dim=1)
        there = f"model.layers.{layer}.{module}"
        assert_same(written.mlx_delta(f"{there}.gate_proj"), gate)
        assert_same(written.mlx_delta(f"{there}.up_proj"), up)
        assert_same(written.mlx_delta(f"{there}.down_proj"), deltas[f"{path}.down_proj"])
    for name, delta in deltas.items():
        if "attn" in name and delta.any():
            assert_same(written.mlx_delta(name.removesuffix(".weight")), delta)
    assert not any(written.tensors[key].any() for key in written.unread if key.endswith("lora_b"))


def test_layers_fused_by_engines_get_zeros(tmp_path):
    """SGLang fuses q, k and v, and finds k only if every layer has it."""
    deltas = saved_deltas(
        tmp_path,
        "deepseek_v3",
        target_modules=r".*\.mlp\.experts|.*layers\.0\.mlp\.up_proj|.*layers.1.mlp.shared_experts.(up|down)_proj",
    )
    written = Written(tmp_path, "sglang")
    for name in (
        "layers.0.mlp.up_proj",
        "layers.1.mlp.shared_experts.up_proj",
        "layers.1.mlp.shared_experts.down_proj",
    ):
        assert_same(written.delta(f"model.{name}"), deltas[f"model.{name}.weight"])
    for name in ("layers.0.mlp.gate_proj", "layers.1.mlp.shared_experts.gate_proj"):
        assert not written.delta(f"model.{name}").any()
    assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" not in written.tensors


@pytest.mark.parametrize("target", ["vllm", "sglang", "mlx"])
def test_zero_layers_keep_the_scaling(target, tmp_path):
    """k_proj and v_proj are fused with q_proj and match no pattern: this scaling need not be multiplied into B."""
    saved_deltas(tmp_path, target_modules=["experts", "q_proj"], alpha_pattern={"experts.*": 12, "q_proj": 12})
    directory = tmp_path / "adapter"
    edit_tensors(directory, {key: tensor.bfloat16() for key, tensor in tensors_of(directory).items()})
    written = convert_adapter(directory, tmp_path / target, target)
    assert {factors.scaling for factors in written.experts} == {12 / 4}
    tensors = tensors_of(tmp_path / target, "adapters.safetensors" if target == "mlx" else "adapter_model.safetensors")
    assert any("k_proj" in key for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / target / "adapter_config.json").read_text())
    scaling = config["lora_parameters"]["scale"] if target == "mlx" else config["lora_alpha"] / config["r"]
    assert scaling == 12 / 4
    # a scaling of a nonzero layer still counts
    edit_config(directory, alpha_pattern={"q_proj": 12})
    convert_adapter(directory, tmp_path / "again", target)
    again = tensors_of(tmp_path / "again", "adapters.safetensors" if target == "mlx" else "adapter_model.safetensors")
    assert torch.float32 in {tensor.dtype for tensor in again.values()}


@pytest.mark.parametrize(
    ("target", "model_type", "options", "match"),
    [
        (
            "vllm",
            "cohere2_moe",
            {},
            r"vLLM .* Cohere2MoeForCausalLM: it does not support LoRA on this model\. Merge the adapter instead",
        ),
        ("vllm", "llama4_text", {}, r"while Llama 4 multiplies their inputs\. Merge"),
        ("vllm", "zaya", {}, "ZayaForCausalLM is not on the list of models"),
        ("llama.cpp", "gpt_oss", {}, r"llama\.cpp .* not accept LoRA on experts of this model\. Merge"),
        ("llama.cpp", "granitemoe", {}, r"not accept LoRA on experts of this model\. Merge the adapter instead"),
        ("sglang", "llama4_text", {}, r"does not support LoRA on experts of this model\. Merge"),
        ("mlx", "zaya", {}, "ZayaForCausalLM is not on the list"),
        ("vllm", "qwen3_moe", {"expert_r": 513}, "adapter has rank 513, but .* supports ranks up to 512"),
        (
            "vllm",
            "deepseek_v3",
            {"target_modules": "all-linear"},
            r"not support LoRA on .*kv_b_proj\. Merge .* without kv_b_proj",
        ),
        ("sglang", "deepseek_v3", {"target_modules": "all-linear"}, r"SGLang .* support LoRA on .*self_attn\.kv_a"),
        ("llama.cpp", "deepseek_v3", {"target_modules": "all-linear"}, r"not support LoRA on .*kv_b_proj"),
        ("mlx", "deepseek_v3", {"target_modules": "all-linear"}, r"not support LoRA on .*kv_b_proj"),
        (
            "vllm",
            "qwen3_vl_moe",
            {"target_modules": ["experts", "linear_fc1"]},
            "outside the decoder layers of the text model",
        ),
        ("vllm", "qwen3_moe", {"target_modules": ["experts", "embed_tokens"]}, "embed_tokens.*readers of this layout"),
        ("mlx", "qwen3_moe", {"modules_to_save": ["norm"]}, "norm.*which readers of this layout do not support"),
        ("sglang", "qwen3_moe", {"bias": "all", "target_modules": ["experts"]}, "readers of this layout do not"),
    ],
)
def test_rejected_adapters(target, model_type, options, match, tmp_path):
    saved_deltas(tmp_path, model_type, **{"target_modules": ["experts"], **options})
    with pytest.raises(ValueError, match=match):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", target)
    assert not (tmp_path / "out").exists()


def test_sglang_rejects_routers(tmp_path):
    saved_deltas(tmp_path, "phimoe", target_modules=["experts", "q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    router = "base_model.model.model.layers.0.mlp.router"
    factors = {f"{router}.lora_A.weight": torch.ones(4, 64), f"{router}.lora_B.weight": torch.ones(4, 4)}
    save_file({**load_file(file), **factors}, file)
    edit_config(tmp_path / "adapter", target_modules=["experts", "q_proj", "layers.0.mlp.router"])
    with pytest.raises(ValueError, match=r"SGLang .* does not support LoRA on model\.layers\.0\.mlp\.router"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "sglang")


@pytest.mark.parametrize(
    ("quantization", "refused"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ("vllm", "sglang")),
        (MoeQuantizationConfig().to_dict(), ("vllm", "sglang")),
        ({"quant_method": "mxfp4"}, ("sglang",)),
    ],
    ids=lambda value: value.get("quant_method") if isinstance(value, dict) else None,
)
def test_bases_without_lora_support_in_engines(quantization, refused, tmp_path):
    model_type = "gpt_oss" if quantization["quant_method"] == "mxfp4" else "qwen3_moe"
    saved_deltas(tmp_path, model_type, target_modules=["experts"])
    file = tmp_path / "base" / "config.json"
    in_16_bits = json.loads(file.read_text())
    (tmp_path / "in 16 bits").mkdir()
    (tmp_path / "in 16 bits" / "config.json").write_text(json.dumps(in_16_bits))
    file.write_text(json.dumps({**in_16_bits, "quantization_config": quantization}))
    for target in ("vllm", "sglang", "mlx"):
        if target in refused:
            with pytest.raises(ValueError, match=rf"quantized by {quantization['quant_method']}.* merge the adapter"):
                convert_adapter(tmp_path / "adapter", tmp_path / target, target)
            convert_adapter(tmp_path / "adapter", tmp_path / target, target, tmp_path / "in 16 bits")
        else:
            convert_adapter(tmp_path / "adapter", tmp_path / target, target)


@pytest.mark.parametrize("target", ENGINES)
def test_command(target, tmp_path, capsys):
    saved_deltas(tmp_path)
    command = ["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", target]
    assert main([*command, "--base", str(tmp_path / "nowhere")]) == 1
    assert "Pass the directory of the base model" in capsys.readouterr().err
    assert main(command) == 0
    assert f"written to {tmp_path / 'out'} as {target}" in capsys.readouterr().out
    assert target in TARGETS


@pytest.mark.parametrize("target", ["per-expert", "vllm", "sglang", "llama.cpp", "mlx"])
def test_adapter_of_some_layers_is_read_back(target, tmp_path):
    """Layers that were left out are not reported as missing."""
    saved_deltas(tmp_path, target_modules=["experts", "q_proj"], layers_to_transform=[1])
    convert_adapter(tmp_path / "adapter", tmp_path / "out", target)
    found = read_adapter(tmp_path / "out", tmp_path / "base")
    assert found.stacks == read_adapter(tmp_path / "adapter", tmp_path / "base").stacks
