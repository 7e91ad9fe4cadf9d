"""The page docs/trainers.md: each row names the test that runs the trainer.

`python tests/trainer_table.py` writes it. A row whose test does not exist is an error.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "trainers.md"


@dataclass(frozen=True)
class Row:
    """A trainer, or a way to run one.

    Args:
        name: for the table.
        test: `file.py::function` that runs it.
        what: what the test checks.
    """

    name: str
    test: str
    what: str


ROWS = (
    Row(
        "transformers `Trainer`",
        "test_saving.py::test_trainer_resumes_where_it_stopped",
        "a run resumed from a checkpoint ends with the same factors",
    ),
    Row(
        "transformers `Trainer`, CUDA graphs",
        "test_layer_runs.py::test_trainer",
        "accumulates, evaluates and resumes; losses are bit-identical to those without graphs",
    ),
    Row("TRL `SFTTrainer`", "test_trl.py::after_sft", "trains every factor; stored codes stay bit-identical"),
    *(
        Row(
            f"TRL `{kind}Trainer`",
            "test_trl.py::test_reference_equals_the_policy",
            "the reference adapter equals the policy at the start and does not change",
        )
        for kind in ("DPO", "KTO", "GRPO", "RLOO")
    ),
    Row(
        "TRL `RewardTrainer`",
        "test_trl.py::test_reward_model_trains_its_head_and_its_experts",
        "trains the head and the experts",
    ),
    *(
        Row(f"`examples/{name}.py`", f"test_examples.py::{test}", what)
        for name, test, what in (
            ("sft", "test_sft_resumes_exactly", "resumes bit-exactly, in a new process"),
            (
                "dpo",
                "test_dpo_starts_from_the_sft_adapter",
                "the first loss is ln 2; the reference is the SFT adapter",
            ),
            ("grpo", "test_grpo_increases_the_reward", "the reward, computed by a program, increases"),
            ("reward", "test_reloaded_reward_model_gives_the_same_scores", "the reloaded model gives the same scores"),
            ("vision", "test_vision_adapts_only_text_experts", "trains the language model's experts on images"),
        )
    ),
    Row(
        "DDP, `accelerate launch`",
        "test_ddp.py::test_trainer",
        "losses equal those of one process; codes and scales do not change",
    ),
    Row("DDP, torch's own", "test_ddp.py::test_training", "the same, also with CUDA graphs and `keep-experts`"),
    Row(
        "FSDP2, `accelerate launch`",
        "test_fsdp2.py::test_trainer",
        "losses equal those of one process; the full adapter is saved",
    ),
    Row("FSDP2, `fully_shard`", "test_fsdp2.py::test_training", "the same, with several settings"),
    Row(
        "DeepSpeed ZeRO-2 and ZeRO-3",
        "test_deepspeed.py::test_training_equals_one_process",
        "losses equal those of one process",
    ),
    Row(
        "GRPO with vLLM on a CPU",
        "test_live_vllm.py::test_engine_matches_the_model_in_training",
        "after each update, the engine's log probabilities match the model's",
    ),
    Row("Liger", "test_liger.py", "same losses and gradients with `use_liger_kernel=True`; [details](liger.md)"),
)


def check(row: Row) -> None:
    """Raises ValueError if the test of a row does not exist."""
    file, _, function = row.test.partition("::")
    names = {node.name for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body if hasattr(node, "name")}
    if function and function not in names:
        raise ValueError(f"tests/{file} has no {function}, which the row {row.name!r} of {Path(__file__).name} names.")


def documentation() -> str:
    """The text of the page."""
    for row in ROWS:
        check(row)
    lines = [
        "# Trainers",
        "",
        "Written by `python tests/trainer_table.py`. Each row names its test.",
        "",
        "| trainer | what the test checks | test |",
        "|--|--|--|",
    ]
    for row in ROWS:
        file, _, function = row.test.partition("::")
        lines.append(f"| {row.name} | {row.what} | [`{function or file}`](../tests/{file}) |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(documentation(), encoding="utf-8")
