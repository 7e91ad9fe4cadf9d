"""`peft-moe-qlora inspect MODEL --card GIB`: the estimate matches measurements, and the recommendation fits."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from itertools import pairwise

import card_table
import optimizer_table
import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit
from card_table import measured
from peft import get_peft_model
from tiny_models import tiny_config, tiny_model
from torch import nn

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, experts_report, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.loading.cards.estimate import GIB, OPTIMIZERS, Settings, estimate
from peft_moe_qlora.loading.cards.known import known_models, read_sizes
from peft_moe_qlora.loading.cards.opened import empty_model
from peft_moe_qlora.loading.cards.search import EXPERT_RANKS, TOKENS, Pins, what_fits
from peft_moe_qlora.quantization import FourBitFormat, parse_format

QWEN = "Qwen/Qwen3-30B-A3B"
LEFT_OUT = ("step", "qmap", "RMS")
"""State entries of an optimizer that are not counted: counters, and tables of values that parameters share."""


def inspected(capsys: pytest.CaptureFixture, *arguments) -> dict:
    capsys.readouterr()  # removes output that libraries such as DeepSpeed print at import
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def printed(capsys: pytest.CaptureFixture, *arguments) -> str:
    capsys.readouterr()  # removes output that libraries such as DeepSpeed print at import
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture, *arguments) -> str:
    capsys.readouterr()  # removes output that libraries such as DeepSpeed print at import
    assert main(["inspect", *map(str, arguments)]) == 1
    found = capsys.readouterr()
    assert found.out == ""
    return found.err


# ---- the estimate


@pytest.mark.parametrize("row", [row for row in measured() if row.peak is not None], ids=str)
def test_estimates_match_measured_peaks(row):
    estimate = row.estimate_as_run
    assert estimate.peak_allocated / GIB == pytest.approx(row.peak, rel=0.05)
    if row.reserved is not None and row.is_pressed:
        assert estimate.reserved / GIB == pytest.approx(row.reserved, rel=0.05)


def test_estimates_exceed_the_card_where_it_ran_out_of_memory():
    on_cards = [row for row in measured() if row.card is not None]
    too_large = [row for row in on_cards if row.peak is None or row.has_graphs != row.settings.cuda_graphs]
    assert too_large
    for row in too_large:
        assert row.estimate.total > row.card * GIB, row
    fitting = [row for row in on_cards if row not in too_large]
    unforeseen = [(row.arm, row.tokens, row.expert_rank) for row in fitting if row.estimate.total > row.card * GIB]
    assert unforeseen == [
        ("ours+liger", 1024, 16),
        ("ours+compile+graphs+liger-head", 2048, 16),  # it reserved 22.49 of the 22.5 GiB allowed
        ("ours+liger", 4096, 16),
    ]
    for row in fitting:
        assert row.estimate.total <= (row.card + 0.3) * GIB, row


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_parts_of_the_estimate_match_a_loaded_model(model_type, double_quant, tmp_path):
    tiny_model(model_type, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = MoeQuantizationConfig(double_quant=double_quant)
    model = load_quantized(tmp_path, config, device_map="cpu")
    settings = Settings(FourBitFormat(double_quant=double_quant), rank=8, expert_rank=2, accumulates=True)
    found = estimate(read_sizes(tmp_path)[1], settings)
    assert found.experts == experts_report(model).nbytes
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert layers
    of_layers = {id(layer.weight): _nbytes_of_linear(layer) for layer in layers.values()}
    assert found.linear_layers == sum(of_layers.values())
    rest = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in of_layers)
    rest -= experts_report(model).nbytes
    # parameters that models keep in fp32 are counted in 16 bits: one value for each expert
    in_fp32 = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.float32)
    assert found.other_weights == rest - 2 * in_fp32
    config = MoeQLoraConfig(r=8, expert_r=2, double_quant=double_quant, target_modules="all-linear")
    trained = [one for one in get_peft_model(model, config).parameters() if one.requires_grad]
    assert found.factors == found.gradients == sum(parameter.nbytes for parameter in trained)
    assert found.optimizer == 2 * found.factors


def _nbytes_of_linear(layer: Linear4bit) -> int:
    state = layer.weight.quant_state
    tensors = [layer.weight, state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("optim", [name for name in OPTIMIZERS if not name.startswith("paged")])
def test_optimizer_state_matches_the_estimate(optim):
    known = next(known for known in optimizer_table.KNOWN if known.optim == optim)
    if find_spec(known.path.partition(".")[0]) is None:
        pytest.skip(f"{known.path} is not installed")
    shapes = [(16, 300), (300, 16), (4, 16, 256), (4, 264, 16), (4, 2, 64), (8, 64)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = known.make(parameters)
    optimizer.step()
    for parameter in parameters:
        state = {
            name: value
            for name, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor) and not name.startswith(LEFT_OUT)
        }
        assert OPTIMIZERS[optim].state(tuple(parameter.shape)) == sum(value.nbytes for value in state.values())


def test_optimizer_bytes_match_their_documentation():
    shape = (128, 16, 2048)
    per_value = {known.optim: known.state_bytes for known in optimizer_table.KNOWN}
    for name, optimizer in OPTIMIZERS.items():
        if name.startswith("paged"):
            assert optimizer.state(shape) == 0
        else:
            assert optimizer.state(shape) / (128 * 16 * 2048) == pytest.approx(per_value[name], abs=0.005)


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [
        ({"tokens": 2048}, {"tokens": 4096}),
        ({"expert_rank": 4}, {"expert_rank": 16}),
        ({"rank": 8}, {"rank": 16}),
        ({"batch": 1}, {"batch": 2}),
        ({"keep_experts": False}, {"keep_experts": True}),
        ({"optimizer": "adamw_8bit"}, {"optimizer": "adamw_torch_fused"}),
        ({"logits": False}, {"logits": True}),
        ({"cuda_graphs": False}, {"cuda_graphs": True}),
        ({"accumulates": False}, {"accumulates": True}),
        ({"linear_in_4_bits": True}, {"linear_in_4_bits": False}),
    ],
    ids=lambda values: "-".join(f"{name}={value}" for name, value in values.items()),
)
def test_each_setting_affects_the_estimate(smaller, larger):
    sizes = read_sizes(QWEN)[1]
    storage = FourBitFormat(double_quant=True)
    assert estimate(sizes, Settings(storage, **smaller)).total < estimate(sizes, Settings(storage, **larger)).total


# ---- the recommendation


def test_settings_are_relaxed_in_order():
    """A smaller card gets smaller settings, and the recommended ones fit."""
    sizes = read_sizes(QWEN)[1]
    order = [(tokens, rank) for tokens in TOKENS for rank in EXPERT_RANKS]
    places = []
    for card in range(60, 17, -2):
        answer = what_fits(QWEN, sizes, card)
        found = answer.recommended
        if found is None:
            break
        assert found.memory.total <= card * GIB
        places.append(order.index((found.settings.tokens, found.settings.expert_rank)))
        assert answer.longest >= found.settings.tokens
    assert answer.recommended is None
    assert places == sorted(places)
    assert len(set(places)) > 2


def test_storage_has_priority_over_speed():
    sizes = read_sizes(QWEN)[1]
    found = [what_fits(QWEN, sizes, card, Pins(tokens=4096, expert_rank=16)).rows[0] for card in (24, 32, 48, 80)]
    storages = [str(row.settings.storage) for row in found]
    assert storages == ["nf4/64+dq", "nf4/64", "fp8/128x128", "fp8/128x128"]
    assert found[-1].settings.keep_experts
    assert found[-1].settings.cuda_graphs


def test_longest_number_of_tokens_is_the_limit():
    sizes = read_sizes(QWEN)[1]
    answer = what_fits(QWEN, sizes, 40)
    longest = answer.longest
    pins = Pins(
        answer.recommended.settings.storage,
        expert_rank=16,
        keep_experts=answer.recommended.settings.keep_experts,
        optimizer=answer.recommended.settings.optimizer,
    )
    for tokens, fits in ((longest, True), (longest + 512, False)):
        rows = what_fits(QWEN, sizes, 40, Pins(**{**vars(pins), "tokens": tokens})).rows
        graphs = answer.recommended.settings.cuda_graphs
        assert rows[0].fits == fits or rows[0].settings.cuda_graphs != graphs


def test_eager_attention_disables_graphs():
    for row in what_fits("openai/gpt-oss-20b", read_sizes("gpt-oss-20b")[1], 80).rows:
        assert not row.settings.cuda_graphs
        assert row.settings.storage is None


# ---- the command


def test_known_name(capsys):
    whole = printed(capsys, QWEN, "--card", 24)
    assert whole == printed(capsys, "qwen3-30b-a3b", "--card", "24.0")
    assert f'load_quantized("{QWEN}"' in whole
    assert re.search(r"^total +2\d\.\d\d$", whole, re.MULTILINE)


def test_given_options_are_kept(capsys):
    options = ["--tokens", 1024, "--rank", 8, "--expert-rank", 2, "--optimizer", "lion_8bit", "--batch", 2]
    found = inspected(capsys, "olmoe-1b-7b-0924", "--card", 24, *options, "--storage", "int8/channel")
    (row,) = found["rows"]
    settled = {"tokens": 1024, "rank": 8, "expert_rank": 2, "optimizer": "lion_8bit", "batch": 2}
    assert row | settled == row
    assert row["storage"] == "int8/channel"
    assert found["recommended"] == 0
    assert row["memory"]["total"] <= 24 * GIB
    kept = inspected(capsys, "olmoe-1b-7b-0924", "--card", 24, *options, "--keep-experts", "--no-accumulation")
    assert kept["rows"][0]["keep_experts"]
    assert not kept["rows"][0]["accumulates"]


def test_nothing_fits(capsys):
    found = printed(capsys, "mixtral-8x7b-v0.1", "--card", 16)
    least, more = map(float, re.search(r"requires ([\d.]+) GiB, ([\d.]+) more", found).groups())
    assert least - more == pytest.approx(16, abs=0.11)
    assert "The smallest card that fits has 32 GiB" in found
    assert "No known single card" in printed(capsys, "deepseek-v3", "--card", 80)
    assert inspected(capsys, "deepseek-v3", "--card", 80)["recommended"] is None


def test_config_file_alone(tmp_path, capsys):
    config = tiny_config("qwen3_moe", num_hidden_layers=3)
    config.save_pretrained(tmp_path)
    by_file = inspected(capsys, tmp_path / "config.json", "--card", 8)
    assert by_file == inspected(capsys, tmp_path, "--card", 8)
    tiny_model("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=3).save_pretrained(tmp_path)
    assert by_file == inspected(capsys, tmp_path, "--card", 8)


def test_quantized_checkpoint_keeps_its_storage(tmp_path, capsys):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load_quantized(tmp_path / "dense", MoeQuantizationConfig("fp4", 32), device_map="cpu")
    model.save_pretrained(tmp_path / "packed")
    found = inspected(capsys, tmp_path / "packed", "--card", 8)
    assert {row["storage"] for row in found["rows"]} == {"as stored"}
    assert found["rows"][0]["memory"]["experts"] == experts_report(model).nbytes
    assert "as stored" in printed(capsys, tmp_path / "packed", "--card", 8)
    assert "cannot be stored as nf4/64" in refused(capsys, tmp_path / "packed", "--card", 8, "--quant-type", "nf4")


def test_packed_experts_can_be_requantized():
    sizes = read_sizes("gpt-oss-20b")[1]
    as_stored = sizes.experts_nbytes(None)
    # 4 bits, and an 8-bit scale for 32 weights
    assert as_stored == 24 * 32 * 3 * 2880 * 2880 * 17 // 32
    assert sizes.experts_nbytes(parse_format("nf4/64+dq")) < as_stored


def test_quantization_config_with_unknown_contents(tmp_path, capsys):
    config = tiny_config("deepseek_v3")
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    assert "quant_method='fp8'" in refused(capsys, tmp_path / "config.json", "--card", 8)


def test_unknown_name(capsys):
    error = refused(capsys, "qwen3-30b", "--card", 24)
    assert "qwen3-30b is not a checkpoint directory" in error
    assert QWEN in error
    assert "Known names: " in refused(capsys, "zzz", "--card", 24)
    assert "qwen3-30b-a3b is not a directory" in refused(capsys, "qwen3-30b-a3b")


def test_model_without_experts(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": 1}))
    assert "Qwen3ForCausalLM has no routed experts" in refused(capsys, tmp_path, "--card", 24)


@pytest.mark.parametrize("option", ["--card=0", "--card=much", "--card=inf", "--optimizer=adam"])
def test_invalid_options(option, capsys):
    with pytest.raises(SystemExit):
        main(["inspect", QWEN, *(() if "card" in option else ("--card=24",)), option])
    assert option.split("=")[0] in capsys.readouterr().err


def test_options_that_require_card(tmp_path, capsys):
    for option in ("--optimizer=adafactor", "--logits", "--no-accumulation"):
        assert "is only valid with --card" in refused(capsys, tmp_path, option)


@pytest.mark.parametrize(
    ("packed", "options"),
    [(False, []), (False, ["--storage", "fp8/16x16"]), (False, ["--keep-experts"]), (True, [])],
    ids=["plain", "fp8", "kept", "packed"],
)
def test_printed_code_runs(packed, options, tmp_path, capsys, monkeypatch):
    base = tmp_path / "base"
    tiny_model(dtype=torch.bfloat16).save_pretrained(base)
    if packed:
        model = load_quantized(base, MoeQuantizationConfig("fp4", 32), device_map="cpu")
        base = tmp_path / "packed"
        model.save_pretrained(base)
    text = printed(capsys, base, "--card", 8, *options)
    lines = text[text.index("from peft import") :].replace('{"": 0}', '"cpu"').splitlines()
    first, last = (next(at for at, line in enumerate(lines) if sign in line) for sign in ("SFTConfig(", "SFTTrainer("))
    without_trl = [line for at, line in enumerate(lines[:first]) if "trl" not in line]
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec("\n".join(without_trl), found)
    assert len(found["model"].experts_report().stacks) == 4
    if find_spec("trl") is None:
        return
    exec("\n".join(["from trl import SFTConfig", *lines[first:last]]).replace("bf16=True", "bf16=False"), found)
    assert found["arguments"].max_length == 4096
    assert found["arguments"].optim == "adamw_torch_fused"
    if "cuda_graphs=True" in text:  # layers that record router logits for the auxiliary loss are not captured
        assert found["arguments"].router_aux_loss_coef == 0.0


# ---- the list of known models, and the page


PARAMETERS = {
    "3b": 3.3,
    "20b": 20.9,
    "21b": 21.8,
    "26b": 25.2,
    "30b": 30.5,
    "35b": 34.7,
    "80b": 79.7,
    "120b": 116.8,
    "235b": 235.1,
}
"""Published parameter counts in billions of models with such names: text model, without draft layers."""


def test_known_models_have_the_size_in_their_name():
    checked = 0
    for name in known_models():
        said = re.search(r"-(\d+b)-?", name.lower())
        if said and said.group(1) in PARAMETERS:
            values = dict(known_models()[name])
            values.pop("quantization_config", None)
            model = empty_model(transformers.AutoConfig.for_model(values.pop("model_type"), **values))
            total = sum(parameter.numel() for parameter in model.parameters()) / 1e9
            assert total == pytest.approx(PARAMETERS[said.group(1)], abs=0.06), name
            checked += 1
    assert checked >= len(PARAMETERS)


def test_page_is_up_to_date():
    assert card_table.PAGE.read_text(encoding="utf-8") == card_table.documentation(), (
        "docs/cards.md is stale: python tests/card_table.py writes it."
    )


def test_memory_of_a_length_decreases_with_rank():
    rows = [row for row in what_fits(QWEN, read_sizes(QWEN)[1], 1).rows if row.settings.tokens == 2048]
    assert all(one.memory.total > other.memory.total for one, other in pairwise(rows))
