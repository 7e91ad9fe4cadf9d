"""Verifying a merge: what it compares, without keeping it, and which base it loads."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from merged_checkpoints import merge, save_adapter
from peft import PeftModel, get_peft_model
from shrunken_models import shrunken_model
from texts import write_text, write_tokenizer
from tiny_models import logits, randomize_adapter
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.merge import (
    MergeReport,
    inputs,
    kl_divergence,
    merge_checkpoint,
    merge_quantized,
    unmerged,
    verify,
    verify_merge,
)


def words(directory: Path, count: int = 40) -> Path:
    """A text that the tokenizer of `base` reads."""
    ids = torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(5))
    write_tokenizer(directory / "base")
    write_text(directory / "text.txt", ids)
    return directory / "text.txt"


def save_scaled_granite(directory: Path, **options) -> None:
    model = shrunken_model("granitemoe", dtype=torch.float32)
    model.config.logits_scaling = 0.02
    model.save_pretrained(directory / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    model = get_peft_model(model, MoeQLoraConfig(r=4, **options))
    randomize_adapter(model, std=0.3)
    model.save_pretrained(directory / "adapter")


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3_moe", {}),
        ("qwen3_moe", {"target_modules": ["experts", "lm_head"]}),
        ("qwen3_moe", {"target_modules": ["experts"], "modules_to_save": ["lm_head"]}),
        ("gpt_oss", {"target_modules": ["experts"]}),
        ("granitemoe", {"target_modules": ["experts"]}),  # scales its logits
    ],
    ids=str,
)
def test_figures_equal_those_of_whole_logits(model_type, options, tmp_path, monkeypatch):
    """Nothing is written except the report."""
    if model_type == "granitemoe":
        save_scaled_granite(tmp_path, **options)
    else:
        save_adapter(tmp_path, model_type, std=0.3, **options)
    text = words(tmp_path)
    merge(tmp_path, dtype=torch.bfloat16)
    windows = unmerged.read_windows(text, tmp_path / "base")
    monkeypatch.setattr(unmerged, "_WINDOW", 16)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    found = verify_merge(tmp_path / "merged", text, progressbar=False).verification

    model = unmerged.load_unmerged(unmerged.plan_unmerged(tmp_path / "base", tmp_path / "adapter"), "cpu")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    windows = windows.flatten()[:32].view(2, 16)
    of_live, of_merged = logits(model, windows), logits(merged, windows)
    with model.disable_adapter():
        of_base = logits(model, windows)
    assert found.num_tokens == 32
    assert found.kl == pytest.approx(kl_divergence(of_live, of_merged), rel=1e-4)
    assert found.kl_of_base == pytest.approx(kl_divergence(of_live, of_base), rel=1e-4)
    assert found.equal_argmax == (of_live.argmax(-1) == of_merged.argmax(-1)).float().mean().item()
    assert 0 < found.kl < found.kl_of_base


def test_logits_of_one_window_at_a_time(tmp_path, monkeypatch):
    """With a large vocabulary, the logits of all windows are 8 GB."""
    save_adapter(tmp_path, target_modules=["experts"])
    text = words(tmp_path, 64)
    merge(tmp_path)
    monkeypatch.setattr(unmerged, "_WINDOW", 8)
    seen: list[weakref.ref] = []

    def compare(of: torch.Tensor, against: torch.Tensor) -> float:
        seen.extend(map(weakref.ref, (of, against)))
        assert len({id(one()) for one in seen if one() is not None}) <= 4
        return kl_divergence(of, against)

    monkeypatch.setattr(verify, "kl_divergence", compare)
    verify_merge(tmp_path / "merged", text, progressbar=False)
    assert len(seen) == 2 * 2 * 8


def test_divergence_is_the_same_in_chunks(monkeypatch):
    of, against = torch.randn(2, 3, 100, 7)
    expected = (of.double().softmax(-1) * (of.double().log_softmax(-1) - against.double().log_softmax(-1))).sum(-1)
    for positions in (1, 64, 1000):
        monkeypatch.setattr(unmerged, "_POSITIONS_AT_A_TIME", positions)
        assert kl_divergence(of, against) == pytest.approx(expected.mean().item(), rel=1e-12)


def test_missing_directory_or_report(tmp_path):
    for directory, message in ((tmp_path / "nothing", "is not a directory"), (tmp_path, "contains no merge_report")):
        with pytest.raises(ValueError, match=message):
            verify_merge(directory, words(tmp_path), progressbar=False)


def test_model_with_nonstandard_logits(tmp_path, monkeypatch):
    save_adapter(tmp_path, target_modules=["experts"])
    text = words(tmp_path)
    merge(tmp_path)
    for head, message in (
        (lambda self: None, "has no output embeddings"),
        (lambda self: nn.Linear(1, 1), "does not compute the logits of all tokens with one call"),
    ):
        monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "get_output_embeddings", head)
        with pytest.raises(ValueError, match=message):
            verify_merge(tmp_path / "merged", text, progressbar=False)


def test_report_is_not_written_through_a_link(tmp_path):
    """For a merged model in the hub's cache, it would change the blob."""
    save_adapter(tmp_path, target_modules=["experts"])
    text = words(tmp_path)
    merge(tmp_path)
    file, blob = tmp_path / "merged" / "merge_report.json", tmp_path / "blob"
    file.rename(blob)
    file.symlink_to(blob)
    before = blob.read_bytes()
    report = verify_merge(tmp_path / "merged", text, progressbar=False)
    assert blob.read_bytes() == before
    assert not file.is_symlink()
    assert MergeReport.read(tmp_path / "merged") == report


@pytest.mark.parametrize("name", ["base", "adapter", "adapter_sha256"])
def test_invalid_reports(name, tmp_path):
    save_adapter(tmp_path, target_modules=["experts"])
    merge(tmp_path)
    file = tmp_path / "merged" / "merge_report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: 3}))
    with pytest.raises(ValueError, match=r"merge_report\.json is unreadable"):
        verify_merge(tmp_path / "merged", tmp_path / "text.txt")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> list[tuple[str, str | None]]:
    """A base that an adapter records as own/base at a revision, and the requests to the hub."""
    save_adapter(tmp_path, target_modules=["experts"])
    file = tmp_path / "adapter" / "adapter_config.json"
    options = {"base_model_name_or_path": "own/base", "revision": "v2"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))
    words(tmp_path)
    (tmp_path / "base").rename(tmp_path / "downloaded")
    asked = []

    def download(name: str, *_, revision: str | None = None, **__) -> str:
        asked.append((name, revision))
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(inputs, "snapshot_download", download)
    monkeypatch.setattr(
        "peft_moe_qlora.layouts.base_model.cached_file",
        lambda *args, **options: f"{download(*args, **options)}/config.json",
    )
    read = transformers.AutoTokenizer.from_pretrained

    def read_tokenizer(name, *args, **options):
        is_name = str(name).startswith("own/")
        return read(download(name, revision=options["revision"]) if is_name else name, *args)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", read_tokenizer)
    return asked


def test_recorded_revision_of_the_base_is_used(hub, tmp_path, capsys):
    """For the base that the adapter names; any other base is used as given."""
    adapter, merged = str(tmp_path / "adapter"), tmp_path / "merged"
    command = ["merge", "own/base", adapter, str(merged), "--verify", str(tmp_path / "text.txt")]
    assert main(command) == 0, capsys.readouterr().err
    assert set(hub) == {("own/base", "v2")}
    shutil.rmtree(merged)
    hub.clear()
    merge_quantized("own/base", adapter, merged, rounding="nearest", progressbar=False)
    assert main(["convert", adapter, str(tmp_path / "converted"), "--to", "per-expert"]) == 0
    assert main(["convert", adapter, str(tmp_path / "again"), "--to", "per-expert", "--base", "own/base"]) == 0
    assert len(hub) >= 3
    assert set(hub) == {("own/base", "v2")}
    shutil.rmtree(merged)
    hub.clear()
    merge_checkpoint("own/other", adapter, merged, progressbar=False)
    assert set(hub) == {("own/other", None)}


def test_unmerged_adapter_is_loaded_on_the_recorded_revision(hub, tmp_path, monkeypatch):
    plan = unmerged.plan_unmerged("own/base", tmp_path / "adapter")
    assert plan.revision == "v2"
    loaded = []

    def load(name, *_, revision=None, **__):
        loaded.append((name, revision))
        return load_quantized(str(tmp_path / "downloaded"), dtype=torch.float32, device_map="cpu")

    monkeypatch.setattr(unmerged, "load_quantized", load)
    assert isinstance(unmerged.load_unmerged(plan, "cpu"), PeftModel)
    assert loaded == [("own/base", "v2")]
