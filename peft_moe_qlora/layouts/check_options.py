"""What may stand in an adapter's config: files are edited by hand, and written by many."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from peft import TaskType

from ..base_identity import BaseIdentity
from ..config import MoeQLoraConfig
from ..quantization import BLOCKSIZES, QUANT_TYPES


@dataclass(frozen=True)
class _Values:
    """The values that an option may have.

    Args:
        expected: them in words.
        include: whether a value, as JSON has it, is one of them.
    """

    expected: str
    include: Callable[[Any], bool]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError):  # the second of a count of repetitions
        return False
    return True


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_index(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_rank(value: Any) -> bool:
    return _is_int(value) and value >= 1


def _is_number(value: Any) -> bool:
    # an int may be too large for a float
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_pattern_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether keys are what PEFT matches the ends of names with."""
    return lambda value: (
        isinstance(value, dict)
        and all(_compiles(rf"(.*\.)?({key})$") for key in value)
        and all(map(fits, value.values()))
    )


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_name_in_regex(value: Any) -> bool:
    return _is_name(value) and _compiles(rf"(^|.*\.){value}($|\..*)")  # as PEFT does it with modules_to_save


def _are_targets(value: Any) -> bool:
    return _compiles(value) if isinstance(value, str) else _is_list_of(_is_name)(value)


def _are_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(_is_list_of(_is_index)(one) and one for one in lists)


def _are_unsloths_notes(value: Any) -> bool:
    """Whether what unsloth notes of fused experts has the types that it writes."""
    if not isinstance(value, dict) or not isinstance(value.get("lora_B_layout"), (str, type(None))):
        return False
    nested = [value.get("unsloth_fused_expert_lora"), value.get("parameters")]
    if not all(one is None or isinstance(one, dict) for one in nested):
        return False
    notes = [nested[0], *(nested[1] or {}).values()]
    return all(one is None or _are_unsloths_notes(one) for one in notes)


_FLAG = _Values("true or false", lambda value: isinstance(value, bool))
_TEXT = _Values("a string", _is_text)
_RANK = _Values("a whole number of at least 1", _is_rank)
_NUMBER = _Values("a finite number", _is_number)
_INT = _Values("a whole number", _is_int)
_PROBABILITY = _Values("a probability below 1", lambda value: _is_number(value) and 0 <= value < 1)
_TARGETS = _Values("a list of names, or a string that is a valid regular expression,", _are_targets)
_UNSLOTHS_NOTES = _Values("an object, with unsloth's notes as it writes them if it has any,", _are_unsloths_notes)


def _one_of(*values: Any) -> _Values:
    # by type too, since True == 1
    return _Values(f"one of {values}", lambda value: any(type(value) is type(one) and value == one for one in values))


# what the readers use; options that experts can't have at all are in config.check_honoured
_OF_LORA = {
    "alpha_pattern": _Values("an object of regular expressions and finite numbers", _is_pattern_of(_is_number)),
    "auto_mapping": _UNSLOTHS_NOTES,
    "base_model_name_or_path": _TEXT,
    "bias": _one_of("none", "all", "lora_only"),
    "ensure_weight_tying": _FLAG,
    "exclude_modules": _TARGETS,
    "fan_in_fan_out": _FLAG,
    "inference_mode": _FLAG,
    "init_lora_weights": _Values("true, false or a string", lambda value: isinstance(value, (bool, str))),
    "layers_pattern": _Values(
        "a regular expression or a list of them",
        lambda value: all(_is_name(one) and _compiles(rf"(?:^|.*?\.){one}\.") for one in _listed(value)),
    ),
    "layers_to_transform": _Values(
        "the number of a layer or a list of them", lambda value: all(map(_is_index, _listed(value)))
    ),
    "lora_alpha": _NUMBER,
    "lora_bias": _FLAG,
    "lora_dropout": _PROBABILITY,
    "modules_to_save": _Values("a list of names", _is_list_of(_is_name_in_regex)),
    "peft_version": _TEXT,
    "r": _RANK,
    "rank_pattern": _Values("an object of regular expressions and ranks of at least 1", _is_pattern_of(_is_rank)),
    "revision": _TEXT,
    "target_modules": _TARGETS,
    "target_parameters": _Values(
        "a list of names", lambda value: isinstance(value, str) or _is_list_of(_is_name)(value)
    ),
    "task_type": _one_of(*(one.value for one in TaskType)),
    "trainable_token_indices": _Values("a list of tokens' indices, or an object of such lists,", _are_tokens),
    "use_dora": _FLAG,
    "use_qalora": _FLAG,
    "use_rslora": _FLAG,
}
_OF_UNSLOTH = {"lora_B_layout": _TEXT, "unsloth_fused_expert_lora": _UNSLOTHS_NOTES}
_OWN = {
    "blocksize": _one_of(*BLOCKSIZES),
    "double_quant": _FLAG,
    "expert_alpha": _NUMBER,
    "expert_r": _RANK,
    "format_version": _RANK,
    "quant_type": _one_of(*QUANT_TYPES),
}
# without these the defaults of whoever reads would decide what the tensors mean
_NEEDED = ("lora_alpha", "r")
_NEEDED_OF_OWN = (
    *_NEEDED,
    "alpha_pattern",
    "blocksize",
    "double_quant",
    "format_version",
    "quant_type",
    "rank_pattern",
    "target_modules",
    "use_rslora",
)
# null has a meaning, or is the default; saved configs have their targets written out
_CAN_BE_NULL = {field.name for field in fields(MoeQLoraConfig) if field.default is None} - {"target_modules"}
_CAN_BE_NULL |= {"quant_type"}
_REMEDY = "The config is damaged, or was edited: correct it, or save the adapter again."


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_own(file: Path, options: Mapping[str, Any]) -> None:
    """Refuses a config of this package that says too little, or has values of a wrong type or range.

    Args:
        file: for errors.
        options: what JSON has.

    Raises:
        ValueError: names the file, the option, what was found and what was expected.
    """
    _check(file, options, _OF_LORA | _OWN, _NEEDED_OF_OWN, _CAN_BE_NULL)
    _check_base(file, options.get("base"))


def check_lora(file: Path, options: Mapping[str, Any]) -> None:
    """As `check_own`, of a config of PEFT's LoRA; null counts as left out where the readers don't need the option."""
    known = _OF_LORA | _OF_UNSLOTH
    _check(file, options, known, _NEEDED, known.keys() - set(_NEEDED))
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ValueError(
            f"{file}: target_modules={_shown(options.get('target_modules'))} without target_parameters; "
            f"{_TARGETS.expected} was expected. {_REMEDY}"
        )


def check_mlx(file: Path, options: Mapping[str, Any]) -> None:
    """As `check_own`, of a config of mlx-lm."""
    known = {
        "fine_tune_type": _TEXT,
        "lora_parameters": _Values("an object", lambda value: isinstance(value, dict)),
        "model": _TEXT,
        "num_layers": _INT,
    }
    _check(file, options, known, ("lora_parameters", "num_layers"), {"model"})
    parameters = {
        "dropout": _PROBABILITY,
        "keys": _Values("a list of names", _is_list_of(_is_name)),
        "rank": _RANK,
        "scale": _NUMBER,
    }
    _check(file, options["lora_parameters"], parameters, ("rank", "scale"), {"keys"}, "lora_parameters.")


def _check(
    file: Path,
    options: Mapping[str, Any],
    known: Mapping[str, _Values],
    needed: Collection[str],
    can_be_null: Collection[str],
    prefix: str = "",
) -> None:
    for name, values in known.items():
        if name not in options:
            if name in needed:
                raise ValueError(f"{file} has no {prefix}{name}; {values.expected} was expected. {_REMEDY}")
            continue
        value = options[name]
        if value is None and name in can_be_null:
            continue
        if value is None or not values.include(value):
            raise ValueError(f"{file}: {prefix}{name}={_shown(value)}; {values.expected} was expected. {_REMEDY}")


def _check_base(file: Path, recorded: Any) -> None:
    try:
        BaseIdentity.of(recorded)
    except ValueError as error:
        raise ValueError(f"{file}: base: {error} {_REMEDY}") from error


def _shown(value: Any) -> str:
    return f"{value!r:.200}"
