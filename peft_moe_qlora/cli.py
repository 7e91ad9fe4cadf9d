"""The command line: `peft-moe-qlora`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .export import LORA_B_ORDERS, QUANT_TYPE_NAMES, TARGETS, ReadOptions, convert_adapter
from .loading import inspect_checkpoint
from .quantization import BLOCKSIZES, QUANT_TYPES, FourBitFormat


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-moe-qlora", description="QLoRA for mixture-of-experts models.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds and what training it would take, from its headers",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    inspect.add_argument("checkpoint", help="directory with config.json and safetensors")
    inspect.add_argument("--quant-type", choices=QUANT_TYPES, default="nf4", help="storage of experts in 16 bits")
    inspect.add_argument("--blocksize", type=int, choices=BLOCKSIZES, default=64, help="weights that share a scale")
    inspect.add_argument("--double-quant", action="store_true", help="scales in 8 bits")
    inspect.add_argument("--r", type=_positive, default=16, help="rank on linear layers")
    inspect.add_argument("--expert-r", type=_positive, help="rank on experts; that of --r unless given")
    inspect.add_argument("--seq", type=_positive, default=2048, help="tokens in a sequence")
    inspect.add_argument("--batch", type=_positive, default=1, help="sequences in a step")
    inspect.add_argument("--json", action="store_true", help="print plain data instead of tables")
    inspect.set_defaults(run=_inspect)
    convert = commands.add_parser("convert", help="write a saved adapter in another layout, from that of others too")
    convert.add_argument("adapter", help="directory of the adapter")
    convert.add_argument("out", help="directory to be written to")
    convert.add_argument("--to", choices=TARGETS, required=True, help="the layout")
    convert.add_argument("--base", help="directory of the base model; what the adapter names unless given")
    convert.add_argument(
        "--quant-type", choices=QUANT_TYPE_NAMES, default="nf4", help="experts' storage, to moe-qlora"
    )
    convert.add_argument("--written-by", help="the PEFT that wrote it, as peft==0.18.1, if its config doesn't tell")
    convert.add_argument("--lora-b-order", choices=LORA_B_ORDERS, help="of fused lora_B, if the config doesn't tell")
    convert.add_argument("--partial", action="store_true", help="layers that are missing were not adapted")
    convert.set_defaults(run=_convert)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _inspect(args: argparse.Namespace) -> None:
    storage = FourBitFormat(args.quant_type, args.blocksize, args.double_quant)
    found = inspect_checkpoint(args.checkpoint, storage, args.r, args.expert_r, args.seq, args.batch)
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)


def _convert(args: argparse.Namespace) -> None:
    options = ReadOptions(args.quant_type, args.written_by, args.lora_b_order, args.partial)
    found = convert_adapter(args.adapter, args.out, args.to, args.base, options)
    print(f"{len(found.experts)} stacks and {len(found.others)} other tensors written to {args.out} as {args.to}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; errors of the checkpoint are one line on stderr, and 1."""
    args = _parser().parse_args(arguments)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"peft-moe-qlora {args.command}: {error}", file=sys.stderr)
        return 1
    return 0
