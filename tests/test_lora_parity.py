"""PEFT's public functions on stacks of experts, compared with the same functions on the equivalent linear layers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft_functions
import pytest
import torch
from linear_experts import Ours, Stock, per_expert
from peft_functions import (
    BY_OTHER_ROWS,
    NO_CALCULATION,
    NOT_OF_LORA,
    NOTES,
    REFUSED_BY_THE_CONFIG,
    TABLE,
    Refused,
    Works,
)
from tiny_models import logits, token_ids
from torch import nn

WORKS = {name: row for name, row in TABLE.items() if isinstance(row, Works)}
REFUSED = {name: row for name, row in TABLE.items() if isinstance(row, Refused)}


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Tensors to 1e-6, models by everything observable, anything else exactly."""
    if isinstance(expected, nn.Module):
        assert_same(observed(found), observed(expected), where)
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(
            found, expected, rtol=1e-5, atol=1e-5 if expected.dim() > 2 else 1e-6, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where} {key}")
    elif isinstance(expected, (tuple, list)):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{where}[{number}]")
    else:
        assert found == expected, where


def observed(model: nn.Module) -> dict[str, Any]:
    """Names, values, dtypes and flags of the parameters, expert by expert, and the logits."""
    model.eval()
    parameters = list(model.named_parameters())
    return {
        "values": per_expert((name, parameter.detach()) for name, parameter in parameters),
        "requires_grad": per_expert((name, parameter.requires_grad) for name, parameter in parameters),
        "logits": logits(model, token_ids()).float(),
    }


@pytest.mark.parametrize("name", WORKS)
@pytest.mark.filterwarnings("ignore")
def test_supported_functions_give_the_same_results(name, tmp_path):
    torch.manual_seed(0)
    found = WORKS[name].case(Ours(), tmp_path)
    torch.manual_seed(0)
    assert_same(found, WORKS[name].case(Stock(), tmp_path))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_unsupported_functions_raise_the_quoted_error(name, tmp_path):
    with pytest.raises((ValueError, TypeError, AttributeError)) as raised:
        REFUSED[name].case(Ours(), tmp_path)
    assert REFUSED[name].sentence in str(raised.value)


def test_every_function_of_peft_is_listed():
    """Fails when PEFT exports a new one: add it to the table, or explain why it does not apply to LoRA."""
    placed = {name for entry in TABLE for name in entry.split(", ")} | NOT_OF_LORA.keys() | NOTES.keys()
    assert peft_functions.exported() - placed == set()
    assert NOT_OF_LORA.keys() <= peft_functions.exported()


def test_every_method_of_peft_is_listed():
    """Fails when one of PEFT's LoRA classes gets a new one."""
    words = {word for entry in TABLE for word in re.findall(r"\w+", entry)}
    placed = words | NO_CALCULATION | BY_OTHER_ROWS | REFUSED_BY_THE_CONFIG
    assert peft_functions.methods() - placed == set()


@pytest.mark.parametrize("name", sorted(REFUSED_BY_THE_CONFIG))
def test_weight_based_initializations_are_rejected(name):
    kind = name.removesuffix("_init")
    with pytest.raises(ValueError, match=rf"init_lora_weights='{kind}' is not supported for fused experts"):
        Ours().config(init_lora_weights=kind)


def test_page_is_up_to_date():
    """`python tests/peft_functions.py` writes it."""
    page = Path(__file__).parent.parent / "docs" / "peft.md"
    assert page.read_text() == peft_functions.documentation()
