"""The code blocks of the README, and of the pages with the same beginning, run as printed.

A small checkpoint replaces each model on the hub, and a small file each data set; trainers use the CPU and no logger.
Blocks run in order, in one directory, each in a separate namespace. `Given` provides names that a block uses without
defining them. A name that `Given` doesn't know is an error, and so is a hub name without a replacement.
"""

from __future__ import annotations

import ast
import builtins
import gc
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from test_docs import ROOT, blocks
from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from peft_moe_qlora import MoeQLoraConfig, load_quantized, prepare_model_for_training

PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("getting-started.md", "migrating.md", "adapters.md"))]
MODELS = ("Qwen/Qwen3-30B-A3B",)
DATASETS = ("trl-lib/Capybara",)
TRAINER_SETTINGS = (
    "TrainingArguments",
    *(f"{kind}Config" for kind in ("SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward")),
)
HERE = {"report_to": "none"} if torch.cuda.is_available() else {"report_to": "none", "use_cpu": True, "bf16": False}
_ON_HUB = re.compile(r"[\w.-]+/[\w.-]+")
# strings of that form that are not names on the hub
_NOT_ON_HUB = re.compile(r"(fp8|int8|int4|nf4|fp4|nvfp4)/.*")

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEMPLATE = (
    "{% for m in messages %}<s> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


def write_model(directory: Path) -> Path:
    """A bf16 checkpoint with a tokenizer, as on the hub."""
    # without the auxiliary loss, which transformers 5.17 can't compute during generation
    tiny_model(dtype=torch.bfloat16, router_aux_loss_coef=0.0).save_pretrained(directory)
    words = {word: number for number, word in enumerate([*SPECIAL, *map(str, range(VOCABULARY - len(SPECIAL)))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    return directory


def write_dataset(directory: Path) -> Path:
    """Eight short conversations as JSON lines, which `load_dataset` reads by the directory's name."""
    directory.mkdir()
    turns = [("user", "1 2 3"), ("assistant", "4 5 6 7")]
    row = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
    (directory / "train.jsonl").write_text(f"{row}\n" * 8, encoding="utf-8")
    return directory


class Given:
    """The names that code may use without defining them, created anew for each block.

    Args:
        model_path: of the checkpoint.
        directory: where the blocks run; contains the adapter that a block saves.
    """

    def __init__(self, model_path: Path, directory: Path) -> None:
        self.model_path, self.directory = model_path, directory
        self.makers: dict[str, Callable[[], Any]] = {
            "torch": lambda: torch,
            "MoeQLoraConfig": lambda: MoeQLoraConfig,
            "PeftModel": lambda: PeftModel,
            "get_peft_model": lambda: get_peft_model,
            "prepare_model_for_training": lambda: prepare_model_for_training,
            "base": self.base,
            "model": self.model,
            "trainer": self.trainer,
            "dataset": self.dataset,
        }

    def base(self) -> torch.nn.Module:
        return load_quantized(str(self.model_path))

    def model(self) -> PeftModel:
        return get_peft_model(self.base(), MoeQLoraConfig(r=2, target_modules="all-linear"))

    def dataset(self) -> list[dict[str, torch.Tensor]]:
        ids = torch.arange(4, 20)
        return [{"input_ids": ids, "labels": ids}] * 4

    def trainer(self) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(str(self.directory / "run"), report_to=[])
        return transformers.Trainer(self.model(), arguments, train_dataset=self.dataset())

    def __call__(self, names: set[str]) -> dict[str, Any]:
        unknown = names - self.makers.keys()
        assert not unknown, f"The block uses {sorted(unknown)}, which it doesn't make, and Given doesn't know."
        return {name: self.makers[name]() for name in sorted(names)}


def free_names(tree: ast.Module) -> set[str]:
    """The names that code reads at its top level before it binds them."""
    bound, free = set(dir(builtins)), set()
    for statement in tree.body:
        names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
        inner = {
            argument.arg for node in ast.walk(statement) if isinstance(node, ast.arguments) for argument in node.args
        }
        stored = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
        # names bound by a loop or comprehension are read later
        local = inner | (set() if isinstance(statement, (ast.Assign, ast.AugAssign)) else stored)
        local |= {
            target.id
            for node in ast.walk(statement)
            if isinstance(node, ast.comprehension)
            for target in ast.walk(node.target)
            if isinstance(target, ast.Name)
        }
        free |= {node.id for node in names if isinstance(node.ctx, ast.Load)} - bound - local
        bound |= stored
        bound |= {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(statement)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            bound.add(statement.name)
    return free


class StandIns(ast.NodeTransformer):
    """Replaces hub names by paths, and sets trainers up for this machine."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, str) and _ON_HUB.fullmatch(node.value) and not _NOT_ON_HUB.fullmatch(node.value):
            assert node.value in self.paths, f"{node.value!r} looks like a name on the hub, and has no stand-in."
            return ast.copy_location(ast.Constant(self.paths[node.value]), node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in TRAINER_SETTINGS:
            node.keywords = [one for one in node.keywords if one.arg not in HERE]
            node.keywords += [ast.keyword(name, ast.Constant(value)) for name, value in HERE.items()]
        return node


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("hub") / "model")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page, model_path, tmp_path, monkeypatch):
    code = blocks(page, "python")
    assert code, f"{page} has no code."
    paths = dict.fromkeys(MODELS, str(model_path))
    if any("load_dataset" in block for block in code):
        pytest.importorskip("datasets", reason="datasets is not installed; it comes with TRL")
        paths |= dict.fromkeys(DATASETS, str(write_dataset(tmp_path / "data")))
    monkeypatch.chdir(tmp_path)
    given = Given(model_path, tmp_path)
    for number, block in enumerate(code):
        tree = ast.parse(block)
        space = {"__name__": "__main__", **given(free_names(tree))}
        tree = ast.fix_missing_locations(StandIns(paths).visit(tree))
        exec(compile(tree, f"{page.name}, block {number}", "exec"), space)
        del space
        gc.collect()


def test_undefined_names_are_detected(tmp_path):
    assert free_names(ast.parse("import torch\nfor a in b:\n    a.c = torch.d\ne = [f for f in g]\nh = h.i()")) == {
        "b",
        "g",
        "h",
    }
    with pytest.raises(AssertionError, match="uses \\['nothing'\\]"):
        Given(tmp_path, tmp_path)({"nothing"})
    with pytest.raises(AssertionError, match="'some/model' looks like a name on the hub"):
        StandIns({}).visit(ast.parse("load('some/model')"))
