"""A process that loads its part of the experts gets the same bits as from the whole, for every checkpoint layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from published_writers import PER_EXPERT, gpt_oss, publish, publish_fused, qwen
from tiny_models import tiny_model

from peft_moe_qlora import (
    MoeQLoraConfig,
    MoeQuantizationConfig,
    load_quantized,
    read_part_of_experts,
    save_bitsandbytes,
)
from peft_moe_qlora.loading.part_of_experts import Part
from peft_moe_qlora.quantization import Stack

WORLD = 3
FP8 = next(name for name, layout in PER_EXPERT.items() if layout.experts.startswith("fp8"))


def dense(directory: Path) -> None:
    tiny_model().save_pretrained(directory)


def fused(directory: Path) -> None:
    tiny_model("gpt_oss").save_pretrained(directory)


def packed(directory: Path) -> None:
    publish(qwen(), directory, PER_EXPERT[FP8])


def packed_fused(directory: Path) -> None:
    publish_fused(tiny_model("gpt_oss"), directory, {"quant_method": "mxfp4"}, gpt_oss)


def by_bitsandbytes(directory: Path) -> None:
    dense(directory / "dense")
    save_bitsandbytes(load_quantized(directory / "dense", device_map="cpu"), directory)


KINDS = {
    "dense": (dense, MoeQuantizationConfig()),
    "dense, in part": (dense, MoeQuantizationConfig(skip_modules=["layers.0.mlp.experts", "lm_head"])),
    "fused": (fused, MoeQuantizationConfig(double_quant=True)),
    "packed": (packed, None),
    "packed, fused": (packed_fused, None),
    "stored anew": (packed, MoeQuantizationConfig()),
    "by bitsandbytes": (by_bitsandbytes, None),
}


def stacks(model: torch.nn.Module) -> dict[str, Stack]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Stack)}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_equal_the_whole(kind, tmp_path):
    write, config = KINDS[kind]
    write(tmp_path)
    expected = stacks(load_quantized(tmp_path, config, device_map="cpu"))
    read = {name: [] for name in expected}
    for rank in range(WORLD):
        with read_part_of_experts(rank, WORLD, "cpu"):
            found = stacks(load_quantized(tmp_path, config, device_map="cpu"))
        assert found.keys() == expected.keys() != set()
        for name, stack in found.items():
            experts = stack.experts_read
            read[name] += experts
            for tensor, whole in zip(stack.parameters(), expected[name].parameters()):
                assert tensor.shape == whole.shape
                assert torch.equal(tensor[experts.start : experts.stop], whole[experts.start : experts.stop])
    assert all(experts == list(range(expected[name].num_experts)) for name, experts in read.items())
    assert all(stack.experts_read is None for stack in expected.values())


def test_own_checkpoints_are_read_whole(tmp_path):
    dense(tmp_path / "dense")
    load_quantized(tmp_path / "dense", device_map="cpu").save_pretrained(tmp_path)
    with read_part_of_experts(1, WORLD):
        found = load_quantized(tmp_path, device_map="cpu")
    assert all(stack.experts_read is None for stack in stacks(found).values())
    found(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not list mapped files")
def test_own_checkpoints_are_memory_mapped(tmp_path):
    """A process reads only the pages it uses, and sharding uses only its own experts."""
    dense(tmp_path / "dense")
    load_quantized(tmp_path / "dense", device_map="cpu").save_pretrained(tmp_path)
    found = stacks(load_quantized(tmp_path, device_map="cpu"))
    lines = Path("/proc/self/maps").read_text().splitlines()
    of_file = [line.split()[0].split("-") for line in lines if line.endswith(str(tmp_path / "model.safetensors"))]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in of_file]
    assert len(found) == 4
    for tensor in (one for stack in found.values() for one in stack.parameters()):
        assert any(tensor.data_ptr() in addresses for addresses in mapped)


@pytest.mark.parametrize(("num_experts", "world_size"), [(8, 2), (3, 2), (4, 3), (2, 4)])
def test_experts_are_split_as_in_torch(num_experts, world_size):
    parts = [list(Part(rank, world_size).experts(num_experts)) for rank in range(world_size)]
    chunks = [chunk.tolist() for chunk in torch.arange(num_experts).chunk(world_size)]
    assert parts == chunks + [[]] * (world_size - len(chunks))


@pytest.mark.parametrize("rank", [0, 1])
def test_base_record_uses_the_local_experts(rank, tmp_path):
    def samples() -> dict[str, list[float]]:
        model = load_quantized(tmp_path, device_map="cpu")
        return get_peft_model(model, MoeQLoraConfig(target_modules=["experts"])).peft_config["default"].base["samples"]

    dense(tmp_path)
    expected = samples()
    with read_part_of_experts(rank, 2):
        found = samples()
    assert expected
    assert found == (expected if rank == 0 else {})
