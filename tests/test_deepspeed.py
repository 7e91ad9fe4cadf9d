"""DeepSpeed's ZeRO-2 and ZeRO-3 with a Trainer in two processes, compared with one process without it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_training import CASES, STEPS, Case, arguments, batches, build, logged, stored, trainer
from distributed_training import launch, saved_results
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_bytes, tiny_model
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQuantizationConfig

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore")
STAGES = {2: "deepspeed_zero2.yaml", 3: "deepspeed_zero3.yaml"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed")
    tiny_model(std=0.08).save_pretrained(directory / "base")
    return directory


@pytest.fixture(scope="module", params=STAGES)
def shared(request: pytest.FixtureRequest, directory: Path) -> tuple[int, Path, list[dict[str, Any]]]:
    """The stage, the output directory of its processes, and the results of each."""
    ours = directory / f"zero{request.param}"
    ours.mkdir()
    (ours / "base").symlink_to(directory / "base")
    launch(STAGES[request.param], "deepspeed_training.py", ours, DS_ACCELERATOR="cpu")
    return request.param, ours, saved_results(ours)


@pytest.fixture(scope="module")
def single_process(directory: Path) -> dict[Case, dict[str, Any]]:
    """The results of one process, by case."""
    return {}


def of_one(directory: Path, case: Case, known: dict[Case, dict[str, Any]]) -> dict[str, Any]:
    if case not in known:
        args = arguments(directory / "alone", world=1, save_strategy="no", bf16=case.bf16)
        one = trainer(build(directory, case), args, case)
        before = stored(one.model)
        one.train()
        known[case] = {"before": before, **logged(one), **stored(one.model)}
    return known[case]


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return float(sum((one - second[name]).square().sum() for name, one in first.items()).sqrt())


@pytest.mark.parametrize("name", CASES)
def test_training_equals_one_process(name, shared, directory, single_process):
    stage, _, of_ranks = shared
    case = CASES[name]
    # captures need a GPU; plain calls replace them only in the launched processes
    expected = of_one(directory, replace(case, graphs=False, accumulation=1), single_process)
    assert len(expected["losses"]) == STEPS
    assert min(expected["norms"]) > 0.5
    tolerance, of_movement = 1e-5, 1e-5
    if case.bf16:  # DeepSpeed's bf16 engine rounds differently
        tolerance, of_movement = 3e-2, 0.25
    if case.eight_bit:  # its blocks extend over parameters
        tolerance, of_movement = 1e-3, 3e-2
    moved = difference(expected["factors"], expected["before"]["factors"])
    for found in (one[name] for one in of_ranks):
        for figures in ("losses", "norms"):
            torch.testing.assert_close(found[figures], expected[figures], rtol=0, atol=tolerance)
        assert difference(found["factors"], expected["factors"]) < of_movement * moved
        assert_same_bytes(found["packed"], expected["before"]["packed"])
        assert bool(found["sharded"]) == (stage == 3 and not case.is_whole)
        if stage == 3 and not case.is_whole:
            assert found["sharded"] == sum(not name.endswith(".absmax") for name in found["packed"])
    assert_same_bytes(of_ranks[0][name]["factors"], of_ranks[1][name]["factors"])


def test_resuming_is_exact(shared):
    for found in shared[2]:
        assert_same_bytes(found["resumed"]["factors"], found["plain"]["factors"])
        assert_same_bytes(found["resumed"]["packed"], found["plain"]["packed"])


def test_adapters_are_saved_whole(shared):
    _, ours, of_ranks = shared
    expected = {name.replace(".default.", "."): one for name, one in of_ranks[0]["plain"]["factors"].items()}
    for place in ("saved", "saved gathered", "plain/checkpoint-3"):
        saved = load_file(ours / place / "adapter_model.safetensors")
        assert_same_bytes(saved, expected)
    base = AutoModelForCausalLM.from_pretrained(
        ours / "base",
        dtype=torch.float32,
        quantization_config=MoeQuantizationConfig(quantize_linear=False),
        device_map="cpu",
    )
    model = PeftModel.from_pretrained(base, ours / "saved").eval()
    ids = torch.stack([one["input_ids"] for one in batches()])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, of_ranks[0]["gathered"]["logits"])
    model.merge_adapter()
    merged = stored(model)["packed"]
    assert_same_bytes(of_ranks[0]["gathered"]["merged"], merged)
    assert all(one["gathered"]["is unmerged"] for one in of_ranks)


def test_engine_checkpoints_contain_no_frozen_weights(shared):
    """The files are no larger than the trained values require."""
    stage, ours, _ = shared
    frozen = sum(file.stat().st_size for file in (ours / "base").glob("*.safetensors"))
    states = list((ours / "plain" / "checkpoint-3").rglob("*model_states.pt"))
    assert len(states) == (2 if stage == 3 else 1)
    assert all(file.stat().st_size < frozen for file in states)


def test_graphs(shared):
    stage, _, of_ranks = shared
    for report in (found["graphs report"] for found in of_ranks):
        assert report.startswith("0 graphs" if stage == 3 else "2 graphs")
        assert ("without a graph, 4 times: its parameters are sharded by ZeRO-3" in report) == (stage == 3)


GATHER = r"is sharded over processes by ZeRO-3, but {} requires the whole tensor\. .*GatheredParameters.* Or save the"
BEFORE = r"^model\.layers\.0\.mlp\.experts is sharded over processes by ZeRO-3, .* add all adapters before"
APART = r"^The model is sharded by ZeRO-3, .* Save the adapter, load it onto its base in one process"
REFUSED = {
    "merge": r"^model\.\S+ " + GATHER.format("merging"),
    "unmerge": r"^model\.\S+ " + GATHER.format("unmerging"),
    "merge and unload": GATHER.format("merging"),
    "merge and unload, gathered": APART,
    "unload": GATHER.format("unloading an adapter"),
    "unload, gathered": APART,
    "add": BEFORE,
    "add, gathered": BEFORE,
    "combine": BEFORE,
    "load": r"lora_A\.default\.weight " + GATHER.format("loading an adapter"),
    "decode": GATHER.format("decoding a stack"),
    "delta": GATHER.format("computing the delta of all experts"),
}


def test_operations_on_whole_parameters_are_rejected(shared):
    stage, ours, of_ranks = shared
    if stage != 3:
        pytest.skip("ZeRO-2 does not partition parameters")
    for rank, found in enumerate(of_ranks):
        assert re.search(BEFORE, found["made whole"])
        for name, message in REFUSED.items():
            assert re.search(message, found["refused"][name]), name
        assert found["refused"]["adapters"] == "['default']"
        assert "default: 4" in found["refused"]["report"]
        assert "14,336 adapter parameters" in found["refused"]["report"]
        # the first process is checked before it writes; others may write, and are checked afterwards
        before = r"lora_A\.default\.weight is sharded over processes by ZeRO-3\. Expected .*\), found \(0,\)\."
        after = r"was written with an empty tensor .* save again with the arguments state_dict and is"
        assert re.search(after if rank else before, found["refused"]["save"])
        assert not (ours / f"refused-{rank}" / "adapter_config.json").exists()
    assert re.search(
        r"do not contain .*experts.*lora_A.* zero3_save_16bit_model", of_ranks[0]["refused"]["save nothing"]
    )
