"""The training examples run from end to end, each in a separate process, with few steps."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from peft_moe_qlora import MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.training import graphs_report, layer_runner

pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11", exc_type=ModuleNotFoundError)
import datasets
from calling_backend import LateBackend

pytestmark = pytest.mark.filterwarnings("ignore")
EXAMPLES = Path(__file__).parent.parent / "examples"
LN_2 = math.log(2)


def steps(count: int, every: int | None = None) -> list[str]:
    return ["--max_steps", str(count), "--save_strategy", "steps", "--save_steps", str(every or count)]


SFT = [*steps(6, 2), "--eval_strategy", "steps", "--eval_steps", "2", "--save_total_limit", "9"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def run_example(outputs):
    def run(script: str, output: str, *arguments: str) -> Path:
        command = [sys.executable, str(EXAMPLES / f"{script}.py"), "--output_dir", str(outputs / output), *arguments]
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "HF_DATASETS_CACHE": str(outputs / "datasets"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=outputs)
        assert result.returncode == 0, result.stderr
        return outputs / output

    return run


@pytest.fixture
def call_example(outputs, monkeypatch):
    """Runs an example in this process, with plain calls as captures and uncompiled; returns its output and model."""
    if torch.cuda.is_available():
        pytest.skip("captures by plain calls run on a CPU only")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", LateBackend)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", outputs / "datasets")

    def call(script: str, output: str, *arguments: str) -> tuple[Path, nn.Module]:
        models = []

        def prepare(model: nn.Module, compile_layers: bool = False, cuda_graphs: bool = False) -> None:
            models.append(prepare_model_for_training(model, cuda_graphs=cuda_graphs))

        example = importlib.import_module(script)
        monkeypatch.setattr(example, "prepare_model_for_training", prepare)
        monkeypatch.setattr(sys, "argv", [script, "--output_dir", str(outputs / output), *arguments])
        example.main()
        return outputs / output, models[0]

    return call


@pytest.fixture(scope="module")
def sft(run_example) -> Path:
    return run_example("sft", "sft", *SFT)


def logged(output: Path, name: str = "loss") -> list[float]:
    """All values of a metric, from the last checkpoint."""
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def assert_goes_down(losses: list[float]) -> None:
    assert all(math.isfinite(loss) for loss in losses)
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.95 * sum(losses[:third])


def factors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def assert_same_factors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


def assert_is_fp32(found: dict[str, torch.Tensor]) -> None:
    assert {factor.dtype for factor in found.values()} == {torch.float32}
    assert any(not torch.equal(factor, factor.bfloat16().float()) for name, factor in found.items() if "_B" in name)


def reloaded(auto_class: type, adapter: Path, base: str = "tiny-moe", **kwargs) -> nn.Module:
    base = adapter.parent / base
    model = auto_class.from_pretrained(
        base, dtype="auto", quantization_config=MoeQuantizationConfig(), device_map="cpu", **kwargs
    )
    return PeftModel.from_pretrained(model, adapter).eval()


def held_out(name: str) -> list[dict]:
    """The part of a data file that the examples evaluate on."""
    rows = datasets.load_dataset("json", data_files=str(EXAMPLES / "data" / name), split="train")
    return list(rows.train_test_split(test_size=0.1, seed=0)["test"])


@torch.no_grad()
def held_out_loss(model: nn.Module, tokenizer) -> float:
    """Mean loss per answer token, chat by chat."""
    total, count = 0.0, 0
    for row in held_out("chats.jsonl"):
        encoded = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        ids, answers = encoded["input_ids"], torch.as_tensor(encoded["assistant_masks"]).view(1, -1).bool()
        said = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        total -= said[answers[:, 1:]].sum().item()
        count += answers[:, 1:].sum().item()
    return total / count


def test_sft_trains_evaluates_and_keeps_the_best_adapter(sft):
    assert_goes_down(logged(sft))
    assert_is_fp32(factors(sft))
    evaluated = logged(sft, "eval_loss")
    best = 2 + 2 * min(range(len(evaluated)), key=evaluated.__getitem__)
    assert_same_factors(factors(sft), factors(sft / f"checkpoint-{best}"))
    # the loss of an answer depends neither on packing nor on the prompt, and the file contains all trained weights
    loss = held_out_loss(reloaded(AutoModelForCausalLM, sft), AutoTokenizer.from_pretrained(sft))
    assert loss == pytest.approx(min(evaluated), rel=1e-5)


def test_sft_resumes_exactly(sft, run_example):
    resumed = sft.parent / "resumed"
    shutil.copytree(sft / "checkpoint-2", resumed / "checkpoint-2")
    run_example("sft", "resumed", *SFT, "--resume")
    assert logged(resumed) == logged(sft)
    assert logged(resumed, "eval_loss") == logged(sft, "eval_loss")
    assert_same_factors(factors(resumed / "checkpoint-6"), factors(sft / "checkpoint-6"))


def test_sft_packs_to_one_shape_for_graphs(sft, call_example):
    """The settings of `fast` on a GPU, without its compiler."""
    output, model = call_example("sft", "sft-fast", *SFT, "--fast", "true")
    assert logged(output) == pytest.approx(logged(sft), rel=1e-4)
    report = graphs_report(model)
    assert "for 1 input shapes" in report
    assert "without a graph" not in report


def test_dpo_starts_from_the_sft_adapter(sft, run_example):
    dpo = run_example("dpo", "dpo", "--adapter", str(sft), *steps(6))
    losses = logged(dpo)
    # the policy initially equals its reference bit by bit
    assert losses[0] == pytest.approx(LN_2, abs=1e-6)
    assert_goes_down(losses)
    assert_same_factors(factors(dpo / "ref"), factors(sft))
    assert_is_fp32(factors(dpo))
    unchanged = [name for name, factor in factors(dpo).items() if torch.equal(factor, factors(sft)[name])]
    assert not unchanged


def test_dpo_of_a_new_adapter_uses_the_base_as_reference(sft, call_example):
    dpo, _ = call_example("dpo", "dpo-base", *steps(6))
    assert logged(dpo)[0] == pytest.approx(LN_2, abs=1e-6)
    assert_goes_down(logged(dpo))
    assert_is_fp32(factors(dpo))
    assert not (dpo / "ref").exists()


@pytest.fixture(scope="module")
def grpo(run_example) -> Path:
    return run_example("grpo", "grpo", *steps(12))


def test_grpo_increases_the_reward(grpo):
    rewards = logged(grpo, "rewards/is_number/mean")
    assert all(math.isfinite(loss) for loss in logged(grpo))
    assert sum(rewards[-3:]) > 2 * sum(rewards[:3])
    assert_is_fp32(factors(grpo))


def test_grpo_decodes_from_a_graph(grpo, call_example):
    output, model = call_example("grpo", "grpo-fast", *steps(2), "--fast", "true", "--cache_implementation", "static")
    assert logged(output, "reward") == pytest.approx(logged(grpo, "reward")[:2], rel=1e-4)
    report = graphs_report(model)
    assert "a step of decoding, replayed 15 times" in report
    assert "without a graph" not in report


@torch.no_grad()
def test_reloaded_reward_model_gives_the_same_scores(sft, run_example):
    output = run_example("reward", "reward", *steps(18), "--eval_strategy", "steps", "--eval_steps", "18")
    assert_goes_down(logged(output))
    assert_is_fp32(factors(output))
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = reloaded(AutoModelForSequenceClassification, output, num_labels=1)
    losses = []
    for row in held_out("preferences.jsonl"):
        texts = [
            tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=True, return_tensors="pt")
            for answer in ("chosen", "rejected")
        ]
        chosen, rejected = (model(input_ids=text["input_ids"]).logits for text in texts)
        losses.append(-nn.functional.logsigmoid(chosen - rejected).item())
    assert sum(losses) / len(losses) == pytest.approx(logged(output, "eval_loss")[-1], rel=1e-5)


@torch.no_grad()
def test_vision_adapts_only_text_experts(outputs, run_example, monkeypatch):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    output = run_example("vision", "vision", *steps(6))
    assert_goes_down(logged(output))
    assert_is_fp32(factors(output))
    assert all(".language_model." in name and ".mlp.experts." in name for name in factors(output))

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from tiny import TinyProcessor

    base = str(outputs / "tiny-vision-moe")
    processor = TinyProcessor.of(base)
    model = reloaded(AutoModelForImageTextToText, output, base="tiny-vision-moe")
    text = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    read = partial(processor, text=text, return_tensors="pt")
    red, blue = (model(**read(images=[image.new("RGB", (64, 64), colour)])).logits for colour in ("red", "blue"))
    assert (red - blue).abs().max() > 1e-3
