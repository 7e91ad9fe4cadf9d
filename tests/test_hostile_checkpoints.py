"""Untrusted checkpoints: no file outside them is read, copied or overwritten."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors, write_tensors
from merged_checkpoints import merge, save_adapter
from safetensors.torch import save_file
from tiny_models import tiny_model

from peft_moe_qlora import CheckpointError, load_experts, load_quantized
from peft_moe_qlora.loading import Checkpoint, inspect_checkpoint
from peft_moe_qlora.merge import merge_checkpoint, merge_quantized

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """`base` and `adapter`."""
    directory = tmp_path_factory.mktemp("saved")
    save_adapter(directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    for name in ("base", "adapter"):
        shutil.copytree(saved / name, tmp_path / name)
    return tmp_path


def refused(directory: Path, match: str) -> None:
    """Rejected by everything that opens the checkpoint `base`, without output left behind."""
    base, adapter, merged = (directory / name for name in ("base", "adapter", "merged"))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))
    for do in (
        lambda: Checkpoint.open(base),
        lambda: inspect_checkpoint(base),
        lambda: load_quantized(str(base), device_map="cpu"),
        lambda: load_experts(model, base),
        lambda: merge_checkpoint(base, adapter, merged, progressbar=False),
        lambda: merge_checkpoint(base, adapter, merged, dry_run=True),
        lambda: merge_quantized(base, adapter, merged, progressbar=False),
    ):
        with pytest.raises(CheckpointError, match=match):
            do()
    assert not list(directory.glob("*merged*"))


def in_two_shards(base: Path) -> dict:
    write_tensors(base, read_tensors(base), num_shards=2)
    return json.loads((base / INDEX).read_text())


@pytest.mark.parametrize(
    "name",
    [
        "../good/model.safetensors",
        "/ABSOLUTE",
        "a/../../good/model.safetensors",
        "./model-00001-of-00002.safetensors",
        "a//model.safetensors",
        "..\\good\\model.safetensors",
        "C:model.safetensors",
        ".unfinished/model.safetensors",
        "",
        "\0.safetensors",
        "long/" * 100 + "model.safetensors",
        None,
        7,
        ["model-00001-of-00002.safetensors"],
    ],
    ids=lambda name: repr(name)[:20],
)
def test_shards_outside_the_checkpoint(name, copied):
    """A merge would read them as part of the base, and overwrite them with merged ones."""
    (copied / "good").mkdir()
    good = copied / "good" / "model.safetensors"
    index = in_two_shards(copied / "base")
    shard = copied / "base" / "model-00002-of-00002.safetensors"
    shutil.copyfile(shard, good)
    before = good.read_bytes()
    name = str(good) if name == "/ABSOLUTE" else name
    weight_map = {key: name if one == shard.name else one for key, one in index["weight_map"].items()}
    (copied / "base" / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))
    refused(copied, r"index\.json maps .* to .*Expected the name of a file in .*base, without")
    assert good.read_bytes() == before
    assert os.listdir(copied / "good") == ["model.safetensors"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": {}}', "weight_map={}. Expected an object that maps keys to names of shards"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map=.*Expected an object that maps keys"),
        ("{}", "weight_map=None"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "metadata=None. Expected an object"),
        ("[]", "Expected a JSON object, found a list"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the name 'a' is repeated"),
        ("[" * 100_000, "cannot be parsed"),
        ("\ud800", "cannot be parsed"),
    ],
)
def test_invalid_indices(text, match, copied):
    in_two_shards(copied / "base")
    (copied / "base" / INDEX).write_bytes(text.encode(errors="surrogatepass"))
    refused(copied, f"index.json is not a checkpoint index: .*{match}")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", INDEX])
def test_weights_that_link_outside(name, copied):
    (copied / "elsewhere").mkdir()
    if name != "model.safetensors":
        in_two_shards(copied / "base")
    (copied / "base" / name).rename(copied / "elsewhere" / name)
    (copied / "base" / name).symlink_to(f"../elsewhere/{name}")
    before = (copied / "elsewhere" / name).read_bytes()
    refused(copied, rf"{name} is a link to .*elsewhere/{name}, outside .*base; such links are not followed")
    assert (copied / "elsewhere" / name).read_bytes() == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "assets/template.jinja", "folder"])
@pytest.mark.parametrize("quantize", [False, True], ids=["16 bits", "4 bits"])
def test_other_files_that_link_outside(name, quantize, copied):
    """Their targets may be private, and would be published with the merged model."""
    link, secret = copied / "base" / name, copied / "secret"
    if name == "folder":
        secret.mkdir()
        (secret / "key").write_text("secret")
    elif name == "config.json":
        link.rename(secret)
    else:
        secret.write_text("secret")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(secret)
    merging = merge_quantized if quantize else merge_checkpoint
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=rf"{name} is a link to .*secret, outside .*base; such links"):
            merging(copied / "base", copied / "adapter", copied / "merged", dry_run=dry_run, progressbar=False)
    assert not list(copied.glob("*merged*"))


@pytest.mark.parametrize("is_shared", [False, True], ids=["of the repository", "of the cache"])
@pytest.mark.parametrize("part", ["", "part"])
def test_snapshots_in_the_hub_cache(is_shared, part, copied, monkeypatch):
    """Their files are links to blobs of the repository, directly or through these to blobs shared by repositories."""
    monkeypatch.chdir(copied)
    base = copied / "cache" / "models--own--base" / "snapshots" / "0123abc" / part
    base.parent.mkdir(parents=True, exist_ok=True)
    (copied / "base").rename(base)
    (base / "tokenizer.json").write_text("{}")
    blobs = copied / "cache" / "models--own--base" / "blobs"
    blobs.mkdir()
    for number, file in enumerate(path for path in sorted(base.iterdir())):
        blob = blobs / str(number)
        if is_shared:
            blob = copied / "cache" / "blobs" / "ab" / f"ab{number}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            (blobs / str(number)).symlink_to(f"../../blobs/ab/ab{number}")
        file.rename(blob)
        file.symlink_to(os.path.relpath(blobs / str(number), base))
    inspect_checkpoint(base.relative_to(copied))
    report = merge_checkpoint(base, copied / "adapter", copied / "merged", progressbar=False)
    assert report.tensors_changed
    assert (copied / "merged" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (copied / "merged").rglob("*"))
    # a blob of another repository
    other = copied / "cache" / "models--own--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("secret")
    (base / "LICENSE").symlink_to(other / "secret")
    with pytest.raises(CheckpointError, match="LICENSE is a link to"):
        merge_checkpoint(base, copied / "adapter", copied / "again", progressbar=False)


def test_base_files_with_names_of_an_unfinished_merge(copied):
    """They are copied, and not mistaken for the merge's own files."""
    names = ["unfinished.json", "plan.json", "model.safetensors.result.json"]
    for name in names:
        (copied / "base" / name).write_text('{"changed": [], "fidelity": {}}')
    report = merge(copied)
    assert report.tensors_changed == report.tensors_expected > 0
    assert all((copied / "merged" / name).is_file() for name in names)
    assert not [path for path in (copied / "merged").rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["nn", "Trainer", "PreTrainedConfig"])
def test_architectures_that_are_not_model_classes(name, tmp_path):
    """A config may name any attribute of transformers."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [name]}))
    assert inspect_checkpoint(tmp_path).model_class == "Qwen3MoeForCausalLM"


def test_shard_with_two_names(copied):
    """On file systems where both names are one file, or with a link, its tensors would be loaded twice."""
    index = in_two_shards(copied / "base")
    (copied / "base" / "MODEL.safetensors").symlink_to("model-00001-of-00002.safetensors")
    first = next(iter(index["weight_map"]))
    (copied / "base" / INDEX).write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], first: "MODEL.safetensors"}})
    )
    refused(copied, "both contain the tensor")


def test_pickles_are_not_shards(copied):
    index = in_two_shards(copied / "base")
    save_file({"a": torch.ones(1)}, copied / "base" / "pytorch_model.bin")
    (copied / "base" / INDEX).write_text(
        json.dumps({**index, "weight_map": {**index["weight_map"], "a": "pytorch_model.bin"}})
    )
    refused(copied, r"pytorch_model\.bin is not a safetensors file")
