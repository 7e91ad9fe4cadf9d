"""The options of an adapter config, one entry each: allowed values, which of them experts support, where it is used.

The config class, readers and writers share this table. Config files are edited by hand or written by other tools, so
readers validate every value that they use.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import TaskType

from .quantization import BLOCKSIZES, QUANT_TYPES, parse_format


@dataclass(frozen=True)
class Values:
    """The allowed values of an option.

    Args:
        expected: description of the values, for errors: `Expected {expected}.`
        include: returns whether a value, as parsed from JSON, is allowed.
    """

    expected: str
    include: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """Properties of an option.

    Args:
        values: allowed values in a file; None if readers only check that experts support the value.
        honoured: the values that experts support, the default first; None for all.
        owner: who defines the option: `"lora"`, `"own"` or `"unsloth"`.
        is_needed: an adapter config of this package must contain it, because the meaning of the tensors depends on it.
        at_start: only affects the initialization of the factors, so it has no meaning after training.
        matches: determines which layers are adapted, or their rank and alpha.
        is_carried: copied when an adapter of another tool is converted to this package's format.
        is_written: copied unchanged when an adapter is converted to PEFT's LoRA.
    """

    values: Values | None = None
    honoured: tuple[Any, ...] | None = None
    owner: str = "lora"
    is_needed: bool = False
    at_start: bool = False
    matches: bool = False
    is_carried: bool = False
    is_written: bool = False


def compiles(pattern: str) -> bool:
    """Whether a string is a valid regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError):  # OverflowError: a repetition count is too large
        return False
    return True


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    # an int may be too large for a float
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and -sys.float_info.max <= value <= sys.float_info.max


def is_list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_index(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_pattern_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Checks the keys (patterns that PEFT matches against the ends of module names) and values of an object."""
    return lambda value: (
        isinstance(value, dict)
        and all(compiles(rf"(.*\.)?({key})$") for key in value)
        and all(map(fits, value.values()))
    )


def _is_name_in_regex(value: Any) -> bool:
    return is_name(value) and compiles(rf"(^|.*\.){value}($|\..*)")  # as PEFT matches modules_to_save


def _is_format(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_format(value) is not None
    except ValueError:
        return False


def _are_targets(value: Any) -> bool:
    return compiles(value) if isinstance(value, str) else is_list_of(is_name)(value)


def _are_tokens(value: Any) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(is_list_of(_is_index)(one) and one for one in lists)


def _are_unsloths_notes(value: Any) -> bool:
    """Whether unsloth's metadata on fused experts has the types that unsloth writes."""
    if not isinstance(value, dict) or not isinstance(value.get("lora_B_layout"), (str, type(None))):
        return False
    nested = [value.get("unsloth_fused_expert_lora"), value.get("parameters")]
    if not all(one is None or isinstance(one, dict) for one in nested):
        return False
    notes = [nested[0], *(nested[1] or {}).values()]
    return all(one is None or _are_unsloths_notes(one) for one in notes)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def one_of(*values: Any) -> Values:
    # by type too, since True == 1
    return Values(f"one of {values}", lambda value: any(type(value) is type(one) and value == one for one in values))


FLAG = Values("true or false", lambda value: isinstance(value, bool))
TEXT = Values("a string", lambda value: isinstance(value, str))
INT = Values("a whole number", is_int)
COUNT = Values("a whole number of at least 1", lambda value: is_int(value) and value >= 1)
NUMBER = Values("a finite number", is_number)
PROBABILITY = Values("a probability below 1", lambda value: is_number(value) and 0 <= value < 1)
TARGETS = Values("a list of names, or a string that is a valid regular expression", _are_targets)
BIAS = one_of("none", "all", "lora_only")
FORMAT = Values("the name of a format, such as 'fp8/128x128'", _is_format)
_UNSLOTHS_NOTES = Values(
    "an object whose unsloth entries, if any, have the types that unsloth writes", _are_unsloths_notes
)

OPTIONS = {
    "alora_invocation_tokens": Option(honoured=(None,)),
    "alpha_pattern": Option(
        Values("an object that maps regular expressions to finite numbers", _is_pattern_of(is_number)),
        is_needed=True,
        matches=True,
    ),
    "arrow_config": Option(honoured=(None,)),
    "auto_mapping": Option(_UNSLOTHS_NOTES),
    "base_model_name_or_path": Option(TEXT, is_carried=True, is_written=True),
    "bias": Option(BIAS),
    "corda_config": Option(honoured=(None,), at_start=True),
    "ensure_weight_tying": Option(FLAG, honoured=(False,)),
    "eva_config": Option(honoured=(None,), at_start=True),
    "exclude_modules": Option(TARGETS, matches=True),
    "fan_in_fan_out": Option(FLAG, honoured=(False,)),
    "inference_mode": Option(FLAG),
    "init_lora_weights": Option(
        Values("true, false or a string", lambda value: isinstance(value, (bool, str))),
        honoured=(True, False, "gaussian"),
        at_start=True,
    ),
    "kasa_config": Option(honoured=(None,)),
    "layer_replication": Option(honoured=(None,)),
    "layers_pattern": Option(
        Values(
            "a regular expression or a list of regular expressions",
            lambda value: all(is_name(one) and compiles(rf"(?:^|.*?\.){one}\.") for one in _listed(value)),
        ),
        matches=True,
    ),
    "layers_to_transform": Option(
        Values("a layer index or a list of layer indices", lambda value: all(map(_is_index, _listed(value)))),
        matches=True,
    ),
    "loftq_config": Option(honoured=(None, {}), at_start=True),
    "lora_alpha": Option(NUMBER, is_needed=True, matches=True, is_written=True),
    "lora_bias": Option(FLAG, honoured=(False,)),
    "lora_dropout": Option(PROBABILITY, is_carried=True),
    "lora_ga_config": Option(honoured=(None,), at_start=True),
    "megatron_config": Option(honoured=(None,)),
    "modules_to_save": Option(
        Values("a list of names", is_list_of(_is_name_in_regex)), matches=True, is_carried=True, is_written=True
    ),
    "monteclora_config": Option(honoured=(None,)),
    "peft_version": Option(TEXT),
    "r": Option(COUNT, is_needed=True, matches=True, is_written=True),
    "rank_pattern": Option(
        Values("an object that maps regular expressions to ranks of at least 1", _is_pattern_of(COUNT.include)),
        is_needed=True,
        matches=True,
    ),
    "revision": Option(TEXT, is_carried=True, is_written=True),
    "target_modules": Option(TARGETS, is_needed=True, matches=True),
    "target_parameters": Option(
        Values("a list of names", lambda value: isinstance(value, str) or is_list_of(is_name)(value)),
        honoured=(None, []),
    ),
    "task_type": Option(one_of(*(one.value for one in TaskType)), is_carried=True, is_written=True),
    "trainable_token_indices": Option(
        Values("a list of token indices, or an object of such lists", _are_tokens), matches=True, is_carried=True
    ),
    "use_bdlora": Option(honoured=(None, False)),
    "use_dora": Option(FLAG, honoured=(False,)),
    "use_qalora": Option(FLAG, honoured=(False,)),
    "use_rslora": Option(FLAG, is_needed=True, matches=True, is_carried=True, is_written=True),
    "velora_config": Option(honoured=(None,)),
    "blocksize": Option(one_of(*BLOCKSIZES), owner="own", is_needed=True),
    "double_quant": Option(FLAG, owner="own", is_needed=True),
    "expert_alpha": Option(NUMBER, owner="own"),
    "expert_r": Option(COUNT, owner="own"),
    "format_version": Option(COUNT, owner="own", is_needed=True),
    "quant_type": Option(one_of(*QUANT_TYPES), owner="own", is_needed=True),
    "storage": Option(FORMAT, owner="own"),
    "lora_B_layout": Option(TEXT, owner="unsloth"),
    "unsloth_fused_expert_lora": Option(_UNSLOTHS_NOTES, owner="unsloth"),
}

REMEDY = "The config is damaged or was edited. Correct it, or save the adapter again."


def names_of(**facts: Any) -> tuple[str, ...]:
    """Names of the options whose `Option` fields have all of these values."""
    return tuple(
        name
        for name, option in OPTIONS.items()
        if all(getattr(option, fact) == value for fact, value in facts.items())
    )


def values_of(*owners: str) -> dict[str, Values]:
    """Name -> allowed values, for the options of these owners that readers validate."""
    return {name: one.values for name, one in OPTIONS.items() if one.owner in owners and one.values is not None}


def check_honoured(options: Mapping[str, Any]) -> None:
    """Rejects LoRA options that are not supported for experts.

    Args:
        options: name -> value; a missing option has its default value.

    Raises:
        ValueError: an option is not supported; the error has its name and value.
    """
    for name, option in OPTIONS.items():
        if option.honoured is None:
            continue
        value = options.get(name, option.honoured[0])
        if value not in option.honoured:
            remedy = "Remove it, or use PEFT's LoraConfig without adapting experts."
            if name == "target_parameters":
                remedy = "Name the experts or their projections in target_modules."
            raise ValueError(f"{name}={value!r} is not supported for fused experts. {remedy}")


def check_saved(
    file: Path,
    options: Mapping[str, Any],
    known: Mapping[str, Values],
    needed: Collection[str],
    can_be_null: Collection[str],
    prefix: str = "",
) -> None:
    """Rejects a saved config that lacks a required option, or has a value of a wrong type or range.

    Args:
        file: path of the config, for errors.
        options: the parsed JSON object.
        known: the options to check.
        needed: names of the required options.
        can_be_null: names of the options that may be null.
        prefix: prefix of the options' names in errors.

    Raises:
        ValueError: an option is missing or invalid; the error names the file, the option, and the expected values.
    """
    for name, values in known.items():
        if name not in options:
            if name in needed:
                raise ValueError(f"{file} has no {prefix}{name}. Expected {values.expected}. {REMEDY}")
            continue
        value = options[name]
        if value is None and name in can_be_null:
            continue
        if value is None or not values.include(value):
            raise ValueError(f"{file}: {prefix}{name}={shown(value)}. Expected {values.expected}. {REMEDY}")


def shown(value: Any) -> str:
    """The repr of a value, cut off after 200 characters, for errors."""
    return f"{value!r:.200}"
