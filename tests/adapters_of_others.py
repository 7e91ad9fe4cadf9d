"""Writes one set of random factors in the adapter layouts of other tools, from the definitions of these layouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

R, ALPHA = 2, 3
PREFIX = "base_model.model."
OLD_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

Factors = dict[str, torch.Tensor]


def random_factors(
    hidden: int = 64, width: int = 32, num_experts: int = 8, num_layers: int = 2, shared: bool = False
) -> tuple[dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]], Factors]:
    """`(layer, part)` -> A `(E, r, in)` and B `(E, out, r)`, optionally one A for gate and up; and q_proj's."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    experts = {}
    for layer in range(num_layers):
        for part in ("gate", "up", "down"):
            features = (width, hidden) if part == "down" else (hidden, width)
            experts[layer, part] = random(num_experts, R, features[0]), random(num_experts, features[1], R)
        if shared:
            experts[layer, "up"] = experts[layer, "gate"][0], experts[layer, "up"][1]
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(num_layers)]
    linear = {}
    for name in names:
        linear |= {f"{name}.lora_A.weight": random(R, hidden), f"{name}.lora_B.weight": random(64, R)}
    return experts, linear


def write_lora(directory: Path, tensors: Factors, base: Path, targets: list[str], **options) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    contiguous = {f"{PREFIX}{key}": tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(contiguous, directory / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    config |= {"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", **options}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def write_per_expert(directory: Path, base: Path, experts, linear: Factors, old: str | None = None) -> None:
    """With the current names, or with the module names of older versions, in which experts were linear layers."""
    tensors = dict(linear)
    for (layer, part), (A, B) in experts.items():
        module, leaf = (old, OLD_NAMES[part]) if old else ("mlp.experts", f"{part}_proj")
        for expert in range(len(A)):
            name = f"model.layers.{layer}.{module}.{expert}.{leaf}"
            tensors |= {f"{name}.lora_A.weight": A[expert], f"{name}.lora_B.weight": B[expert]}
    leaves = ["w1", "w2", "w3"] if old else ["gate_proj", "up_proj", "down_proj"]
    write_lora(directory, tensors, base, ["q_proj", *leaves])


def write_stacked(directory: Path, base: Path, experts, linear: Factors) -> None:
    """Separate gate and up projections."""
    tensors = dict(linear)
    for (layer, part), (A, B) in experts.items():
        name = f"model.layers.{layer}.mlp.experts.{part}_proj"
        tensors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    write_lora(directory, tensors, base, ["q_proj", "gate_proj", "up_proj", "down_proj"])


def write_stacked_fused(directory: Path, base: Path, experts, linear: Factors) -> None:
    """Fused gate and up projection with a shared A; gate rows first. Keys without `.weight`."""
    tensors = dict(linear)
    for (layer, part), (A, B) in experts.items():
        if part == "up":
            continue
        name = f"model.layers.{layer}.mlp.experts.{'down' if part == 'down' else 'gate_up'}_proj"
        rows = B if part == "down" else torch.cat([B, experts[layer, "up"][1]], dim=1)
        tensors |= {f"{name}.lora_A": A, f"{name}.lora_B": rows}
    write_lora(directory, tensors, base, ["q_proj", "gate_up_proj", "down_proj"])


def write_mlx(directory: Path, base: Path, experts, linear: Factors, num_layers: int = 2) -> None:
    tensors = {}
    for key, tensor in linear.items():
        tensors[key.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")] = tensor.T
    for (layer, part), (A, B) in experts.items():
        name = f"model.layers.{layer}.mlp.switch_mlp.{part}_proj"
        tensors |= {f"{name}.lora_a": A, f"{name}.lora_b": B}
    directory.mkdir(parents=True)
    save_file(
        {key: tensor.contiguous().clone() for key, tensor in tensors.items()}, directory / "adapters.safetensors"
    )
    parameters = {
        "rank": R,
        "scale": ALPHA / R,
        "dropout": 0.0,
        "keys": ["self_attn.q_proj", "mlp.switch_mlp.up_proj"],
    }
    config = {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters, "model": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


WRITERS = {
    "per-expert": write_per_expert,
    "stacked": write_stacked,
    "stacked, fused": write_stacked_fused,
    "mlx": write_mlx,
}
