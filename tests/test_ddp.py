"""Training by DistributedDataParallel is that of one process, and packed weights aren't sent needlessly."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_training import (
    CASES,
    WORLD,
    alone,
    assert_same_training,
    build,
    graphs_by_calling,
    launch,
    saved_keys,
    start,
    train,
    write_checkpoint,
)
from tiny_models import assert_same_bytes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel import distributed as ddp_module
from trained_by_trainer import SAVED_AT, run_all

from peft_moe_qlora.training import graphs_report, skip_broadcast


def train_all(rank: int, directory: Path) -> None:
    found = {}
    for name, case in CASES.items():
        with graphs_by_calling(case):
            model = build(directory, case)
        found[name] = train(model, case, DistributedDataParallel(model), rank, WORLD)
        if case.by_graphs:
            found["report"] = graphs_report(model.get_base_model())
    found["sent"] = {name: broadcast(rank, directory, name) for name in ("all", "none", "different")}
    torch.save(found, directory / f"{rank}.pt")


def broadcast(rank: int, directory: Path, which: str) -> dict[str, object]:
    """What DDP sends when it wraps a model, after which the model trains."""
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
    start(train_all, directory)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def by_trainer(directory, tmp_path_factory) -> list[dict]:
    """What a Trainer has found in one process, and in each of several."""
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    launch("ddp.yaml", "trained_by_trainer.py", directory, several)
    found = [torch.load(several / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]
    return [run_all(directory, one, 1), *found]


@pytest.mark.parametrize("name", CASES)
def test_training(directory, found, name):
    expected = alone(directory, CASES[name])
    for of_rank in found:
        assert_same_training(of_rank[name], expected)
    first, second = (of_rank[name].factors for of_rank in found)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_layers_ran_from_graphs(found):
    assert found[0]["report"] == "2 graphs of layers, for 1 shapes of inputs"


def test_packed_weights_are_not_sent(directory, found):
    expected = alone(directory, CASES["4-bit linear"])
    for of_rank in found:
        everything, rest = of_rank["sent"]["all"], of_rank["sent"]["none"]
        assert rest["skipped"] == rest["integers"] > 0
        assert rest["sent"] == everything["sent"] - rest["integers"]
        assert not rest["warnings"]
        assert_same_training(rest["run"], expected)


def test_what_differs_is_sent(directory, found):
    expected = alone(directory, CASES["4-bit linear"])
    for of_rank in found:
        sent = of_rank["sent"]["different"]
        assert 0 < sent["skipped"] < sent["integers"]
        assert sent["sent"] == of_rank["sent"]["all"]["sent"] - sent["skipped"]
        assert len(sent["warnings"]) == 1
        assert (
            "1 packed weights are not the same in all processes, base_model.model.model.layers.0"
            in sent["warnings"][0]
        )
        assert sent["run"].losses == of_rank["sent"]["all"]["run"].losses
        assert_same_training(sent["run"], expected)


def test_weights_are_compared_in_a_group_only():
    with pytest.raises(RuntimeError, match=r"no process group yet.*TrainingArguments first"):
        skip_broadcast(nn.Linear(2, 2))


def test_trainer(by_trainer):
    expected, *several = by_trainer
    for found in several:
        assert found["wrapped"] == "DistributedDataParallel"
        assert found["skipped"] > 0
        assert_same_training(found["straight"], expected["straight"])
        assert found["evaluated"] == pytest.approx(expected["evaluated"], abs=1e-5)
        assert_same_bytes(found["saved"], saved_keys(found["straight"].factors))


def test_trainer_resumes(by_trainer):
    for found in by_trainer:
        if "resumed" not in found:
            pytest.skip(
                "this transformers reads files to cpu:0, which torch doesn't know: pip install --upgrade transformers"
            )
        assert found["resumed"].losses == found["straight"].losses[SAVED_AT:]
        assert_same_bytes(found["resumed"].factors, found["straight"].factors)
