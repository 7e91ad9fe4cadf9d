"""Training with DistributedDataParallel equals one process, and packed weights are not broadcast unnecessarily."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from distributed_training import (
    CASES,
    WORLD,
    assert_same_training,
    build,
    graphs_by_calling,
    start,
    train,
    train_alone,
    write_checkpoint,
)
from packaging.version import Version
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp_module
from trained_by_trainer import assert_as_one_process, assert_resumed, train_alone_and_distributed

from peft_moe_qlora.training import graphs_report, skip_broadcast


def train_all(rank: int, directory: Path) -> dict[str, object]:
    found = {}
    for name, case in CASES.items():
        with graphs_by_calling(case):
            model = build(directory, case)
        found[name] = train(model, case, DistributedDataParallel(model), rank, WORLD)
        if case.by_graphs:
            found["report"] = graphs_report(model.get_base_model())
    found["sent"] = {name: broadcast(rank, directory, name) for name in ("all", "none", "different")}
    return found


def broadcast(rank: int, directory: Path, which: str) -> dict[str, object]:
    """The tensors that DDP broadcasts when it wraps a model, which is then trained."""
    case, sent = CASES["4-bit linear"], []
    model = build(directory, case)
    found: dict[str, object] = {
        "integers": sum(one.nbytes for one in model.parameters() if not one.is_floating_point())
    }
    if which == "different" and rank == 1:
        codes = next(one for name, one in model.named_parameters() if name.endswith(".codes"))
        codes[0, 0] ^= 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found["skipped"] = 0 if which == "all" else skip_broadcast(model)
    found["warnings"] = [str(one.message) for one in caught if one.category is RuntimeWarning]
    original = ddp_module.dist._broadcast_coalesced

    def count(group: dist.ProcessGroup, tensors: list[torch.Tensor], *args: object) -> None:
        sent.append(sum(tensor.nbytes for tensor in tensors))
        original(group, tensors, *args)

    ddp_module.dist._broadcast_coalesced = count
    try:
        wrapped = DistributedDataParallel(model)
    finally:
        ddp_module.dist._broadcast_coalesced = original
    found["sent"] = sum(sent)
    found["run"] = train(model, case, wrapped, rank, WORLD)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("ddp")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def found(directory) -> list[dict]:
    return start(train_all, directory)


@pytest.fixture(scope="module")
def trainer_results(directory, tmp_path_factory) -> list[dict]:
    """The results of a Trainer in one process, and in each of several."""
    return train_alone_and_distributed("ddp.yaml", directory, tmp_path_factory.mktemp("by trainer"))


@pytest.mark.parametrize("name", CASES)
def test_training(directory, found, name):
    expected = train_alone(directory, CASES[name])
    # if rounding decides between two values of an 8-bit state, the update of a factor differs slightly
    of_factors = 1e-3 if name == "8-bit AdamW" else 1e-5
    for of_rank in found:
        assert_same_training(of_rank[name], expected, of_factors)
    first, second = (of_rank[name].factors for of_rank in found)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_layers_ran_from_graphs(found):
    assert found[0]["report"] == "2 graphs of layers, for 1 input shapes"


def test_packed_weights_are_not_broadcast(directory, found):
    expected = train_alone(directory, CASES["4-bit linear"])
    for of_rank in found:
        everything, rest = of_rank["sent"]["all"], of_rank["sent"]["none"]
        assert rest["skipped"] == rest["integers"] > 0
        assert rest["sent"] == everything["sent"] - rest["integers"]
        assert not rest["warnings"]
        assert_same_training(rest["run"], expected)


def test_differing_weights_are_broadcast(directory, found):
    expected = train_alone(directory, CASES["4-bit linear"])
    for of_rank in found:
        sent = of_rank["sent"]["different"]
        assert 0 < sent["skipped"] < sent["integers"]
        assert sent["sent"] == of_rank["sent"]["all"]["sent"] - sent["skipped"]
        assert len(sent["warnings"]) == 1
        assert "1 packed weights, such as base_model.model.model.layers.0" in sent["warnings"][0]
        assert "differ between processes" in sent["warnings"][0]
        assert sent["run"].losses == of_rank["sent"]["all"]["run"].losses
        assert_same_training(sent["run"], expected)


def test_weights_are_compared_only_in_a_process_group():
    with pytest.raises(RuntimeError, match=r"has no process group.*TrainingArguments first"):
        skip_broadcast(nn.Linear(2, 2))


def test_trainer(trainer_results):
    expected, *several = trainer_results
    for found in several:
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["skipped"] > 0
        assert_as_one_process(found, expected)


def test_trainer_resumes(trainer_results):
    for found in trainer_results:
        if "resumed" not in found:
            assert Version(transformers.__version__) < Version("5.24")
            pytest.skip(
                "this transformers loads to cpu:0, which torch does not support: pip install --upgrade transformers"
            )
        assert_resumed(found)
