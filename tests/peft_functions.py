"""PEFT's functions on experts: each is called on stacks of experts and on the equivalent linear layers.

`python tests/peft_functions.py` writes docs/peft.md from this table. peft_cases.py has the calls.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import peft_cases as cases
import torch
from peft import helpers, optimizers
from peft.tuners.lora import LoraLayer
from peft_cases import Case
from torch import nn


@dataclass(frozen=True)
class Works:
    """Both sides return the same to 1e-6: numbers, dictionaries of tensors by name, models.

    Args:
        case: called with a side and a directory; its results are compared.
        note: a note in the table.
    """

    case: Case
    note: str = ""


@dataclass(frozen=True)
class Refused:
    """Our side raises an error that contains the sentence, and the factors do not change.

    Args:
        case: called with our side and a directory.
        sentence: part of the error.
        instead: the remedy, for the table.
    """

    case: Case
    sentence: str
    instead: str


def layers(method: str, *args: Any, **options: Any) -> Works:
    return Works(lambda side, directory: cases.on_layers(method, *args, side=side, directory=directory, **options))


def switched(change: Callable[[nn.Module], Any], note: str = "") -> Works:
    return Works(partial(cases.switched, change=change), note)


EVA = "init_lora_weights='eva' is not supported for fused experts"
LORA_GA = "lora_ga_config="
CONVERT = "Some module types on this model do not support LoRA conversion: <class 'peft_moe_qlora.layer.ExpertsLora'>"
INSTEAD_CONVERT = "`peft-moe-qlora convert` writes the adapter in the layouts of other tools."
INSTEAD_OPTIMIZER = "Use an elementwise optimizer, such as AdamW, or LoRA+, or adapt linear layers only."

TABLE: dict[str, Works | Refused] = {
    # peft
    "get_peft_model": Works(lambda side, directory: side.adapted(side.config(rank_pattern={cases.PATTERN: 6}))),
    "get_peft_config": Works(cases.from_dict),
    "PeftModel.from_pretrained, load_adapter": Works(cases.loaded, "With every option, and with modules_to_save."),
    "load_peft_weights": Works(lambda side, directory: cases.loaded(side, directory)[0]),
    "autocast_adapter_dtype": Works(cases.loaded_on_bf16, "Dtypes and requires_grad on 16-bit bases."),
    "inject_adapter_in_model": Works(cases.injected, "With and without state_dict and low_cpu_mem_usage."),
    "get_peft_model_state_dict": Works(cases.state_round_trip),
    "set_peft_model_state_dict": Works(cases.state_round_trip),
    "get_base_model_state_dict": Works(cases.base_round_trip, "For 4-bit experts, the keys are those of the codes."),
    "set_base_model_state_dict": Works(cases.base_round_trip),
    "get_layer_status": Works(cases.layer_status),
    "get_model_status": Works(cases.model_status),
    "cast_mixed_precision_params": Works(cases.cast),
    "prepare_model_for_kbit_training": Works(
        cases.prepared, "Casts 16-bit experts to fp32; `prepare_model_for_training` doesn't."
    ),
    "convert_to_lora": Refused(
        lambda side, directory: peft.convert_to_lora(side.adapted(), rank=2), CONVERT, INSTEAD_CONVERT
    ),
    "save_as_lora": Refused(
        lambda side, directory: peft.save_as_lora(directory, side.adapted(), rank=2), CONVERT, INSTEAD_CONVERT
    ),
    "create_arrow_model": Refused(
        cases.arrow, "LoRA adapters must only target Linear-like layers", "Merge them instead."
    ),
    "XLoraModel": Refused(
        cases.xlora,
        "XLoraModel and other methods that combine adapters do not support experts",
        "`add_weighted_adapter` combines adapters.",
    ),
    "PeftMixedModel": Refused(
        lambda side, directory: peft.get_peft_model(side.base(), side.config(), mixed=True),
        "is not compatible with the `PeftMixedModel`",
        "Adapters of this method can be combined with each other.",
    ),
    "initialize_lora_eva_weights": Refused(
        lambda side, directory: side.config(init_lora_weights="eva"), EVA, "Rejected by the config."
    ),
    "get_eva_state_dict": Refused(
        lambda side, directory: side.config(init_lora_weights="eva"), EVA, "Rejected by the config."
    ),
    "preprocess_loraga": Refused(
        lambda side, directory: side.config(lora_ga_config=peft.LoraGAConfig()), LORA_GA, "Rejected by the config."
    ),
    "PeftModel.disable_adapter": Works(cases.disabled),
    "PeftModel.set_adapter": switched(lambda model: model.set_adapter("second")),
    "PeftModel.set_requires_grad": switched(lambda model: model.set_requires_grad("second")),
    "PeftModel.delete_adapter": switched(lambda model: model.delete_adapter("default")),
    "PeftModel.get_nb_trainable_parameters, print_trainable_parameters": switched(
        lambda model: (*model.get_nb_trainable_parameters(), model.print_trainable_parameters())
    ),
    "adapter_names in a forward": Works(cases.mixed_batch),
    "LoraModel.set_adapter with several": switched(lambda model: model.base_model.set_adapter(["default", "second"])),
    "LoraModel.disable_adapter_layers": switched(lambda model: model.base_model.disable_adapter_layers()),
    "LoraModel.enable_adapter_layers": switched(
        lambda model: (model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers())
    ),
    "LoraModel.add_weighted_adapter": Works(
        cases.combined_all,
        f"All of {', '.join(cases.COMBINATIONS)}. "
        "With rsLoRA, PEFT's result is sqrt(r) times too large; this one is not.",
    ),
    "LoraModel.merge_adapter, unmerge_adapter": Works(cases.merged, "In 4 bits, merged weights are rounded."),
    "LoraModel.merge_and_unload": Works(cases.merge_and_unload, "In 4 bits, merged weights are rounded."),
    "LoraModel.unload": Works(cases.unload),
    "LoraLayer.set_scale": layers("set_scale", "default", 0.3, use_rslora=True),
    "LoraLayer.scale_layer": layers("scale_layer", 0.3),
    "LoraLayer.unscale_layer": layers("unscale_layer"),
    "LoraLayer.unscale_layer(scale)": layers("unscale_layer", 2.0),
    "LoraLayer.get_delta_weight": Works(cases.deltas, "Returns a stack, `(E, out, in)`."),
    # peft.helpers
    "update_forward_signature": Works(cases.signatures),
    "update_generate_signature": Works(cases.signatures),
    "update_signature": Works(cases.signatures),
    "check_if_peft_model": Works(cases.is_peft_model),
    "rescale_adapter_scale": Works(cases.rescaled),
    "disable_input_dtype_casting": Works(cases.without_casting),
    # peft.utils
    "hotswap_adapter": Refused(
        cases.hotswapped,
        "Hotswapping only supports LORA but MOE_QLORA was passed",
        "`load_adapter` with the name of an existing adapter replaces its factors in place, if the ranks match.",
    ),
    "transformers' load_adapter(hotswap=True)": Refused(
        cases.transformers_hotswap, "Hotswapping is currently only supported for LoRA", "As for `hotswap_adapter`."
    ),
    "prepare_model_for_compiled_hotswap": Refused(
        cases.padded, "A stack of experts has no attribute `weight`", "As for `hotswap_adapter`."
    ),
    "hotswap_adapter_from_state_dict": Works(
        cases.swapped, "For adapters of one rank without expert_alpha; PEFT checks neither."
    ),
    # optimizers
    "create_loraplus_optimizer": Works(cases.loraplus),
    "create_lorafa_optimizer": Refused(
        partial(cases.optimized, optimizers.create_lorafa_optimizer, r=4, lora_alpha=6, lr=1e-2),
        "create_lorafa_optimizer supports only 2-D factors",
        INSTEAD_OPTIMIZER,
    ),
    "create_riemannian_optimizer": Refused(
        partial(cases.optimized, optimizers.create_riemannian_optimizer, optimizer_cls=torch.optim.SGD, lr=1e-2),
        "create_riemannian_optimizer supports only 2-D factors",
        INSTEAD_OPTIMIZER,
    ),
    "torch.optim.Muon": Refused(
        lambda side, directory: torch.optim.Muon([p for p in side.adapted().parameters() if p.requires_grad]),
        "Muon only supports 2D parameters",
        INSTEAD_OPTIMIZER,
    ),
}

NOT_OF_LORA = {
    "bloom_model_postprocess_past_key_value": "prefix tuning",
    "compose_cartridge_adapters": "cartridges",
    "initialize_kv_prefix_from_past_key_values": "prefix tuning",
    "initialize_kv_prefix_from_text": "prefix tuning",
    "prompt_embeddings_from_past_key_values": "prompt tuning",
    "shift_tokens_right": "text of encoder-decoder models",
    "map_cache_to_layer_device_map": "prefix tuning",
    "find_kappa_target_modules": "chooses targets of a model without adapters",
    "get_gptqmodel_quant_linear": "another quantization",
    "get_quantization_config": "another quantization",
    "get_quantization_kwargs": "another quantization",
    "quantization_extra_repr": "inside PEFT's layers",
    "resolve_quantization_backend": "inside PEFT's layers",
    "id_tensor_storage": "about tensors",
    "infer_device": "about the machine",
    "transpose": "about tensors",
    "register_peft_method": "for methods of other packages",
    "set_additional_trainable_modules": "inside get_peft_model",
}
"""Exported by PEFT, but not applicable to LoRA on experts."""

NO_CALCULATION = {
    "active_adapter",
    "active_adapters",
    "active_peft_config",
    "adapter_layer_names",
    "base_model_torch_dtype",
    "bias",
    "create_or_update_model_card",
    "disable_adapters",
    "frozen_peft_weight_names",
    "get_base_layer",
    "get_base_model",
    "get_model_config",
    "get_prompt",
    "get_prompt_embedding_to_save",
    "has_active_enabled_adapter",
    "lora_variants",
    "merged",
    "merged_adapters",
    "modules_to_save",
    "other_param_names",
    "peft_config",
    "prefix",
    "prepare_model_for_gradient_checkpointing",
    "push_to_hub",
    "quantization_backend",
    "resolve_lora_variant",
    "supports_lora_conversion",
    "target_module_mapping",
    "tuner_layer_cls",
    "uses_shared_state",
    "weight",
}
"""Public attributes of PEFT's classes that only describe the model, or are used for model cards and uploads."""

BY_OTHER_ROWS = {
    "add_adapter",
    "enable_adapters",
    "generate",
    "get_base_weight",
    "inject_adapter",
    "merge",
    "reset_lora_parameters",
    "save_pretrained",
    "set_base_weight",
    "subtract_mutated_init",
    "unmerge",
    "update_layer",
}
"""Public methods that other rows call, or that tests of merging and initialization cover (`get_base_weight`, ...)."""

REFUSED_BY_THE_CONFIG = {
    f"{kind}_init" for kind in ("corda", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa")
}

NOTES = {
    "replace_lora_weights_loftq": "Replaces the factors of bitsandbytes' linear layers and leaves those of experts. "
    "It needs a GPU and is not tested. `loftq_config` is rejected."
}


def exported() -> set[str]:
    """The public functions of PEFT that accept a model."""
    names = set()
    for module in (peft, optimizers, helpers, peft.utils):
        listed = getattr(module, "__all__", None)
        if listed is None:
            listed = [
                name for name, value in vars(module).items() if getattr(value, "__module__", "") == "peft.helpers"
            ]
        names |= {name for name in listed if type(getattr(module, name)) is type(exported) and name[0] != "_"}
    return names


def methods() -> set[str]:
    """The public attributes of PEFT's classes beyond those of `nn.Module`."""
    classes = (peft.PeftModel, peft.LoraModel, LoraLayer)
    return {name for cls in classes for name in dir(cls) if name[0] != "_"} - set(dir(nn.Module))


def documentation() -> str:
    """The text of docs/peft.md."""
    lines = [
        "# PEFT's functions on experts",
        "",
        "Generated by `python tests/peft_functions.py`; `tests/test_lora_parity.py` tests every row. *Works*: values,",
        "names and flags match those of PEFT's LoRA on a model whose experts are `nn.Linear` layers, expert for",
        "expert. *Rejected*: the call raises the quoted error.",
        "",
        "| function | on experts | |",
        "|--|--|--|",
    ]
    for name, row in TABLE.items():
        if isinstance(row, Works):
            lines.append(f"| `{name}` | works | {row.note} |")
        else:
            lines.append(f'| `{name}` | rejected: "{row.sentence}" | {row.instead} |')
    lines += [f"| `{name}` | linear layers only | {note} |" for name, note in NOTES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs" / "peft.md"
    page.write_text(documentation())
    print(page, file=sys.stderr)
