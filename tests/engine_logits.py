"""Whole models with an adapter in mlx-lm and llama.cpp on a CPU, compared with the merged model in transformers."""

from __future__ import annotations

import json
import subprocess
import tempfile
import textwrap
from pathlib import Path

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file
from saved_adapters import saved_deltas
from tiny_models import logits, token_ids

from peft_moe_qlora.layouts import convert_adapter

_OPTIONS = {"target_modules": r".*\.experts|.*self_attn\.[qkvo]_proj", "use_rslora": True, "expert_r": 3}

IN_MLX = (
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "glm4_moe",
    "granitemoe",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe",
)
_MLX = """
    import sys
    import mlx.core as mx
    import numpy
    from pathlib import Path
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model
    mx.set_default_device(mx.cpu)
    directory = Path(sys.argv[1])
    model, _ = load_model(directory / "base")
    model.set_dtype(mx.float32)
    ids = mx.array(numpy.load(directory / "ids.npy"))
    base = numpy.array(model(ids))
    load_adapters(model, str(directory / "out")).eval()
    numpy.savez(directory / "logits.npz", base=base, adapted=numpy.array(model(ids)))
"""

IN_LLAMA_CPP = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "glm4_moe", "deepseek_v3")
_LLAMA_CPP = """
    import sys
    import llama_cpp
    import numpy
    from pathlib import Path
    directory = Path(sys.argv[1])
    ids = numpy.load(directory / "ids.npy")

    def logits(path):
        model = llama_cpp.llama_model_load_from_file(str(directory / "base.gguf").encode(), parameters)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = ids.size
        options.n_threads = 1
        context = llama_cpp.llama_init_from_model(model, options)
        if path:
            adapter = llama_cpp.llama_adapter_lora_init(model, str(path).encode())
            if not adapter:
                sys.exit("llama.cpp takes no such adapter")
            adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
            import ctypes
            llama_cpp.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        rows = []
        for number in range(len(ids)):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            batch = llama_cpp.llama_batch_init(ids.shape[1], 0, 1)
            batch.n_tokens = ids.shape[1]
            for position, token in enumerate(ids[number]):
                batch.token[position], batch.pos[position] = int(token), position
                batch.n_seq_id[position], batch.logits[position] = 1, 1
                batch.seq_id[position][0] = 0
            if llama_cpp.llama_decode(context, batch):
                sys.exit("llama.cpp can't run the model")
            size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
            found = llama_cpp.llama_get_logits(context)
            rows.append(numpy.ctypeslib.as_array(found, (ids.shape[1] * size,)).reshape(ids.shape[1], size).copy())
        return numpy.stack(rows)

    parameters = llama_cpp.llama_model_default_params()
    numpy.savez(directory / "logits.npz", base=logits(None), adapted=logits(directory / "adapter.gguf"))
"""


# the base without a tokenizer, which the test models lack
_BASE_TO_GGUF = """
    import sys
    from pathlib import Path
    sources, base, out = sys.argv[1:]
    sys.path[:0] = [sources, f"{sources}/gguf-py"]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    values = ModelBase.load_hparams(Path(base), False)
    model_class = get_model_class(get_model_architecture(values, ModelType.TEXT))

    class WithoutVocabulary(model_class):
        model_arch, no_mtp = model_class.model_arch, True

        def set_vocab(self):
            self._set_vocab_none()
            self.gguf_writer.add_vocab_size(values.get("text_config", values)["vocab_size"])

    WithoutVocabulary(Path(base), gguf.LlamaFileType.ALL_F32, Path(out)).write()
"""


def mlx_difference(python: str) -> bool:
    """Prints the differences of mlx-lm; returns whether one is too large."""
    failed = [_compare("mlx", one, python, 1e-4, _as_mlx_has_it, _MLX) for one in IN_MLX]
    return any(failed)


def _as_mlx_has_it(directory: Path) -> None:
    """Renames the stacks of 16-bit gpt-oss to the names that mlx-lm expects."""
    file = directory / "base" / "model.safetensors"
    if json.loads((directory / "base" / "config.json").read_text())["model_type"] != "gpt_oss":
        return
    weights = {}
    for key, tensor in load_file(file).items():
        path, _, name = key.rpartition(".")
        projection, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        if not path.endswith("experts"):
            weights[key] = tensor
            continue
        kind, rows = ("bias", tensor) if is_bias else ("weight", tensor.mT)
        parts = {"down_proj": rows}
        if projection == "gate_up_proj":
            parts = {"gate_proj": rows[:, ::2], "up_proj": rows[:, 1::2]}
        weights |= {f"{path}.{part}.{kind}": value.contiguous().clone() for part, value in parts.items()}
    save_file(weights, file, {"format": "pt"})


def llama_cpp_difference(python: str, sources: str) -> bool:
    """Prints the differences of llama.cpp; returns whether one is too large.

    Args:
        python: interpreter that has llama-cpp-python, torch and transformers.
        sources: directory of llama.cpp with its converters.
    """

    def convert(directory: Path) -> None:
        base, out = directory / "base", directory / "out"
        _run([python, "-c", textwrap.dedent(_BASE_TO_GGUF), sources, base, directory / "base.gguf"])
        lora = [python, f"{sources}/convert_lora_to_gguf.py", "--base", base, "--outtype", "f32"]
        _run([*lora, "--outfile", directory / "adapter.gguf", out])

    # its matrix products round differently
    failed = [_compare("llama.cpp", one, python, 1e-2, convert, _LLAMA_CPP) for one in IN_LLAMA_CPP]
    return any(failed)


def _run(command: list) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{command[:3]} failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")


def _compare(target: str, model_type: str, python: str, atol: float, prepare, script: str) -> bool:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        deltas = saved_deltas(directory, model_type, **_OPTIONS)
        convert_adapter(directory / "adapter", directory / "out", target)
        file = directory / "base" / "config.json"
        config = _as_published(json.loads(file.read_text()))
        file.write_text(json.dumps(config))
        model_class = getattr(transformers, config["architectures"][0])
        model = model_class.from_pretrained(directory / "base", dtype=torch.float32).eval()
        before = logits(model, token_ids(), use_cache=False)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter += deltas[key].mT if model_type == "gpt_oss" and parameter.dim() == 3 else deltas[key]
        merged = logits(model, token_ids(), use_cache=False)
        numpy.save(directory / "ids.npy", token_ids().numpy())
        prepare(directory)
        _run([python, "-c", textwrap.dedent(script), directory])
        found = numpy.load(directory / "logits.npz")
    difference = (torch.from_numpy(found["adapted"]) - merged).abs().max().item()
    of_base = (torch.from_numpy(found["base"]) - before).abs().max().item()
    effect = (merged - before).abs().max().item()
    figures = f"difference {difference:.1e}, of the base {of_base:.1e}; effect of the adapter {effect:.2f}"
    print(f"{target} {model_type}: {figures}")
    # the models of some engines differ from transformers' even without an adapter
    return difference > max(atol, 5 * of_base) or of_base > 0.05 * effect


def _as_published(config: dict) -> dict:
    """A config.json as in the published models, which engines accept."""
    rope = config.get("rope_parameters", {})
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        config.setdefault("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0))
        config.setdefault("rope_scaling", None if rope["rope_type"] == "default" else rope)
    if "num_local_experts" in config:
        config.setdefault("num_experts", config["num_local_experts"])
    if "hidden_size" in config:
        config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    if config["model_type"] == "qwen3_moe":  # llama.cpp does not read this option
        config["norm_topk_prob"] = True
    if config["model_type"] == "deepseek_v3":
        config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    if config["model_type"] == "qwen3_5_moe":
        config["text_config"]["mtp_num_hidden_layers"] = 1
    if config["model_type"] == "gpt_oss":  # mlx-lm requires one of each; the window is longer than the test sequences
        config["layer_types"] = ["sliding_attention", "full_attention"]
    return config
