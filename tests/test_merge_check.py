"""Comparing a merged model with the unmerged adapter."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

import pytest
import torch
from merged_checkpoints import save_adapter
from peft import PeftModel, get_peft_model
from peft.tuners import lora
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.cli import main
from peft_moe_qlora.merge import MergeReport
from peft_moe_qlora.merge.check import MergeCheck, take_reference


def adapted(**options) -> PeftModel:
    model = get_peft_model(tiny_model(), MoeQLoraConfig(**{"r": 4, "target_modules": "all-linear", **options})).eval()
    randomize_adapter(model)
    return model


def last_states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, output_hidden_states=True).hidden_states[-1]


def break_linear_layers(monkeypatch) -> None:
    """As if a library decoded them wrongly: the figures of the experts' stacks do not show it."""
    merge = lora.Linear.merge

    def merge_wrongly(self, *args, **kwargs):
        merge(self, *args, **kwargs)
        self.base_layer.weight.data = self.base_layer.weight.data.roll(1, dims=0)

    monkeypatch.setattr(lora.Linear, "merge", merge_wrongly)


def test_correct_merge_is_measured_without_a_warning():
    """The figures equal those of a direct comparison."""
    model, ids = adapted(), token_ids(batch=5, length=30)
    live = last_states(model, ids)
    with model.disable_adapter():
        base = last_states(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        merged = model.merge_and_unload(calibration=ids)
    check = model.base_model.merge_check
    assert check.num_positions == 5 * 30
    assert check.num_broken == 0
    assert check.error == pytest.approx(((last_states(merged, ids) - live).norm() / live.norm()).item(), rel=1e-4)
    assert check.effect == pytest.approx(((base - live).norm() / live.norm()).item(), rel=1e-4)
    assert 0 < check.error < 0.3 * check.effect
    assert check.problem is None
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_number_of_tokens_is_limited():
    model = adapted()
    model.merge_and_unload(calibration=token_ids(batch=50, length=60))
    assert model.base_model.merge_check.num_positions == 8 * 60
    model = adapted()
    model.merge_and_unload(calibration=token_ids(batch=2, length=600))
    assert model.base_model.merge_check.num_positions == 512


def test_wrongly_merged_layer_is_reported(monkeypatch):
    break_linear_layers(monkeypatch)
    model = adapted()
    with pytest.warns(RuntimeWarning, match="differs too much from the unmerged adapter: hidden states differ"):
        model.merge_and_unload()
    assert model.base_model.merge_check.error > 0.5


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_checkpoint_merge_reports_it(rounding, monkeypatch, tmp_path, capsys):
    save_adapter(tmp_path)
    command = ["merge", *(str(tmp_path / name) for name in ("base", "adapter"))]
    options = ["--quantize", "nf4", "--rounding", rounding]
    assert main([*command, str(tmp_path / "sound"), *options]) == 0
    output = capsys.readouterr().out
    sound = MergeReport.read(tmp_path / "sound")
    assert sound.check.problem is None
    assert f"merged model: {sound.check}" in output
    break_linear_layers(monkeypatch)
    with pytest.warns(RuntimeWarning, match="differs too much from the unmerged adapter"):
        assert main([*command, str(tmp_path / "broken"), *options]) == 0
    broken = MergeReport.read(tmp_path / "broken")
    assert broken.check.error > 0.5 > sound.check.error
    assert broken.notes[-1] == broken.check.problem
    assert broken.check.problem in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "effect", "is_far"),
    [
        (0.45, 1.0, False),
        (0.55, 1.0, True),  # more than half of the adapter's effect
        (1.1, 1.4, True),
        (0.12, 0.1, True),
        (0.09, 0.1, False),  # 4 bits lose this little
    ],
)
def test_threshold_of_a_problem(error, effect, is_far):
    assert (MergeCheck(512, 0, error, effect).problem is not None) == is_far


def test_nonfinite_unmerged_states_are_ignored():
    """Merged states that are not finite at other positions are reported."""
    model = adapted()

    def spoil(*positions: int):
        def hook(module, args, output):
            output = output.clone()
            output[:, positions] = torch.inf
            return output

        return model.base_model.model.model.norm.register_forward_hook(hook)

    handle = spoil(3)
    ids = token_ids(batch=2, length=20)
    reference = take_reference(model.base_model, ["default"], ids)
    merged = model.merge_and_unload(rounding="nearest")
    check = reference.check(merged)
    assert (check.num_positions, check.num_broken, check.problem) == (38, 0, None)
    assert 0 < check.error < 0.5
    handle.remove()
    handle = spoil(5, 6)
    with pytest.warns(RuntimeWarning, match="broken: its hidden states are not finite at 4 of 38 positions"):
        assert reference.check(merged).num_broken == 4
    handle.remove()
    with pytest.warns(RuntimeWarning, match="could not be compared"):
        assert replace(reference, unmerged=reference.unmerged * torch.nan).check(merged).num_positions == 0


@pytest.mark.parametrize(
    ("give", "num_positions"),
    [
        (lambda output: output.logits, 10),
        (lambda output: (output.logits, None), 10),
        (lambda output: output.logits.mean(dim=(1, 2)), 1),
        (lambda output: {"text": "nothing to compare"}, 0),
    ],
)
def test_other_kinds_of_models(give, num_positions):
    """Called with ids only; they are merged, whatever they return."""

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_model()

        def forward(self, ids):
            return give(self.inner(ids))

    model = get_peft_model(Other(), MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        merged = model.merge_and_unload(calibration=token_ids(batch=2, length=5))
    assert isinstance(merged, Other)
    assert model.base_model.merge_check.num_positions == num_positions
    messages = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert any("could not be compared" in message for message in messages) == (num_positions == 0)


def test_merge_without_a_forward_has_no_check():
    model = adapted()
    model.merge_and_unload(rounding="nearest")
    assert model.base_model.merge_check is None


def test_older_reports_can_be_read(tmp_path):
    report = MergeReport("base", "adapter", "0", "quantized", "nf4", 1, 1, 1)
    values = report.to_dict()
    del values["check"]
    (tmp_path / "merge_report.json").write_text(json.dumps(values))
    assert MergeReport.read(tmp_path) == report
