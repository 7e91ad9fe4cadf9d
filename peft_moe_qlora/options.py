"""The options of an adapter's config, one row for each: its values, which of them experts honour, where it is used.

Config, readers and writers go by this table. Files are edited by hand and come from other tools, so that readers look
at every value that they use.
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
    """The values that an option may have.

    Args:
        expected: them in words.
        include: whether a value, as JSON has it, is one of them.
    """

    expected: str
    include: Callable[[Any], bool]


@dataclass(frozen=True)
class Option:
    """What there is to know of an option.

    Args:
        values: that it may have in a file; None where readers only look at whether it is honoured.
        honoured: the values that experts can have, the default first; None for all.
        owner: whose option it is: `"lora"`, `"own"` or `"unsloth"`.
        is_needed: by readers of this package's adapters: its default would decide what the tensors mean.
        at_start: after training it says no more than how the factors began.
        matches: it decides which layers are adapted, with what rank and alpha.
        is_carried: from an adapter of others into one of this package.
        is_written: into PEFT's LoRA, as it is.
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
    """Whether a string is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError):  # the second of a count of repetitions
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
    """Whether keys are what PEFT matches the ends of names with."""
    return lambda value: (
        isinstance(value, dict)
        and all(compiles(rf"(.*\.)?({key})$") for key in value)
        and all(map(fits, value.values()))
    )


def _is_name_in_regex(value: Any) -> bool:
    return is_name(value) and compiles(rf"(^|.*\.){value}($|\..*)")  # as PEFT does it with modules_to_save


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
    """Whether what unsloth notes of fused experts has the types that it writes."""
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
TARGETS = Values("a list of names, or a string that is a valid regular expression,", _are_targets)
BIAS = one_of("none", "all", "lora_only")
FORMAT = Values("the name of a format, such as 'fp8/128x128',", _is_format)
_UNSLOTHS_NOTES = Values("an object, with unsloth's notes as it writes them if it has any,", _are_unsloths_notes)

OPTIONS = {
    "alora_invocation_tokens": Option(honoured=(None,)),
    "alpha_pattern": Option(
        Values("an object of regular expressions and finite numbers", _is_pattern_of(is_number)),
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
            "a regular expression or a list of them",
            lambda value: all(is_name(one) and compiles(rf"(?:^|.*?\.){one}\.") for one in _listed(value)),
        ),
        matches=True,
    ),
    "layers_to_transform": Option(
        Values("the number of a layer or a list of them", lambda value: all(map(_is_index, _listed(value)))),
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
        Values("an object of regular expressions and ranks of at least 1", _is_pattern_of(COUNT.include)),
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
        Values("a list of tokens' indices, or an object of such lists,", _are_tokens), matches=True, is_carried=True
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

REMEDY = "The config is damaged, or was edited: correct it, or save the adapter again."


def names_of(**facts: Any) -> tuple[str, ...]:
    """The options of which all these facts hold, by the names of `Option`'s fields."""
    return tuple(
        name
        for name, option in OPTIONS.items()
        if all(getattr(option, fact) == value for fact, value in facts.items())
    )


def values_of(*owners: str) -> dict[str, Values]:
    """Name -> values of the options that these owners have and readers look at."""
    return {name: one.values for name, one in OPTIONS.items() if one.owner in owners and one.values is not None}


def check_honoured(options: Mapping[str, Any]) -> None:
    """Refuses options of LoRA that experts can't have.

    Args:
        options: name -> value; what isn't there has its default.

    Raises:
        ValueError: names the option and its value.
    """
    for name, option in OPTIONS.items():
        if option.honoured is None:
            continue
        value = options.get(name, option.honoured[0])
        if value not in option.honoured:
            remedy = "Leave it out, or use PEFT's LoraConfig without adapting experts."
            if name == "target_parameters":
                remedy = "Name the experts, or projections of them, in target_modules."
            raise ValueError(f"{name}={value!r} is not supported for fused experts. {remedy}")


def check_saved(
    file: Path,
    options: Mapping[str, Any],
    known: Mapping[str, Values],
    needed: Collection[str],
    can_be_null: Collection[str],
    prefix: str = "",
) -> None:
    """Refuses a saved config that says too little, or has values of a wrong type or range.

    Args:
        file: for errors.
        options: what JSON has.
        known: the options that are looked at.
        needed: those that have to be there.
        can_be_null: those for which null has a meaning, or counts as left out.
        prefix: of the options' names, for errors.

    Raises:
        ValueError: names the file, the option, what was found and what was expected.
    """
    for name, values in known.items():
        if name not in options:
            if name in needed:
                raise ValueError(f"{file} has no {prefix}{name}; {values.expected} was expected. {REMEDY}")
            continue
        value = options[name]
        if value is None and name in can_be_null:
            continue
        if value is None or not values.include(value):
            raise ValueError(f"{file}: {prefix}{name}={shown(value)}; {values.expected} was expected. {REMEDY}")


def shown(value: Any) -> str:
    """A value for an error, however long it is."""
    return f"{value!r:.200}"
