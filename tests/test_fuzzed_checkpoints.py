"""Changed headers, indices, quantization states and configs: each is read, or rejected by the same error class."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_writers import Tensors, pack, read_tensors, set_bitsandbytes_config, write_tensors
from tiny_models import tiny_model

from peft_moe_qlora import CheckpointError, MoeQuantizationConfig, load_experts, load_quantized
from peft_moe_qlora.loading import inspect_checkpoint

NOT_JSON = (b"", b"[", b'"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5000)
VALUES = (
    *(None, True, -1, 0, 1, 64.0, float("nan"), float("inf"), 10**400, "", "abc", "../x", "a\0", "\ud800"),
    *([], {}, [None], [0], [-1, -1], [1, 1, 1], [10**30, 2], [[1]], ["a"], {"a": 1}),
)
KEY = "model.layers.0.mlp.experts.0.gate_proj.weight"


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("dense")
    sizes = {"num_experts": 2, "moe_intermediate_size": 64, "num_hidden_layers": 1}
    tiny_model(dtype=torch.bfloat16, **sizes).save_pretrained(directory)
    return directory


def is_expert(key: str) -> bool:
    return ".experts." in key


def changes(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every place in a JSON document with the value to put there; `...` removes it."""
    for found in (*VALUES, ...):
        yield path, found
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from changes(value[key], (*path, key))


def changed(value: Any, path: tuple, found: Any) -> Any:
    if not path:
        return {} if found is ... else found
    value = copy.deepcopy(value)
    place = value
    for key in path[:-1]:
        place = place[key]
    if found is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = found
    return value


class Attempts:
    """Loads checkpoints and counts the outcomes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = transformers.AutoConfig.from_pretrained(directory)
        self.read = self.refused = 0

    def load(self) -> None:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config)
        self.do(lambda: load_experts(model, self.directory, progressbar=False))

    def do(self, attempt: Callable[[], object]) -> None:
        try:
            attempt()
        except CheckpointError:  # any other exception fails the test
            self.refused += 1
        else:
            self.read += 1


def test_changed_indices(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    write_tensors(tmp_path / "base", read_tensors(dense), num_shards=2)
    file = tmp_path / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    of_experts = {key: name for key, name in index["weight_map"].items() if key == KEY}
    attempts = Attempts(tmp_path / "base")
    for path, found in changes({**index, "weight_map": of_experts}):
        file.write_text(json.dumps(changed(index, path, found)))
        attempts.load()
    for text in NOT_JSON:
        file.write_bytes(text)
        attempts.load()
    # the contents of the metadata are not checked, and a key that the index lacks may exist
    assert attempts.read == len(VALUES) + 1 + 3
    assert attempts.read + attempts.refused == 5 * (len(VALUES) + 1) + len(NOT_JSON)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_changed_states_of_packed_weights(nested, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    tensors = pack(read_tensors(dense), is_expert, nested=nested)
    set_bitsandbytes_config(tmp_path / "base", ["lm_head"])
    key = f"{KEY}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[key].tolist()))
    attempts = Attempts(tmp_path / "base")

    def attempt(text: bytes) -> None:
        numbers = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
        write_tensors(tmp_path / "base", {**tensors, key: numbers})
        attempts.load()

    for path, found in changes(state):
        attempt(json.dumps(changed(state, path, found)).encode())
    assert attempts.read == (4 if nested else 0)  # some of the values are offsets of scales
    before = attempts.read
    for more in (
        *({"shape": shape} for shape in ([4096], [1, 64, 64], [1, 1, 64, 64], [64, 65], [2**40, 2**40])),
        *({"dtype": dtype} for dtype in ("nn", "int8", "float64", "torch.bfloat16")),
        *({"quant_type": "fp4"}, {"quant_type": "int8"}, {"blocksize": 128}, {"blocksize": 48}),
        *([{"nested_offset": 1e39}, {"nested_dtype": "bfloat16"}] if nested else [{"nested_blocksize": 256}]),
    ):
        attempt(json.dumps({**state, **more}).encode())
    for text in NOT_JSON:
        attempt(text[: 2**16 - 1])
    attempt(json.dumps(state).encode() + b" " * 2**16)
    attempt((json.dumps(state)[:-1] + ', "shape": [64, 64]}').encode())
    assert attempts.read == before
    attempt(json.dumps(state).encode())
    assert attempts.read == before + 1


def misfits(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Other shapes and other dtypes."""
    yield from (tensor.flatten()[:0], tensor.flatten()[0], tensor.flatten()[:-1], torch.cat([tensor.flatten()] * 2))
    yield from (tensor.to(dtype) for dtype in (torch.float64, torch.int32, torch.complex64, torch.bool, torch.uint16))


@pytest.mark.parametrize("layer", ["experts", "q_proj"])
def test_changed_tensors_of_packed_weights(layer, dense, tmp_path):
    """Also of linear layers, which bitsandbytes would fail to decode, or decode wrongly."""
    shutil.copytree(dense, tmp_path / "base")
    tensors = pack(read_tensors(dense), lambda key: is_expert(key) or "q_proj" in key, nested=True)
    set_bitsandbytes_config(tmp_path / "base", ["lm_head"])
    attempts = Attempts(tmp_path / "base")
    key = KEY if layer == "experts" else "model.layers.0.self_attn.q_proj.weight"
    parts = {name: tensor for name, tensor in tensors.items() if name.startswith(key)}
    assert len(parts) == 6
    for name, tensor in parts.items():
        for misfit in misfits(tensor):
            write_tensors(tmp_path / "base", {**tensors, name: misfit})
            attempts.load()
        write_tensors(tmp_path / "base", {one: tensor for one, tensor in tensors.items() if one != name})
        attempts.load()
    assert (attempts.read, attempts.refused) == (1, 6 * 10 - 1)  # the only second-level scale may have no dimension
    if layer == "experts":  # transformers reads the others
        write_tensors(tmp_path / "base", {**tensors, f"{key}.nested_absmax": torch.tensor([float("inf")])})
        attempts.load()
        assert attempts.read == 1


def fused(tensors: Tensors) -> Tensors:
    prefix = "model.layers.0.mlp.experts"
    parts = {
        name: torch.stack([tensors[f"{prefix}.{expert}.{name}.weight"] for expert in range(2)])
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    others = {key: tensor for key, tensor in tensors.items() if not is_expert(key)}
    stacks = {
        "gate_up_proj": torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1),
        "down_proj": parts["down_proj"],
    }
    return {**others, **{f"{prefix}.{name}": stack for name, stack in stacks.items()}}


@pytest.mark.parametrize("is_fused", [False, True], ids=["per expert", "fused"])
def test_changed_shapes_of_weights(is_fused, dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    tensors = fused(read_tensors(dense)) if is_fused else read_tensors(dense)
    attempts = Attempts(tmp_path / "base")
    for name in [key for key in tensors if is_expert(key)]:
        # one tensor alone, and all of its kind
        for like in ([name], [key for key in tensors if key.split(".")[-2:] == name.split(".")[-2:]]):
            tensor = tensors[name]
            for misfit in (
                *misfits(tensor),
                tensor[None],
                tensor[None, None],
                tensor[:1],
                tensor[..., :32],
                tensor[0],
            ):
                write_tensors(tmp_path / "base", {**tensors, **dict.fromkeys(like, misfit)})
                attempts.load()
    assert attempts.read == 0


def test_changed_headers(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    whole = file.read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + size])
    attempts = Attempts(tmp_path / "base")

    def attempt(text: bytes, length: int | None = None, end: int | None = None) -> None:
        length = len(text) if length is None else length
        file.write_bytes((struct.pack("<Q", length) + text + whole[8 + size :])[:end])
        attempts.load()

    for path, found in changes({name: header[name] for name in ("__metadata__", KEY)}):
        if path:
            attempt(json.dumps(changed(header, path, found)).encode())
    for text in NOT_JSON:
        attempt(text)
    text = whole[8 : 8 + size]
    for length in (0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1):
        attempt(text, length)
    for end in (0, 1, 7, 8, 9, 100, 8 + size, len(whole) - 1):
        attempt(text, end=end)
    assert attempts.refused > 150
    # metadata with any text
    assert attempts.read == 3 + 5
    attempt(text)
    assert attempts.read == 3 + 5 + 1


def test_changed_configs_of_this_package(dense, tmp_path):
    config = MoeQuantizationConfig(quantize_linear=False, double_quant=True)
    load_quantized(str(dense), config, device_map="cpu").save_pretrained(tmp_path / "base")
    attempts = Attempts(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    options = json.loads(file.read_text())

    def attempt(text: bytes) -> None:
        file.write_bytes(text)
        attempts.load()
        attempts.do(lambda: inspect_checkpoint(tmp_path / "base"))

    for path, found in changes({"quantization_config": options["quantization_config"]}):
        if path:
            attempt(json.dumps(changed(options, path, found)).encode())
    for text in (*NOT_JSON, b"[]", b"7"):
        attempt(text)
    assert attempts.refused > 300
    assert attempts.read % 2 == 0  # each is accepted by both readers, or by neither
