"""Searches for settings that fit on a card, in order of preference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from tabulate import tabulate

from ...quantization import BY_SIZE, Format, FourBitFormat, parse_format
from .estimate import GIB, MemoryEstimate, Settings, estimate
from .sizes import ModelSizes

TOKENS = (4096, 2048, 1024, 512)
EXPERT_RANKS = (16, 8, 4, 2)
SEARCHED_OPTIMIZERS = ("adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit")
CARDS = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 180, 192, 288)
"""Memory of common cards, GiB."""
LONGEST = 2**17


@dataclass(frozen=True)
class Pins:
    """Settings fixed before the search; the search chooses those that are None. See `Settings` for the arguments."""

    storage: Format | None = None
    rank: int = 16
    expert_rank: int | None = None
    tokens: int | None = None
    batch: int = 1
    keep_experts: bool | None = None
    optimizer: str | None = None
    logits: bool = False
    accumulates: bool = True


@dataclass(frozen=True)
class Row:
    """The best settings that fit at one length and rank, or the smallest if none fit."""

    settings: Settings
    memory: MemoryEstimate
    fits: bool


@dataclass(frozen=True)
class CardAnswer:
    """Result of `what_fits`; prints as tables and code to paste.

    Args:
        model: name or path of the model.
        model_class: class of the model.
        packed_as: see `ModelSizes`.
        card: memory of the card, GiB.
        rows: one row for each sequence length and rank on experts.
        longest: longest sequence that fits with the recommended settings, in tokens.
    """

    model: str
    model_class: str
    packed_as: Format | None
    card: float
    rows: tuple[Row, ...]
    longest: int | None

    @property
    def recommended(self) -> Row | None:
        """The first row that fits."""
        return next((row for row in self.rows if row.fits), None)

    @property
    def smallest(self) -> Row:
        """The row that takes the least memory."""
        return min(self.rows, key=lambda row: row.memory.total)

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {
                **asdict(row.settings),
                "storage": storage_name(row.settings),
                "memory": asdict(row.memory) | {"total": row.memory.total},
                "fits": row.fits,
            }
            for row in self.rows
        ]
        found = self.recommended
        return {
            "model": self.model,
            "model_class": self.model_class,
            "card": self.card,
            "rows": rows,
            "recommended": None if found is None else self.rows.index(found),
            "longest": self.longest,
        }

    def __str__(self) -> str:
        header = ("tokens", "expert rank", "expert storage", "optimizer", "recomputed", "graphs", "GiB", "fits")
        table = tabulate([_shown(row) for row in self.rows], header, disable_numparse=True)
        found = self.recommended
        if found is None:
            return f"{table}\n\n{self._what_is_missing()}\n{self.smallest.memory.table()}"
        sequences = f"{found.settings.batch} x " if found.settings.batch > 1 else ""
        title = f"Recommended: {sequences}{found.settings.tokens:,} tokens (up to {self.longest:,} fit):"
        lines = recipe(self.model, found.settings, self.packed_as)
        return "\n".join([table, "", title, found.memory.table(), "", *lines])

    def _what_is_missing(self) -> str:
        least = self.smallest.memory.total / GIB
        larger = [size for size in CARDS if size >= least]
        remedy = f"The smallest card that fits has {larger[0]} GiB" if larger else "No known single card has enough"
        return (
            f"Nothing fits on {self.card:g} GiB: the smallest of these settings requires {least:.1f} GiB, "
            f"{least - self.card:.1f} more. {remedy}."
        )


def storage_name(settings: Settings) -> str:
    return "as stored" if settings.storage is None else str(settings.storage)


def _shown(row: Row) -> tuple[str, ...]:
    settings = row.settings
    return (
        f"{settings.tokens:,}",
        str(settings.expert_rank),
        storage_name(settings),
        settings.optimizer,
        "all but experts" if settings.keep_experts else "all",
        "yes" if settings.cuda_graphs else "no",
        f"{row.memory.total / GIB:.1f}",
        "yes" if row.fits else "no",
    )


def what_fits(model: str, sizes: ModelSizes, card: float, pins: Pins = Pins()) -> CardAnswer:
    """Searches for settings that fit, for sequence lengths and ranks on experts in order of preference.

    At one length and rank, precision takes precedence: first of the storage, then of the optimizer (fp32, 8-bit, paged
    8-bit AdamW). Then speed: graphs with kept experts, graphs only, kept experts only, neither.

    Args:
        model: name or path of the model, for the code to paste.
        sizes: sizes of the model.
        card: memory of the card, GiB.
        pins: fixed settings.

    Raises:
        ValueError: the experts can't be stored in the requested format.
    """
    rows = []
    for tokens, expert_rank in product(_or(pins.tokens, TOKENS), _or(pins.expert_rank, EXPERT_RANKS)):
        found = [
            Row(settings, memory, memory.total <= card * GIB)
            for settings in _candidates(sizes, pins, tokens, expert_rank)
            for memory in [estimate(sizes, settings)]
        ]
        fitting = next((row for row in found if row.fits), None)
        rows.append(fitting or min(found, key=lambda row: row.memory.total))
    best = next((row for row in rows if row.fits), None)
    longest = None if best is None else _longest(sizes, best.settings, card)
    return CardAnswer(model, sizes.model_class, sizes.packed_as, card, tuple(rows), longest)


def _or(pinned: Any | None, wished: tuple) -> tuple:
    return wished if pinned is None else (pinned,)


def _candidates(sizes: ModelSizes, pins: Pins, tokens: int, expert_rank: int) -> Iterator[Settings]:
    """All settings in order of preference."""
    # graphs keep the memory of a layer's attention, which is most of the total without SDPA
    graphs = (False,) if sizes.eager_heads else (True, False)
    for storage, optimizer, cuda_graphs, keep_experts in product(
        _storages(sizes, pins),
        _or(pins.optimizer, SEARCHED_OPTIMIZERS),
        graphs,
        _or(pins.keep_experts, (True, False)),
    ):
        yield Settings(
            storage,
            pins.rank,
            expert_rank,
            tokens,
            pins.batch,
            keep_experts,
            optimizer,
            linear_in_4_bits=isinstance(storage, FourBitFormat),
            logits=pins.logits,
            cuda_graphs=cuda_graphs,
            accumulates=pins.accumulates,
        )


def _storages(sizes: ModelSizes, pins: Pins) -> tuple[Format | None, ...]:
    """Storages to try, None for that of the checkpoint."""
    if sizes.is_packed and not sizes.may_repack:
        if pins.storage is not None:
            raise ValueError(
                f"The experts are already quantized, and cannot be stored as {pins.storage}. Remove that option."
            )
        return (None,)
    if pins.storage is not None:
        return (pins.storage,)
    storages = tuple(map(parse_format, BY_SIZE))
    if sizes.is_packed:
        return (None, *(storage for storage in storages if isinstance(storage, FourBitFormat)))
    return storages


def _longest(sizes: ModelSizes, settings: Settings, card: float) -> int:
    """Longest sequence that fits, in steps of 256 tokens."""
    fitting, too_long = settings.tokens, LONGEST + 1
    while too_long - fitting > 256:
        middle = (fitting + too_long) // 2
        if estimate(sizes, replace(settings, tokens=middle)).total <= card * GIB:
            fitting = middle
        else:
            too_long = middle
    return max(settings.tokens, fitting // 256 * 256)


def recipe(model: str, settings: Settings, packed_as: Format | None = None) -> list[str]:
    """Code to paste, up to the dataset."""
    storage, found = storage_name(settings), settings.storage or packed_as
    stored = "" if found is None else f', storage="{found}"'
    loading = f'"{model}"'
    names = ["MoeQLoraConfig", "load_quantized", "prepare_model_for_training"]
    if settings.storage is not None:
        names.insert(1, "MoeQuantizationConfig")
        linear = "" if settings.linear_in_4_bits else ", quantize_linear=False"
        loading += f', MoeQuantizationConfig(storage="{storage}"{linear})'
    keep = '"keep-experts"' if settings.keep_experts else "True"
    fast = ", compile_layers=True, cuda_graphs=True" if settings.cuda_graphs else ""
    arguments = [
        f"max_length={settings.tokens}",
        f"per_device_train_batch_size={settings.batch}",
        f'optim="{settings.optimizer}"',
        "bf16=True",
        "gradient_checkpointing=False",  # otherwise Trainer replaces the checkpointing that was set up before
    ]
    if settings.cuda_graphs:
        arguments.append("router_aux_loss_coef=0.0")  # TRL's auxiliary loss records router logits: no graphs
    lines = [
        "from peft import get_peft_model",
        f"from peft_moe_qlora import {', '.join(names)}",
        "from peft_moe_qlora.training import cast_trainable_to_fp32",
        "from trl import SFTConfig, SFTTrainer  # its loss never materializes all logits",
        "",
        f'model = load_quantized({loading}, device_map={{"": 0}})',
        f"prepare_model_for_training(model, use_gradient_checkpointing={keep}{fast})",
        f"config = MoeQLoraConfig(r={settings.rank}, expert_r={settings.expert_rank}, lora_alpha={2 * settings.rank}, "
        f'target_modules="all-linear"{stored})',
        "model = get_peft_model(model, config)",
        "arguments = SFTConfig(",
        '    "run",',
        *(f"    {argument}," for argument in arguments),
        ")",
        "trainer = SFTTrainer(model, arguments, train_dataset=...)",
        "cast_trainable_to_fp32(trainer.model)  # TRL casts factors to bf16, which loses small updates",
    ]
    if settings.optimizer == "adamw_8bit":
        lines.append("# faster: optimizer_cls_and_kwargs=(peft_moe_qlora.training.UnsyncedAdamW8bit, {'lr': 1e-4})")
    if settings.cuda_graphs:
        lines.append("# graphs are captured per length: pad or pack to few lengths, or remove cuda_graphs")
    return lines
