"""DeepSpeed's Ulysses sequence parallelism in two processes, compared with one process that has whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calling_backend import CallingBackend
from distributed_training import launch, saved_results
from peft import get_peft_model
from safetensors.torch import load_file
from sequence_parallel_training import (
    CASES,
    Case,
    arguments,
    backward,
    backward_in_parts,
    build,
    factors,
    losses,
    norms,
    packed,
    rows,
)
from tiny_models import assert_same_bytes, tiny_model, token_ids
from transformers import Trainer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training
from peft_moe_qlora.training import graphs_report, layer_runner

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sequence_parallel")
    tiny_model(std=0.08).save_pretrained(directory / "base")
    return directory


def train(directory: Path, stage: int) -> list[dict[str, Any]]:
    """The results of each of two processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install deepspeed")
    pytest.importorskip(
        "accelerate", minversion="1.12", reason="accelerate has no sequence parallelism; pip install accelerate>=1.12"
    )
    launch(
        "deepspeed_sequence_parallel.yaml",
        "sequence_parallel_training.py",
        directory,
        options=["--zero_stage", stage],
        DS_ACCELERATOR="cpu",
    )
    return saved_results(directory / f"zero{stage}")


@pytest.fixture(scope="module")
def shared(directory: Path) -> list[dict[str, Any]]:
    return train(directory, 3)


@pytest.fixture(scope="module")
def single_process(directory: Path) -> dict[str, Any]:
    args = arguments(directory / "alone", use_cpu=True, save_strategy="no")
    one = Trainer(build(directory, CASES["plain"]), args, train_dataset=rows())
    before = packed(one.model)
    one.train()
    found = {"losses": losses(one), "norms": norms(one), "evaluated": one.evaluate(rows())["eval_loss"]}
    return {**found, "factors": factors(one.model), "packed": before}


def assert_equals_single_process(found: dict[str, Any], single_process: dict[str, Any], adapter: Path) -> None:
    for name in ("losses", "norms", "evaluated", "factors"):
        torch.testing.assert_close(found[name], single_process[name], rtol=0, atol=1e-5)
    assert_same_bytes(found["packed"], single_process["packed"])
    expected = {name.replace(".default.", "."): one for name, one in found["factors"].items()}
    assert_same_bytes(load_file(adapter / "adapter_model.safetensors"), expected)


def test_trainer_equals_one_process(shared, single_process, directory):
    for found in shared:
        assert_equals_single_process(found, single_process, directory / "zero3")


def test_gradients_are_summed_under_zero2(single_process, directory):
    """The script doubles clipping norm and epsilon for ZeRO-2, as both depend on the size of the gradients."""
    for found in train(directory, 2):
        assert_equals_single_process(
            {**found, "norms": [norm / 2 for norm in found["norms"]]}, single_process, directory / "zero2"
        )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.router_loss])
def test_gradients(name, shared, directory):
    # captures need a GPU; plain calls replace them only in the launched processes
    case = Case(**{**vars(CASES[name]), "graphs": False})
    expected = backward(build(directory, case), case, 1, 0)
    for found in shared:
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)


def test_router_loss_is_computed_per_part(shared, directory):
    """Each process balances the experts over its own tokens."""
    expected = backward_in_parts(build(directory, CASES["router loss"]), 2)
    whole = expected.pop("whole")
    for found in shared:
        torch.testing.assert_close(found["router loss"], expected, rtol=0, atol=1e-6)
        assert (found["router loss"]["loss"] - whole).abs() > 2e-5


def test_no_graphs(shared):
    for found in shared:
        assert found["graphs report"].startswith("0 graphs of layers")
        assert "4 times: its attention exchanges parts of sequences between processes" in found["graphs report"]
        assert "(DeepSpeed's Ulysses)" in found["graphs report"]


@pytest.mark.parametrize("engine", ["DeepSpeed's Ulysses", "torch's context parallelism"])
def test_captured_layers_are_not_used_with_split_sequences(engine, monkeypatch):
    monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", CallingBackend)
    model = tiny_model()
    prepare_model_for_training(model, cuda_graphs=True)
    model = get_peft_model(model, MoeQLoraConfig(r=2)).train()
    ids = token_ids()
    for _ in range(2):
        model(input_ids=ids)
    assert graphs_report(model) == "2 graphs of layers, for 1 input shapes"
    if engine.startswith("torch"):
        table, name, module = vars(torch.nn.functional), "scaled_dot_product_attention", "torch.distributed.tensor"
    else:
        table, name, module = ALL_ATTENTION_FUNCTIONS, model.config._attn_implementation, "deepspeed.runtime"
    original = table[name]

    def split(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return original(*args, **kwargs)

    split.__module__, calls = module, []
    with monkeypatch.context() as engine_at_work:
        engine_at_work.setitem(table, name, split)
        model(input_ids=ids)
    assert len(calls) == 2
    why = f"without a graph, 2 times: its attention exchanges parts of sequences between processes ({engine})"
    assert why in graphs_report(model)
    model(input_ids=ids)
    assert len(calls) == 2
