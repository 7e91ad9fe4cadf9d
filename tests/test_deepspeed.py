"""DeepSpeed's ZeRO-2 and ZeRO-3 through a Trainer, in two processes, against one process without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_training import CASES, Case, arguments, batches, build, losses, stored, trainer
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import assert_same_bytes, tiny_model
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQuantizationConfig

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed; pip install deepspeed")
pytestmark = pytest.mark.filterwarnings("ignore")
REPOSITORY = Path(__file__).parents[1]
STAGES = {2: "deepspeed_zero2.yaml", 3: "deepspeed_zero3.yaml"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("deepspeed")
    tiny_model(std=0.08).save_pretrained(directory / "base")
    return directory


@pytest.fixture(scope="module", params=STAGES)
def shared(request: pytest.FixtureRequest, directory: Path) -> tuple[int, Path, list[dict[str, Any]]]:
    """The stage, where its processes wrote, and what each of them found."""
    ours = directory / f"zero{request.param}"
    ours.mkdir()
    (ours / "base").symlink_to(directory / "base")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [REPOSITORY / "examples" / "configs" / STAGES[request.param], "tests/deepspeed_training.py", ours]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return request.param, ours, [torch.load(ours / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(directory: Path) -> dict[Case, dict[str, Any]]:
    """What one process finds, by case."""
    return {}


def of_one(directory: Path, case: Case, known: dict[Case, dict[str, Any]]) -> dict[str, Any]:
    if case not in known:
        args = arguments(directory / "alone", world=1, save_strategy="no", bf16=case.bf16)
        one = trainer(build(directory, case), args, case)
        before = stored(one.model)["packed"]
        one.train()
        known[case] = {"before": before, "losses": losses(one), **stored(one.model)}
    return known[case]


@pytest.mark.parametrize("name", CASES)
def test_as_one_process(name, shared, directory, alone):
    stage, _, of_ranks = shared
    case = CASES[name]
    # captures need a GPU; calls stand in for them in the processes alone
    expected = of_one(directory, Case(**{**vars(case), "graphs": False}), alone)
    # AdamW divides by roots of squared gradients, which for the smallest of these are rounding alone
    tolerance, of_factors = 1e-5, 2e-4
    if case.linear:  # bitsandbytes' product on a CPU depends on the number of rows
        tolerance, of_factors = 1e-4, 2e-3
    if case.bf16:  # DeepSpeed has an engine of its own for it
        tolerance, of_factors = 3e-2, 5e-2
    if case.eight_bit:  # whose blocks reach over parameters
        tolerance, of_factors = 1e-3, 2e-2
    for found in (one[name] for one in of_ranks):
        torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=tolerance)
        torch.testing.assert_close(found["factors"], expected["factors"], rtol=0, atol=of_factors)
        assert_same_bytes(found["packed"], expected["before"])
        assert bool(found["sharded"]) == (stage == 3 and not case.is_whole)
        if stage == 3 and not case.is_whole:
            assert found["sharded"] == len(found["packed"])
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
        ours / "base", dtype=torch.float32, quantization_config=MoeQuantizationConfig(quantize_linear=False)
    )
    model = PeftModel.from_pretrained(base, ours / "saved").eval()
    ids = torch.stack([one["input_ids"] for one in batches()])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, of_ranks[0]["gathered"]["logits"])
    model.merge_adapter()
    merged = stored(model)["packed"]
    assert_same_bytes(of_ranks[0]["gathered"]["merged"], merged)
    assert all(one["gathered"]["is unmerged"] for one in of_ranks)


def test_no_file_is_larger_than_it_has_to_be(shared):
    """Engine checkpoints leave out what is frozen."""
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


GATHER = (
    r"is sharded over processes by ZeRO-3, and {} needs all of it\. Gather first: .*GatheredParameters.* Or save the"
)
BEFORE = r"^model\.layers\.0\.mlp\.experts is sharded over processes by ZeRO-3; .* give it all its adapters before"
APART = r"^The model is sharded by ZeRO-3, .* Save the adapter, load it onto its base in one process"
REFUSED = {
    "merge": r"^model\.\S+ " + GATHER.format("merging"),
    "unmerge": r"^model\.\S+ " + GATHER.format("unmerging"),
    "merge and unload": GATHER.format("merging"),
    "merge and unload, gathered": APART,
    "unload": GATHER.format("taking an adapter off its layers"),
    "unload, gathered": APART,
    "add": BEFORE,
    "add, gathered": BEFORE,
    "combine": BEFORE,
    "load": r"lora_A\.default\.weight " + GATHER.format("loading an adapter"),
    "decode": GATHER.format("decoding a stack"),
    "delta": GATHER.format("a delta of all experts"),
}


def test_what_needs_whole_parameters_is_refused(shared):
    stage, ours, of_ranks = shared
    if stage != 3:
        pytest.skip("nothing is taken apart")
    for rank, found in enumerate(of_ranks):
        assert re.search(BEFORE, found["made whole"])
        for name, message in REFUSED.items():
            assert re.search(message, found["refused"][name]), name
        assert found["refused"]["adapters"] == "['default']"
        assert "default: 4" in found["refused"]["report"]
        assert "14,336 adapter parameters" in found["refused"]["report"]
        # the first process is asked before it writes; others may write, and are asked afterwards
        before = r"lora_A\.default\.weight is sharded over processes by ZeRO-3, which has left \(0,\) of"
        after = r"has been written with an empty .* Save again, with is_main_process and state_dict"
        assert re.search(after if rank else before, found["refused"]["save"])
        assert not (ours / f"refused-{rank}" / "adapter_config.json").exists()
    assert re.search(r"lack .*experts.*lora_A.* zero3_save_16bit_model", of_ranks[0]["refused"]["save nothing"])
