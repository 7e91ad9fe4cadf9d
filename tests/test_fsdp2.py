"""Training with FSDP2 equals one process, codes and scales do not change, and the full adapter is saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from distributed_training import (
    CASES,
    STEPS,
    WORLD,
    adapted,
    assert_same_training,
    batch,
    build,
    factors,
    graphs_by_calling,
    packed,
    saved_keys,
    start,
    train,
    train_alone,
    trained,
    write_checkpoint,
)
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_bytes, logits, token_ids
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from trained_by_trainer import assert_as_one_process, assert_resumed, train_alone_and_distributed
from transformers import AutoModelForCausalLM

from peft_moe_qlora import (
    MoeQuantizationConfig,
    QuantizedExperts,
    prepare_model_for_training,
    read_part_of_experts,
    save_bitsandbytes,
)
from peft_moe_qlora.loading import Checkpoint
from peft_moe_qlora.training import graphs_report, shard_layers
from peft_moe_qlora.training.fsdp2 import OLDEST_TORCH

HAS_FSDP2 = Version(Version(torch.__version__).base_version) >= Version(OLDEST_TORCH)
needs_fsdp2 = pytest.mark.skipif(
    not HAS_FSDP2, reason=f"FSDP2 supports integer parameters from torch {OLDEST_TORCH}: pip install --upgrade torch"
)
PLAIN = CASES["plain"]
MIXED = replace(CASES["double_quant, checkpointing"], quantize_linear=True)
GATHERED = {
    "merge_adapter": lambda model: model.merge_adapter(),
    "unmerge_adapter": lambda model: model.unmerge_adapter(),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
}
OF_BASE = {
    "save_pretrained": lambda model, directory: model.save_pretrained(directory),
    "save_bitsandbytes": lambda model, directory: save_bitsandbytes(model, directory),
    "dequantize": lambda model, directory: model.dequantize(),
}
WHOLE = {
    "add_adapter": lambda model: model.add_adapter("other", model.peft_config["default"]),
    "add_weighted_adapter": lambda model: model.base_model.add_weighted_adapter(["default"], [1.0], "mixed"),
}


def train_all(rank: int, directory: Path) -> dict[str, object]:
    found = {"train": {}}
    mesh = init_device_mesh("cpu", (WORLD,))
    for name, case in CASES.items():
        with graphs_by_calling(case):
            model = build(directory, case)
        size = sum(one.nbytes for one in model.parameters())
        shard_layers(model, mesh=mesh)
        if name == "8-bit AdamW":
            found["8-bit AdamW"] = error_of(partial(train, model, case, rank=rank, world=WORLD))
            continue
        found["train"][name] = train(model, case, rank=rank, world=WORLD)
        if case.by_graphs:
            found["report"] = graphs_report(model.get_base_model())
        if case is PLAIN:
            found["share"] = sum(one.to_local().nbytes for one in model.parameters()) / size
            found["after"] = {**results_of_sharded_model(model, directory, rank), "factors": factors(model)}
    found["base"] = errors_of_sharded_base(rank, directory, mesh)
    found["experts"] = experts_as_units(rank, directory, mesh)
    found["as one"] = whole_model_as_unit(rank, directory, mesh)
    found["precision"] = mixed_precision(rank, directory, mesh)
    found["resumed"] = resumed(rank, directory, mesh)
    found["adapters"] = two_adapters(rank, directory, mesh)
    found["parts"] = {str(size): read_in_parts(rank, directory, mesh, size) for size in (8, 3)}
    return found


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def results_of_sharded_model(model: PeftModel, directory: Path, rank: int) -> dict[str, object]:
    """The results of PEFT's functions on a sharded model after training."""
    refused = {name: error_of(partial(action, model)) for name, action in (GATHERED | WHOLE).items()}
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    refused["unshard, merge_adapter"] = error_of(model.merge_adapter)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    model.save_pretrained(directory / "adapter", is_main_process=rank == 0)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    register_fsdp_forward_method(model, "generate")
    generated = model.eval().generate(input_ids=token_ids(), max_new_tokens=4, do_sample=False)
    with model.disable_adapter():
        of_base = model(input_ids=token_ids()).logits.detach()
    model.train()
    return {
        "generated": generated,
        "of base": of_base,
        "refused": refused,
        "keys": sorted(get_model_state_dict(model, options=options)),
    }


def errors_of_sharded_base(rank: int, directory: Path, mesh: object) -> dict[str, object]:
    """The errors for a sharded model without an adapter, and whether the model is unchanged."""
    model = build(directory, PLAIN).unload()
    before = packed(model)
    shard_layers(model, mesh=mesh)
    refused = {name: error_of(partial(action, model, directory / "base")) for name, action in OF_BASE.items()}
    after = packed(model)
    return {"refused": refused, "is the same": all(torch.equal(after[name], one) for name, one in before.items())}


def experts_as_units(rank: int, directory: Path, mesh: object) -> object:
    """Experts as FSDP units; no other unit except the root."""
    model = build(directory, PLAIN)
    for module in model.modules():
        if isinstance(module, QuantizedExperts):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, PLAIN, rank=rank, world=WORLD)


def whole_model_as_unit(rank: int, directory: Path, mesh: object) -> tuple[object, str]:
    """The whole model as one unit, which the layers are not aware of."""
    case = CASES["graphs"]
    with graphs_by_calling(case):
        model = build(directory, case)
    fully_shard(model, mesh=mesh)
    return train(model, case, rank=rank, world=WORLD), graphs_report(model.get_base_model())


def mixed_precision(rank: int, directory: Path, mesh: object) -> dict[str, object]:
    """Compares the weights of experts and linear layers, decoded in the forward, with those before sharding."""
    model = build(directory, MIXED)
    experts = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    linear = [module for module in model.modules() if isinstance(module, Linear4bit)]

    def decoded(module: QuantizedExperts) -> list[torch.Tensor]:
        return [module.stack(projection).decode(torch.float32) for projection in module.layout.projections]

    def of_4_bits(module: Linear4bit) -> torch.Tensor:
        return dequantize_4bit(module.weight.detach(), module.quant_state)

    expected = {id(module): decoded(module) for module in experts}
    of_linear = {id(module): of_4_bits(module) for module in linear}
    seen, seen_linear = [], []

    def check_linear(module: Linear4bit, args: tuple) -> None:
        seen_linear.append(torch.equal(of_4_bits(module), of_linear[id(module)]))
        seen_linear.append(args[0].dtype == torch.bfloat16)

    def check_experts(module: QuantizedExperts, args: tuple) -> None:
        seen.append(all(torch.equal(*pair) for pair in zip(decoded(module), expected[id(module)])))
        seen.append(module.lora_dtype == torch.bfloat16)

    for module in experts:
        module.lora_dtype = None
        module.register_forward_pre_hook(
            lambda module, args: setattr(module, "lora_dtype", module.down_proj.factors("default")[0].dtype)
        )
        module.register_forward_pre_hook(check_experts)
    for module in linear:
        module.register_forward_pre_hook(check_linear)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard_layers(model, mesh=mesh, mp_policy=policy)
    return {"run": train(model, MIXED, rank=rank, world=WORLD), "seen": seen, "seen linear": seen_linear}


def resumed(rank: int, directory: Path, mesh: object) -> dict[str, object]:
    """Resumes from states of factors and optimizer that were gathered after the first step."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    into = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    states, ends = None, []
    for first_step in (0, 1):
        model = build(directory, PLAIN)
        shard_layers(model, mesh=mesh)
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        if states is not None:
            set_model_state_dict(model, states[0], options=into)
            set_optimizer_state_dict(model, optimizer, states[1], options=into)
        for step in range(first_step, STEPS):
            ids = batch(step, rank, WORLD)
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if states is None:
                found = [
                    get_model_state_dict(model, options=options),
                    get_optimizer_state_dict(model, optimizer, options=options),
                ]
                states = copy.deepcopy(found)  # on a CPU the step counters are not copied
        ends.append(factors(model))
    return {"straight": ends[0], "resumed": ends[1], "is_whole": bool(states[0]) == (rank == 0)}


def two_adapters(rank: int, directory: Path, mesh: object) -> dict[str, object]:
    """Two adapters trained in turn; then one is deleted, and one replaced by a file."""
    model = build(directory, PLAIN)
    model.add_adapter("other", model.peft_config["default"])
    shard_layers(model, mesh=mesh)
    train(model, PLAIN, rank=rank, world=WORLD)
    before = factors(model)
    model.set_adapter("other")
    train(model, PLAIN, rank=rank, world=WORLD)
    moved = {name for name, one in factors(model).items() if not torch.equal(one, before[name])}
    model.set_adapter("default")
    model.delete_adapter("other")
    model.load_adapter(directory / "adapter", "default", is_trainable=True)
    run = train(model, PLAIN, rank=rank, world=WORLD)
    return {"moved": moved, "before": set(before), "run": run}


def read_in_parts(rank: int, directory: Path, mesh: object, num_experts: int) -> dict[str, object]:
    """A model of which each process reads its own experts."""
    source = directory / f"of {num_experts}"
    read, read_key = [], Checkpoint.read
    unquantized_linear = MoeQuantizationConfig(quantize_linear=False)

    def count(self: Checkpoint, key: str) -> torch.Tensor:
        read.append(key)
        return read_key(self, key)

    Checkpoint.read = count
    try:
        with read_part_of_experts(rank, WORLD, "cpu"):
            base = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, quantization_config=unquantized_linear, device_map="cpu"
            )
    finally:
        Checkpoint.read = read_key
    refused = error_of(lambda: logits(base, token_ids()))
    saved = error_of(lambda: base.save_pretrained(directory / "base"))
    prepare_model_for_training(base, **PLAIN.prepare)
    model = adapted(base, PLAIN)
    merged = error_of(model.merge_adapter)
    shard_layers(model, mesh=mesh)
    found = {"read": read, "refused": refused, "saved": saved, "merged": merged, "packed": packed(model)}
    return {**found, "run": train(model, PLAIN, rank=rank, world=WORLD)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("fsdp2")
    write_checkpoint(directory)
    for num_experts in (8, 3):
        write_checkpoint(directory / f"of {num_experts}", num_experts=num_experts)
    return directory


@pytest.fixture(scope="module")
def found(directory) -> list[dict]:
    return start(train_all, directory)


@pytest.fixture(scope="module")
def trainer_results(directory, tmp_path_factory) -> list[dict]:
    """The results of a Trainer in one process, and in each of several."""
    return train_alone_and_distributed("fsdp2.yaml", directory, tmp_path_factory.mktemp("by trainer"))


@needs_fsdp2
@pytest.mark.parametrize("name", [name for name in CASES if name != "8-bit AdamW"])
def test_training(directory, found, name):
    expected = train_alone(directory, CASES[name])
    for of_rank in found:
        assert_same_training(of_rank["train"][name], expected)


@needs_fsdp2
def test_every_process_holds_half(found):
    assert all(0.5 <= of_rank["share"] < 0.502 for of_rank in found)


@needs_fsdp2
def test_layers_are_not_captured(found):
    report = found[0]["report"]
    assert report.startswith("0 graphs of layers")
    assert "its parameters are sharded by FSDP2" in report


@needs_fsdp2
def test_experts_as_units(directory, found):
    assert_same_training(found[0]["experts"], train_alone(directory, PLAIN))


@needs_fsdp2
def test_model_as_one_unit(directory, found):
    run, report = found[0]["as one"]
    assert_same_training(run, train_alone(directory, CASES["graphs"]))
    assert report.startswith("0 graphs of layers")
    assert "its parameters are sharded by FSDP2" in report


@needs_fsdp2
def test_mixed_precision_keeps_packed_weights(directory, found):
    expected = train_alone(directory, MIXED)
    for of_rank in found:
        run, seen = of_rank["precision"]["run"], of_rank["precision"]["seen"]
        # two checks in two layers, in two forwards of each step with checkpointing
        assert len(seen) == 2 * 2 * 2 * STEPS
        assert all(seen)
        # of four linear layers each
        assert len(of_rank["precision"]["seen linear"]) == 4 * len(seen)
        assert all(of_rank["precision"]["seen linear"])
        assert run.is_packed_the_same
        torch.testing.assert_close(run.losses, expected.losses, rtol=0, atol=0.02)


@needs_fsdp2
def test_bitsandbytes_optimizers_are_rejected(found):
    for of_rank in found:
        assert "UnsyncedAdamW8bit does not support parameters that are sharded" in of_rank["8-bit AdamW"]


@needs_fsdp2
@pytest.mark.parametrize("name", GATHERED)
def test_operations_on_whole_weights_are_rejected(found, name):
    for of_rank in found:
        assert "is sharded over processes by FSDP2" in of_rank["after"]["refused"][name]
        assert "Save the adapter with save_pretrained(" in of_rank["after"]["refused"][name]


@needs_fsdp2
@pytest.mark.parametrize("name", OF_BASE)
def test_saving_a_sharded_model_is_rejected(directory, found, name):
    for of_rank in found:
        assert "is sharded over processes by FSDP2" in of_rank["base"]["refused"][name]
        assert of_rank["base"]["is the same"]
    assert not list((directory / "base").glob("*.safetensors"))


@needs_fsdp2
@pytest.mark.parametrize("name", WHOLE)
def test_adding_an_adapter_after_sharding_is_rejected(found, name):
    for of_rank in found:
        assert "shard it after all adapters are added" in of_rank["after"]["refused"][name]


@needs_fsdp2
def test_merging_while_gathered_is_rejected(found):
    """FSDP2 would discard deltas merged into linear layers while they are gathered."""
    assert all(
        "requires the whole tensor" in of_rank["after"]["refused"]["unshard, merge_adapter"] for of_rank in found
    )


@needs_fsdp2
def test_full_adapter_is_saved(directory, found):
    saved = load_file(directory / "adapter" / "adapter_model.safetensors")
    expected = found[0]["after"]["factors"]
    assert_same_bytes(saved, saved_keys(expected))
    assert found[0]["after"]["keys"] == sorted(expected)
    assert found[1]["after"]["keys"] == []
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        quantization_config=MoeQuantizationConfig(quantize_linear=False),
        device_map="cpu",
    )
    of_base = logits(model, token_ids())
    model = PeftModel.from_pretrained(model, directory / "adapter")
    assert_same_bytes(factors(model), expected)
    generated = model.generate(input_ids=token_ids(), max_new_tokens=4, do_sample=False)
    for of_rank in found:
        assert torch.equal(of_rank["after"]["generated"], generated)
        torch.testing.assert_close(of_rank["after"]["of base"], of_base)


@needs_fsdp2
def test_resuming(found):
    for of_rank in found:
        assert of_rank["resumed"]["is_whole"]
        assert_same_bytes(of_rank["resumed"]["resumed"], of_rank["resumed"]["straight"])


@needs_fsdp2
def test_adapters_take_turns(found):
    for of_rank in found:
        adapters = of_rank["adapters"]
        assert adapters["moved"] == {name for name in adapters["before"] if ".other." in name} != set()
        assert adapters["run"].is_packed_the_same
        # the factors in the file were trained for as many steps before
        assert adapters["run"].losses[0] < of_rank["train"]["plain"].losses[0]


@needs_fsdp2
@pytest.mark.parametrize("num_experts", [8, 3])
def test_reading_part_of_the_experts(directory, found, num_experts):
    source = directory / f"of {num_experts}"
    whole_model = build(source, PLAIN)
    expected, run = packed(whole_model), train_alone(source, PLAIN)
    keys = [of_rank["parts"][str(num_experts)]["read"] for of_rank in found]
    # three tensors of each expert of two layers, each read once by one process
    assert len(keys[0]) + len(keys[1]) == len({*keys[0], *keys[1]}) == 2 * 3 * num_experts
    assert len(keys[0]) == 2 * 3 * -(-num_experts // 2)
    for of_rank in found:
        part = of_rank["parts"][str(num_experts)]
        assert_same_bytes(part["packed"], expected)
        assert_same_training(part["run"], run)
        for action in ("refused", "saved", "merged"):
            assert "Shard the model with fully_shard" in part[action], action


@needs_fsdp2
def test_trainer(trainer_results):
    expected, *several = trainer_results
    for found in several:
        assert found["wrapped"] == "FSDPPeftModelForCausalLM"
        assert found["share"] == pytest.approx(expected["share"] / 2, rel=0.01)
        assert_as_one_process(found, expected)


@needs_fsdp2
def test_trainer_resumes(trainer_results):
    for found in trainer_results:
        assert_resumed(found)


@needs_fsdp2
def test_trainer_with_part_of_the_experts(trainer_results):
    """Each process read its own experts, and accelerate shards them."""
    expected, *several = trainer_results
    for found in several:
        assert_same_training(found["part"], expected["straight"])
        assert_same_bytes(found["packed of parts"], expected["packed"])


@needs_fsdp2
def test_trainer_with_4_bit_linear(trainer_results):
    """accelerate keeps bitsandbytes' linear layers whole in each process."""
    for found in trainer_results[1:]:
        assert found["left whole"] == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_rank_out_of_range_is_rejected():
    with pytest.raises(ValueError, match="rank=2 is out of range for world_size=2"), read_part_of_experts(2, 2):
        pass


def test_models_without_decoder_layers_are_rejected():
    message = "has no GradientCheckpointingLayer" if HAS_FSDP2 else f"Expected torch {OLDEST_TORCH} or later"
    with pytest.raises((RuntimeError, ValueError), match=message):
        shard_layers(nn.Linear(2, 2))
