"""The command line: `peft-moe-qlora`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from safetensors import SafetensorError

from .layouts import LORA_B_ORDERS, QUANT_TYPE_NAMES, TARGETS, ReadOptions, convert_adapter
from .loading import inspect_checkpoint
from .loading.cards.estimate import OPTIMIZERS
from .loading.cards.known import read_sizes
from .loading.cards.search import Pins, what_fits
from .loading.expert_shapes import read_expert_shapes
from .merge import (
    ENGINE_LAYOUTS,
    LAYOUTS,
    ONTO,
    ROUNDINGS,
    merge_checkpoint,
    merge_quantized,
    plan_unmerged,
    read_windows,
    verify_merge,
)
from .ops.layer_shape import LayerShape
from .quantization import BLOCKSIZES, QUANT_TYPES, format_of, parse_format

_DTYPES = ("bfloat16", "float16", "float32")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-moe-qlora", description="QLoRA for mixture-of-experts models.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_inspect(commands)
    merge = commands.add_parser(
        "merge",
        help="merge an adapter into its base and write one checkpoint",
    )
    merge.add_argument("base", help="directory or hub name of the base model")
    merge.add_argument("adapter", help="directory of the adapter")
    merge.add_argument("out", help="output directory; rerun to resume an interrupted merge")
    merge.add_argument(
        "--onto",
        choices=ONTO,
        default="quantized",
        help="merge into the weights as quantized in training, or into those of the checkpoint (default: %(default)s)",
    )
    merge.add_argument("--dtype", choices=_DTYPES, help="dtype of the result; default: that of the checkpoint")
    kinds = merge.add_mutually_exclusive_group()
    kinds.add_argument(
        "--quantize",
        metavar="FORMAT",
        help="requantize experts to the format used in training, such as nf4; loads the model into memory",
    )
    kinds.add_argument(
        "--serve-as",
        metavar="FORMAT",
        choices=ENGINE_LAYOUTS,
        help="quantize for vLLM and SGLang, with nearest rounding: one of %(choices)s",
    )
    merge.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="layout of a quantized result; default: the layout of the base if it is quantized, else native",
    )
    merge.add_argument(
        "--rounding",
        choices=ROUNDINGS,
        default="second-order",
        help="rounding of a quantized result (default: %(default)s)",
    )
    merge.add_argument(
        "--calibration", metavar="TEXT", help="text file for second-order rounding; default: random tokens"
    )
    merge.add_argument(
        "--verify", metavar="TEXT", help="text file on which to compare the unmerged adapter and the result"
    )
    _add_verify_options(merge, "device for --quantize and --verify (default: %(default)s)")
    _add_read_options(merge, "storage of the experts during training, for an adapter from another tool; default: none")
    merge.add_argument("--allow-unchanged", action="store_true", help="continue if a delta is too small for the dtype")
    merge.add_argument("--dry-run", action="store_true", help="run all checks, write nothing")
    merge.set_defaults(run=_merge)
    verify = commands.add_parser("verify", help="compare a merged checkpoint with the unmerged adapter on a text")
    verify.add_argument("merged", help="output directory of merge")
    verify.add_argument("text", help="plain text file")
    _add_verify_options(verify, "device of the models (default: %(default)s)")
    verify.set_defaults(run=_verify)
    convert = commands.add_parser(
        "convert", help="convert a saved adapter, including one from another tool, to another layout"
    )
    convert.add_argument("adapter", help="directory of the adapter")
    convert.add_argument("out", help="output directory")
    convert.add_argument("--to", choices=TARGETS, required=True, help="layout to write")
    convert.add_argument(
        "--base", help="directory of the base model; default: the base model named in the adapter's config"
    )
    _add_read_options(
        convert, "storage of the experts during training, for an adapter from another tool; default: nf4"
    )
    convert.set_defaults(run=_convert)
    _add_tune(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="show a checkpoint's contents and the memory needed to train it; with --card, settings that fit on a GPU",
    )
    inspect.add_argument(
        "checkpoint",
        metavar="MODEL",
        help="directory with config.json and safetensors; with --card, also a config.json or a known name",
    )
    inspect.add_argument("--card", metavar="GIB", type=_gib, help="memory of the GPU in GiB; finds settings that fit")
    inspect.add_argument("--quant-type", choices=QUANT_TYPES, help="4-bit type for unquantized experts (default: nf4)")
    inspect.add_argument("--storage", metavar="FORMAT", help="format of the experts, such as 'mxfp4'")
    inspect.add_argument("--blocksize", type=int, choices=BLOCKSIZES, help="weights per scale (default: 64)")
    inspect.add_argument("--double-quant", action="store_true", help="store scales in 8 bits")
    inspect.add_argument("--r", "--rank", type=_positive, default=16, help="rank on linear layers (default: 16)")
    inspect.add_argument("--expert-r", "--expert-rank", type=_positive, help="rank on experts (default: --r)")
    inspect.add_argument("--seq", "--tokens", type=_positive, help="tokens per sequence (default: 2048)")
    inspect.add_argument("--batch", type=_positive, default=1, help="sequences per step (default: 1)")
    inspect.add_argument(
        "--keep-experts", action="store_true", help='assume use_gradient_checkpointing="keep-experts"'
    )
    inspect.add_argument("--optimizer", choices=OPTIMIZERS, help="optim of TrainingArguments (only with --card)")
    inspect.add_argument(
        "--logits", action="store_true", help="assume an unfused loss, without TRL or Liger (only with --card)"
    )
    inspect.add_argument(
        "--no-accumulation", action="store_true", help="assume gradient_accumulation_steps=1 (only with --card)"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    inspect.epilog = (
        "With --card, the command searches for the values that are not given: storage, expert rank, tokens, optimizer "
        "and keep-experts."
    )
    inspect.set_defaults(run=_inspect)


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser(
        "tune",
        help="measure the fastest tile sizes for a model on this GPU, and store them in the user's cache directory",
    )
    tune.add_argument("model", nargs="?", help="directory or hub name of a model; only its config is read")
    tune.add_argument("--hidden", type=_positive, help="hidden size, instead of a model")
    tune.add_argument("--intermediate", type=_positive, help="intermediate size of an expert")
    tune.add_argument("--experts", type=_positive, help="experts per layer")
    tune.add_argument("--top-k", type=_positive, help="experts per token")
    tune.add_argument(
        "--storage",
        metavar="FORMAT",
        default="nf4/64",
        help="storage of experts; '16-bit' for bf16 and fp16 (default: %(default)s)",
    )
    tune.add_argument("--rank", type=_positive, default=16, help="LoRA rank on experts (default: %(default)s)")
    tune.add_argument(
        "--rows", type=_positive, nargs="+", help="mean rows per expert (default: the rows of 4 sequence lengths)"
    )
    tune.add_argument("--workers", type=_positive, help="number of compilation processes (default: at most 8)")
    tune.set_defaults(run=_tune)


def _add_verify_options(parser: argparse.ArgumentParser, use_of_device: str) -> None:
    parser.add_argument(
        "--verify-dtype", choices=_DTYPES, help="dtype in which both models run; default: the dtype of the training"
    )
    parser.add_argument("--device", default="cpu", help=use_of_device)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _add_read_options(parser: argparse.ArgumentParser, use_of_quant_type: str) -> None:
    parser.add_argument("--quant-type", choices=QUANT_TYPE_NAMES, help=use_of_quant_type)
    parser.add_argument(
        "--written-by",
        help="PEFT version that wrote the adapter, such as peft==0.18.1, if its config does not contain one",
    )
    parser.add_argument(
        "--lora-b-order", choices=LORA_B_ORDERS, help="order of fused lora_B, if the config does not contain it"
    )
    parser.add_argument("--partial", action="store_true", help="treat missing layers as not adapted")


def _read_options(args: argparse.Namespace) -> ReadOptions:
    return ReadOptions(args.quant_type, args.written_by, args.lora_b_order, args.partial)


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (AssertionError, RuntimeError) as error:  # depends on the build of torch
        raise ValueError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _gib(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in GiB, such as 24")
    return found


def _inspect(args: argparse.Namespace) -> str:
    is_pinned = args.quant_type or args.storage or args.blocksize or args.double_quant
    storage = format_of(args.storage, args.quant_type or "nf4", args.blocksize or 64, args.double_quant)
    if args.card is None:
        _check_unused(args, "--card", optimizer=None, logits=False, no_accumulation=False)
        found = inspect_checkpoint(
            args.checkpoint, storage, args.r, args.expert_r, args.seq or 2048, args.batch, args.keep_experts
        )
    else:
        name, sizes = read_sizes(args.checkpoint)
        pins = Pins(
            storage if is_pinned else None,
            args.r,
            args.expert_r,
            args.seq,
            args.batch,
            args.keep_experts or None,
            args.optimizer,
            args.logits,
            not args.no_accumulation,
        )
        found = what_fits(name, sizes, args.card, pins)
    return _shown(found, args)


def _merge(args: argparse.Namespace) -> str:
    _check_device(args.device)
    if args.verify is None:
        _check_unused(args, "--verify", verify_dtype=None)
        if args.quantize is None:
            _check_unused(args, "--quantize or --verify", device="cpu")
    else:
        # check the options before the merge
        plan = plan_unmerged(args.base, args.adapter)
        read_windows(args.verify, args.base, plan.revision)
    if args.quantize is None:
        _check_unused(args, "--quantize", layout=None, rounding="second-order", calibration=None)
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        report = merge_checkpoint(
            args.base,
            args.adapter,
            args.out,
            args.onto,
            dtype,
            args.dry_run,
            options=_read_options(args),
            allow_unchanged=args.allow_unchanged,
            serve_as=args.serve_as,
        )
    else:
        reading = {"quant_type": None, "written_by": None, "lora_b_order": None, "partial": False}
        _check_unused(args, "a merge without --quantize", onto="quantized", dtype=None, **reading)
        report = merge_quantized(
            args.base,
            args.adapter,
            args.out,
            args.quantize,
            args.layout,
            args.rounding,
            args.calibration,
            args.device,
            args.dry_run,
            allow_unchanged=args.allow_unchanged,
        )
    if args.verify is None or args.dry_run:
        return _shown(report, args)
    return _verify(argparse.Namespace(**{**vars(args), "merged": args.out, "text": args.verify}))


def _verify(args: argparse.Namespace) -> str:
    _check_device(args.device)
    dtype = None if args.verify_dtype is None else getattr(torch, args.verify_dtype)
    return _shown(verify_merge(args.merged, args.text, dtype, args.device), args)


def _shown(report: Any, args: argparse.Namespace) -> str:
    return json.dumps(report.to_dict(), indent=1) if args.json else str(report)


def _check_unused(args: argparse.Namespace, place: str, **defaults: Any) -> None:
    """Rejects options that would have no effect."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise ValueError(f"--{name.replace('_', '-')} is only valid with {place}. Remove it.")


def _convert(args: argparse.Namespace) -> str:
    found = convert_adapter(args.adapter, args.out, args.to, args.base, _read_options(args))
    return f"{len(found.experts)} stacks and {len(found.non_expert)} other tensors written to {args.out} as {args.to}"


def _tune(args: argparse.Namespace) -> str:
    if not torch.cuda.is_available():
        raise ValueError("tune requires a GPU, but torch finds none. Run it on the machine that is used for training.")
    from .ops.kernels.tuning import forget_tables, gpu_of, tiles_origin
    from .ops.kernels.user_table import read_user_table, write_user_table
    from .ops.tune import measure_layer, today  # needs Triton

    shapes = _layer_shapes(args)
    storage = None if args.storage == "16-bit" else parse_format(args.storage)
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = gpu_of(device)
    read_user_table(gpu)  # rejects an invalid table before the measurement
    lines = []
    for shape in shapes:
        entries = measure_layer(shape, storage, args.rank, args.rows or (), args.workers)
        path = write_user_table(gpu, entries, today())
        for entry in entries:
            product = f"{entry['weight']} {entry['n']}x{entry['k']} along {entry['along']}"
            rows, time, tiles = entry["measured_at"], entry["milliseconds"], entry["tiles"]
            lines.append(f"{product}, {rows:g} rows per expert: {time} ms, {tiles}")
    forget_tables()
    return "\n".join([*lines, str(path), str(tiles_origin(device, torch.bfloat16))])


def _layer_shapes(args: argparse.Namespace) -> list[LayerShape]:
    sizes = {"hidden": args.hidden, "intermediate": args.intermediate, "experts": args.experts, "top_k": args.top_k}
    options = ", ".join(f"--{name.replace('_', '-')}" for name in sizes)
    if args.model is None:
        if None in sizes.values():
            raise ValueError(f"no model and no complete shape given. Pass a model, or all of {options}.")
        return [LayerShape(**sizes)]
    given = {name: None for name in sizes if name != "top_k"}
    _check_unused(args, "a shape instead of a model", **given)
    layouts, top_k = read_expert_shapes(args.model)
    top_k = args.top_k or top_k
    if top_k is None:
        raise ValueError(f"the config of {args.model} does not contain the number of experts per token. Pass --top-k.")
    return [
        LayerShape(
            layout.num_experts,
            layout.hidden_size,
            layout.intermediate_size,
            top_k,
            layout.is_transposed,
            layout.has_gate,
        )
        for layout in layouts
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command. Errors print one line on stderr and return 1; an interruption returns 130."""
    args = _parser().parse_args(arguments)
    try:
        # some libraries, such as DeepSpeed, print to stdout when imported; keep stdout for the result
        with redirect_stdout(sys.stderr):
            found = args.run(args)
    except (ValueError, OSError, SafetensorError) as error:  # the last, if a disk is full
        print(f"peft-moe-qlora {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        next_time = (
            ". Rerun the same command to resume; a merge with --quantize starts over"
            if args.command == "merge"
            else ""
        )
        print(f"peft-moe-qlora {args.command}: interrupted{next_time}.", file=sys.stderr)
        return 130
    print(found)
    return 0
