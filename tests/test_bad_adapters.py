"""Damaged, ambiguous or unsupported adapters are rejected with an error that names the problem."""

from __future__ import annotations

import json
import re

import pytest
import torch
from adapters_of_others import WRITERS, random_factors, write_lora, write_mlx, write_per_expert, write_stacked
from saved_adapters import saved_deltas
from shrunken_models import shrunken_model_or_skip
from test_export_adapters import save_adapter
from test_import_adapters import edit_config, edit_tensors, save_base, stock, tensors_of

from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import ReadOptions, convert_adapter, read_adapter

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Name of a layout -> an adapter in it for the same base; do not modify."""
    root = tmp_path_factory.mktemp("saved")
    save_base(root / "base", "qwen3_moe")
    experts, linear = random_factors(shared=True)
    for name, write in WRITERS.items():
        write(root / name, root / "base", experts, linear)
    convert_adapter(root / "per-expert", root / "ours", "moe-qlora")
    convert_adapter(root / "per-expert", root / "peft-lora", "peft-lora")
    return root


# names of the tensors of the second layer's down projection of the experts: A, B
FACTORS = {
    "ours": (f"{EXPERTS}.down_proj.lora_A.weight", f"{EXPERTS}.down_proj.lora_B.weight"),
    "peft-lora": (f"{EXPERTS}.lora_A.weight", f"{EXPERTS}.lora_B.weight"),
    "per-expert": (f"{EXPERTS}.3.down_proj.lora_A.weight", f"{EXPERTS}.3.down_proj.lora_B.weight"),
    "stacked": (f"{EXPERTS}.down_proj.lora_A.weight", f"{EXPERTS}.down_proj.lora_B.weight"),
    "stacked, fused": (f"{EXPERTS}.down_proj.lora_A", f"{EXPERTS}.down_proj.lora_B"),
    "mlx": (
        "model.layers.1.mlp.switch_mlp.down_proj.lora_a",
        "model.layers.1.mlp.switch_mlp.down_proj.lora_b",
    ),
}


@pytest.fixture(params=FACTORS)
def copied(request, saved, tmp_path):
    """A layout, a copy of an adapter in it that a test may damage, its file, and two of its keys."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    for file in (saved / request.param).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    name = "adapters.safetensors" if request.param == "mlx" else "adapter_model.safetensors"
    return request.param, directory, directory / name, FACTORS[request.param]


def test_truncated_file(copied):
    _, directory, file, _ = copied
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{file.name} is unreadable: .*It is truncated"):
        read_adapter(directory)
    file.unlink()
    with pytest.raises(ValueError, match=f"contains no {file.name}"):
        read_adapter(directory)


def test_pickled_file(copied):
    _, directory, file, _ = copied
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="is a pickle, which is not supported"):
        read_adapter(directory)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_not_finite(copied, value):
    _, directory, file, (key, _) = copied
    tensor = next(tensor for name, tensor in tensors_of(directory, file.name).items() if name.endswith(key))
    tensor[..., 0, 0] = value
    edit_tensors(directory, {key: tensor}, file.name)
    with pytest.raises(ValueError, match=f"{key} contains values that are not finite"):
        read_adapter(directory)


def test_swapped_factors(copied):
    """A and B are swapped: they fit each other, but not the base."""
    layout, directory, file, (a, b) = copied
    tensors = tensors_of(directory, file.name)
    A, B = (next(tensor for name, tensor in tensors.items() if name.endswith(key)) for key in (a, b))
    if layout == "peft-lora":
        # as PEFT wrote it up to 0.18: the expert is the slowest index in A and the fastest in B
        A, B = (
            B.unflatten(1, (2, 8)).permute(2, 1, 0).flatten(0, 1),
            A.unflatten(0, (8, 2)).permute(2, 1, 0).flatten(1),
        )
    else:
        A, B = B.mT, A.mT
    edit_tensors(directory, {a: A, b: B}, file.name)
    with pytest.raises(ValueError, match=r"transposed|in the adapter\. Expected|differ in rank, alpha, size or dtype"):
        read_adapter(directory)


def test_missing_counterpart_of_a_factor(copied):
    _, directory, file, (key, _) = copied
    edit_tensors(directory, {key: None}, file.name)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.(experts|switch_mlp)"):
        read_adapter(directory)


def test_missing_layer(copied):
    layout, directory, file, _ = copied
    gone = [key for key in tensors_of(directory, file.name) if "layers.1.mlp" in key]
    edit_tensors(directory, dict.fromkeys(gone), file.name)
    with pytest.raises(ValueError, match=r"no (factors of|tensor) model\.layers\.1\.mlp\.experts"):
        read_adapter(directory)
    if layout != "ours":
        found = read_adapter(directory, options=ReadOptions(partial=True))
        assert {one.path for one in found.experts} == {"model.layers.0.mlp.experts"}
        assert f"{EXPERTS}.down_proj" not in found.config.target_modules


def test_missing_linear_layer(copied):
    _, directory, file, _ = copied
    gone = [key for key in tensors_of(directory, file.name) if "layers.1.self_attn.q_proj" in key]
    edit_tensors(directory, dict.fromkeys(gone), file.name)
    with pytest.raises(ValueError, match=r"no factors of model\.layers\.1\.self_attn\.q_proj"):
        read_adapter(directory)
    edit_tensors(directory, {gone[0]: torch.zeros(2, 64)}, file.name)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj"):
        read_adapter(directory)


@pytest.mark.parametrize(
    "shape", [(), (0,), (3,), (2, 3), (1, 2, 3), (1, 2, 3, 4), (0, 64), (9, 2, 64), (8, 2, 65), (8, 3, 64)], ids=str
)
def test_wrong_shapes(copied, shape):
    """For experts and a linear layer. Shapes are compared with the base before tensors are fused or transposed."""
    _, directory, file, (a, b) = copied
    linear = "layers.1.self_attn.q_proj.lora_"
    gate = re.sub(r"\bdown_proj", "gate_proj", a)
    saved = tensors_of(directory, file.name)
    for key in [key for key in saved if key.endswith((a, b, gate)) or linear in key]:
        if tuple(saved[key].shape) == shape:
            continue
        edit_tensors(directory, {key: torch.zeros(shape)}, file.name)
        with pytest.raises(ValueError, match=r"layers\.1\."):
            read_adapter(directory)
        edit_tensors(directory, {key: saved[key]}, file.name)
    read_adapter(directory)


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.0.mlp.gate.lora_A.weight",  # the router
        "model.layers.7.mlp.experts.lora_A.weight",
        "model.layers.7.mlp.experts.2.up_proj.lora_B.weight",
        "model.layers.0.mlp.experts.gate_up_proj.lora_magnitude",
        "model.layers.0.mlp.experts.base_layer.base_layer.lora_A.weight",
        "optimizer.step",
    ],
)
def test_extra_keys(copied, key):
    _, directory, file, _ = copied
    extra = {key: torch.zeros(2, 64)}
    if "gate.lora_A" in key:
        extra["model.layers.0.mlp.gate.lora_B.weight"] = torch.zeros(8, 2)
    edit_tensors(directory, extra, file.name)
    with pytest.raises(ValueError, match=r"model\.layers|optimizer\.step") as caught:
        read_adapter(directory)
    assert key.partition(".lora")[0] in str(caught.value)


def test_wrong_base(copied, tmp_path):
    layout, directory, _, _ = copied
    save_base(tmp_path / "narrow", "qwen3_moe", moe_intermediate_size=16)
    with pytest.raises(ValueError, match=r"belongs? to another base|has shape"):
        read_adapter(directory, tmp_path / "narrow")
    save_base(tmp_path / "deeper", "qwen3_moe", num_hidden_layers=3)
    if layout in ("ours", "peft-lora"):
        # their config lists the full names of the layers, two of three
        read_adapter(directory, tmp_path / "deeper")
        return
    with pytest.raises(ValueError, match=r"model\.layers\.2"):
        read_adapter(directory, tmp_path / "deeper")


def test_rank_that_differs_from_the_config(copied):
    """The scaling follows from the config's rank, so the two must agree."""
    layout, directory, _, _ = copied
    file = directory / "adapter_config.json"
    config = json.loads(file.read_text())
    (config["lora_parameters"] if layout == "mlx" else config)["rank" if layout == "mlx" else "r"] = 4
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rank 4"):
        read_adapter(directory)


def test_missing_expert(saved, tmp_path):
    experts, linear = random_factors()
    write_per_expert(tmp_path / "adapter", saved / "base", experts, linear)
    keys = [key for key in tensors_of(tmp_path / "adapter") if "layers.0.mlp.experts.5." in key]
    edit_tensors(tmp_path / "adapter", dict.fromkeys(keys))
    with pytest.raises(
        ValueError, match=r"expert 5 of model\.layers\.0\.mlp\.experts\. Expected .* all 8 experts, found 7"
    ):
        read_adapter(tmp_path / "adapter", options=ReadOptions(partial=True))


def test_missing_half_of_a_stack(saved, tmp_path):
    experts, linear = random_factors()
    for write in (write_per_expert, write_stacked, write_mlx):
        some = {at: pair for at, pair in experts.items() if at[1] != "up"}
        write(tmp_path / write.__name__, saved / "base", some, linear)
        with pytest.raises(ValueError, match="gate and up projection are one fused stack"):
            read_adapter(tmp_path / write.__name__)
        # a whole projection may be absent
        some = {at: pair for at, pair in some.items() if at[1] == "down"}
        write(tmp_path / "down" / write.__name__, saved / "base", some, linear)
        found = read_adapter(tmp_path / "down" / write.__name__)
        assert [one.projection for one in found.experts] == ["down_proj"] * 2


def test_experts_with_different_scalings(saved, tmp_path):
    experts, linear = random_factors()
    write_per_expert(tmp_path / "adapter", saved / "base", experts, linear)
    edit_config(tmp_path / "adapter", alpha_pattern={"experts.3.up_proj": 9})
    with pytest.raises(ValueError, match=r"up projections .* differ in rank, alpha"):
        read_adapter(tmp_path / "adapter")
    edit_config(tmp_path / "adapter", alpha_pattern={"up_proj": 9})
    with pytest.raises(ValueError, match=r"have scalings 1\.5 and 4\.5"):
        read_adapter(tmp_path / "adapter")


def test_mixed_layouts(saved, tmp_path):
    tensors = {}
    for name in ("stacked", "per-expert"):
        tensors |= {key.removeprefix("base_model.model."): t for key, t in tensors_of(saved / name).items()}
    write_lora(tmp_path / "adapter", tensors, saved / "base", ["q_proj"])
    with pytest.raises(ValueError, match="mixes tensors of several layouts"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"bias": "lora_only"}, "trained biases are not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changed the weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq'"),
        ({"r": None}, r"adapter_config\.json has no r\. Expected a whole number of at least 1"),
        ({"lora_alpha": "16"}, "lora_alpha='16'. Expected a finite number"),
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"format_of_tomorrow": 1}, None),
    ],
)
def test_options_that_experts_do_not_support(saved, options, message, tmp_path):
    experts, linear = random_factors()
    write_per_expert(tmp_path / "adapter", saved / "base", experts, linear)
    edit_config(tmp_path / "adapter", **options)
    if message is None:
        with pytest.warns(UserWarning, match=r"ignoring unknown options \['format_of_tomorrow'\]"):
            read_adapter(tmp_path / "adapter")
        return
    with pytest.raises(ValueError, match=message):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize("init", [False, "gaussian", "eva", "orthogonal"])
def test_initialization_option_is_ignored(saved, init, tmp_path):
    experts, linear = random_factors()
    write_per_expert(tmp_path / "adapter", saved / "base", experts, linear)
    edit_config(tmp_path / "adapter", init_lora_weights=init, eva_config={"rho": 2.0})
    assert read_adapter(tmp_path / "adapter").config.init_lora_weights is True


class TestWrittenBy:
    """For square stacks, only PEFT's version determines the orientation; it must agree with other tensors' shapes."""

    @pytest.fixture
    def square(self, tmp_path):
        save_base(tmp_path / "base", "qwen3_moe", moe_intermediate_size=64)
        A, B = torch.randn(8 * 2, 64), torch.randn(64, 2 * 8)
        names = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
        tensors = {f"{name}.lora_{factor}.weight": one for name in names for factor, one in (("A", A), ("B", B))}
        write_lora(tmp_path / "adapter", tensors, tmp_path / "base", [], target_parameters=["mlp.experts.down_proj"])
        return tmp_path / "adapter"

    @pytest.mark.parametrize("recorded", [None, "0.19.0.dev0@abc", "0.19.1.dev0"])
    def test_required_for_ambiguous_shapes(self, square, recorded):
        edit_config(square, peft_version=recorded)
        with pytest.raises(ValueError, match=r"factors of model\.layers\.0\.mlp\.experts is ambiguous.*--written-by"):
            read_adapter(square)
        new = read_adapter(square, options=ReadOptions(written_by="peft==0.19.1")).experts[0]
        for version in ("0.17.1", "0.18.0", "0.19.0"):
            old = read_adapter(square, options=ReadOptions(written_by=f"peft=={version}")).experts[0]
            torch.testing.assert_close(old.B @ old.A, (new.B @ new.A).mT)

    def test_derived_from_shapes_where_possible(self, tmp_path):
        directory = stock(tmp_path)
        expected = read_adapter(directory / "adapter")
        edit_config(directory / "adapter", peft_version=None)
        found = read_adapter(directory / "adapter")
        assert all(torch.equal(one.A, other.A) for one, other in zip(found.experts, expected.experts))
        with pytest.raises(ValueError, match=r"transposed compared to those that PEFT 0\.18\.1 writes"):
            read_adapter(directory / "adapter", options=ReadOptions(written_by="peft==0.18.1"))
        edit_config(directory / "adapter", peft_version="new")
        with pytest.raises(ValueError, match="peft_version='new' is not a valid version"):
            read_adapter(directory / "adapter")


def test_read_options_are_validated():
    for options, message in (
        ({"quant_type": "int8"}, "quant_type='int8' is unknown"),
        ({"lora_b_order": "both"}, "lora_b_order='both' is unknown"),
        ({"written_by": "peft-0.18"}, "'peft==' followed by a version"),
        ({"written_by": "peft==old"}, "'peft==' followed by a version"),
    ):
        with pytest.raises(ValueError, match=message):
            ReadOptions(**options)


@pytest.mark.parametrize(
    "options", [{"written_by": "peft==0.18.1"}, {"lora_b_order": "experts-slowest"}, {"quant_type": "nf4"}], ids=str
)
def test_options_that_do_not_apply_to_a_layout(saved, options):
    """An option without effect is rejected, even if it agrees with the file."""
    for name in ["ours"] if "quant_type" in options else ["ours", "per-expert", "mlx"]:
        with pytest.raises(ValueError, match=f"{next(iter(options))}='.*' does not apply to an adapter (of|in)"):
            read_adapter(saved / name, options=ReadOptions(**options))


def test_invalid_configs(saved, tmp_path):
    for text, message in (("{", "is not valid JSON"), ("[]", "value of type list"), ("{}", "of type None")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_adapter(tmp_path)
    write_mlx(tmp_path / "mlx", saved / "base", *random_factors())
    edit_config(tmp_path / "mlx", fine_tune_type="dora")
    with pytest.raises(ValueError, match="fine_tune_type='dora' is not supported"):
        read_adapter(tmp_path / "mlx")


def test_storage_of_adapters_from_other_tools(saved):
    """The default is nf4 for loading and the caller's choice for a merge. An option overrides both."""
    for name in ("peft-lora", "per-expert", "mlx"):
        found = [
            read_adapter(saved / name).config.quant_type,
            read_adapter(saved / name, usual_quant_type="none").config.quant_type,
            read_adapter(saved / name, options=ReadOptions("fp4"), usual_quant_type="none").config.quant_type,
        ]
        assert found == ["nf4", None, "fp4"]
    assert read_adapter(saved / "ours", usual_quant_type="none").config.quant_type == "nf4"


def test_command_reads_adapters_of_other_tools(saved, tmp_path, capsys):
    adapter, out = str(saved / "stacked"), tmp_path / "out"
    command = ["convert", adapter, str(out), "--to", "moe-qlora", "--quant-type", "fp4", "--base", str(saved / "base")]
    assert main(command) == 0
    assert "4 stacks and 4 other tensors" in capsys.readouterr().out
    assert read_adapter(out).config.quant_type == "fp4"
    command = ["convert", str(out), str(tmp_path / "again"), "--to", "moe-qlora", "--quant-type", "fp4"]
    assert main(command) == 1
    assert "quant_type='fp4' does not apply to an adapter of this package" in capsys.readouterr().err
    command[command.index("moe-qlora")] = "per-expert"
    assert main(command) == 1
    assert "quant_type='fp4' (--quant-type) does not apply to per-expert" in capsys.readouterr().err
    edit_config(out, peft_type=None)
    assert main(["convert", str(out), str(tmp_path / "again"), "--to", "per-expert"]) == 1
    assert "type None. Expected MOE_QLORA, LORA, or an adapter of mlx-lm" in capsys.readouterr().err


def test_own_adapter_without_a_base_is_checked_for_consistency(tmp_path):
    save_adapter(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    read_adapter(tmp_path / "adapter")
    edit_tensors(tmp_path / "adapter", {"optimizer.step": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"config does not call for the tensor optimizer\.step"):
        read_adapter(tmp_path / "adapter")


class TestTensorsMatchConfig:
    """The tensors must be those that the config requires, in this package's files and in PEFT's."""

    LAYOUTS = ("ours", "peft-lora")

    @pytest.fixture(params=LAYOUTS)
    def written(self, request, tmp_path):
        """Writes an adapter with some options, in this package's layout or with the installed PEFT."""

        def write(**options):
            if request.param == "ours":
                save_adapter(tmp_path, **options)
            else:  # PEFT adapts experts by target_parameters instead
                linear = options["target_modules"]
                linear = [name for name in linear if name != "experts"] if isinstance(linear, list) else linear
                stock(tmp_path, **{**options, "target_modules": linear})
            return tmp_path / "adapter"

        return write

    def test_modules_trained_in_full(self, written):
        """PEFT trains every module whose name ends so: one of them is not enough, nor is a LoRA of the layer."""
        directory = written(target_modules=["experts", "q_proj"], modules_to_save=["q_norm"])
        read_adapter(directory)
        edit_tensors(directory, {"layers.1.self_attn.q_norm.weight": None})
        with pytest.raises(ValueError, match=r"no tensor of model\.layers\.1\.self_attn\.q_norm\.weight"):
            read_adapter(directory)
        edit_config(directory, modules_to_save=["q_norm", "q_proj"])
        with pytest.raises(ValueError, match=r"layers\.[01]\.self_attn\.q_"):
            read_adapter(directory)

    def test_nested_modules_trained_in_full(self, tmp_path):
        """Of input_layernorm and input_layernorm.norm, PEFT saves only the inner one: such a file isn't damaged."""
        shrunken_model_or_skip("axk2")
        saved_deltas(tmp_path, "axk2", target_modules=["experts"], modules_to_save=["norm"])
        key = "model.layers.0.input_layernorm.norm.weight"
        assert key in read_adapter(tmp_path / "adapter").non_expert
        edit_tensors(tmp_path / "adapter", {key: None})
        with pytest.raises(ValueError, match=f"no tensor of {key}"):
            read_adapter(tmp_path / "adapter")

    @pytest.mark.parametrize("bias", ["all", "lora_only"])
    def test_biases(self, bias, tmp_path):
        """Of linear layers and experts. Biases that the config doesn't train are not required."""
        save_adapter(tmp_path, "gpt_oss", target_modules=["experts", "q_proj"], bias=bias)
        directory = tmp_path / "adapter"
        saved = tensors_of(directory)
        assert any(key.endswith("k_proj.bias") for key in saved) == (bias == "all")
        for key in [key for key in saved if "layers.1" in key and key.endswith("bias")]:
            edit_tensors(directory, {key: None})
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            with pytest.raises(ValueError, match=rf"no tensor of {name}, which bias='{bias}' of its config trains"):
                read_adapter(directory)
            edit_tensors(directory, {key: saved[key]})
        read_adapter(directory)

    def test_trained_tokens(self, written):
        """Without these rows, the outputs for the tokens would change. Extra rows belong to other tokens."""
        directory = written(target_modules=["experts", "q_proj"], trainable_token_indices=[4, 5])
        read_adapter(directory)
        edit_config(directory, trainable_token_indices=[4, 5, 6])
        with pytest.raises(ValueError, match=r"embed_tokens have shape \(2, 64\)\. Expected \(3, 64\)"):
            read_adapter(directory)
        edit_config(directory, trainable_token_indices={"embed_tokens": [4, 5], "lm_head": [4, 5]})
        with pytest.raises(ValueError, match="no tensor of trained tokens of lm_head"):
            read_adapter(directory)
        edit_config(directory, trainable_token_indices=[4, 5])
        edit_tensors(directory, {"trainable_tokens_delta": None})
        with pytest.raises(ValueError, match=r"no tensor of trained tokens, which .* trainable_token_indices"):
            read_adapter(directory)
        elsewhere = {"base_model.model.model.norm.token_adapter.trainable_tokens_delta": torch.zeros(2, 64)}
        edit_tensors(directory, elsewhere)
        with pytest.raises(ValueError, match=r"trained tokens of model\.norm, but .* no embedding with this name"):
            read_adapter(directory)

    def test_untargeted_layers(self, written):
        """PEFT silently drops such factors when it loads the file."""
        directory, r = written(r=4, target_modules=["q_proj", "experts"]), 4
        pair = {
            f"base_model.model.model.layers.1.self_attn.k_proj.lora_{factor}.weight": torch.zeros(*shape)
            for factor, shape in (("A", (r, 64)), ("B", (32, r)))
        }
        edit_tensors(directory, pair)
        with pytest.raises(
            ValueError, match=r"factors of model\.layers\.1\.self_attn\.k_proj, which its config does not"
        ):
            read_adapter(directory)
        edit_tensors(directory, dict.fromkeys(pair))
        edit_config(directory, exclude_modules=["layers.1.self_attn.q_proj"])
        with pytest.raises(
            ValueError, match=r"factors of model\.layers\.1\.self_attn\.q_proj, which its config does not"
        ):
            read_adapter(directory)
        edit_config(directory, exclude_modules=None)
        read_adapter(directory)

    def test_layers_to_transform(self, written):
        directory = written(target_modules=["experts", "q_proj"])
        edit_config(directory, layers_to_transform=[0])
        with pytest.raises(ValueError, match=r"model\.layers\.1\."):
            read_adapter(directory)

    def test_all_linear(self, written):
        """The value "all-linear" excludes embeddings and head, as in PEFT, so a file without them is complete."""
        directory = written(r=4, target_modules=["experts", "q_proj", "k_proj", "v_proj", "o_proj"])
        edit_config(directory, target_modules="all-linear")
        read_adapter(directory)
        rows = tensors_of(directory.parent / "base", "model.safetensors")["model.embed_tokens.weight"].shape[0]
        pair = {"lora_embedding_A": torch.zeros(4, rows), "lora_embedding_B": torch.zeros(64, 4)}
        edit_tensors(directory, {f"base_model.model.model.embed_tokens.{end}": one for end, one in pair.items()})
        with pytest.raises(ValueError, match=r"factors of model\.embed_tokens, which its"):
            read_adapter(directory)

    def test_validation_without_a_base(self, tmp_path):
        """Names are enough, except for "all-linear"."""
        save_adapter(tmp_path)
        (tmp_path / "base").rename(tmp_path / "gone")
        read_adapter(tmp_path / "adapter")
        edit_config(tmp_path / "adapter", target_modules=["experts", "q_proj"])
        with pytest.raises(ValueError, match=r"self_attn\.k_proj, which its config does not target"):
            read_adapter(tmp_path / "adapter")
        edit_config(tmp_path / "adapter", target_modules="all-linear")
        read_adapter(tmp_path / "adapter")
