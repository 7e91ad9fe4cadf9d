"""The page docs/cards.md: what `peft-moe-qlora inspect MODEL --card GIB` says, and how it compares to measurements.

`python tests/card_table.py` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from peft_moe_qlora.loading.cards.estimate import GIB, MemoryEstimate, Settings, estimate
from peft_moe_qlora.loading.cards.known import known_models, read_sizes
from peft_moe_qlora.loading.cards.search import EXPERT_RANKS, TOKENS, Row, storage_name, what_fits
from peft_moe_qlora.loading.cards.sizes import ModelSizes
from peft_moe_qlora.quantization import FourBitFormat, parse_format

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cards.md"
RESULTS = ROOT / "benchmarks" / "results"

CARDS = (16, 24, 32, 48, 80, 141)
SHAPES = {
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
    "mixtral-8x7b": "mistralai/Mixtral-8x7B-v0.1",
}
"""Model names in benchmarks/models.py."""
OPTIMIZERS = {
    "adamw-fused": "adamw_torch_fused",
    "adamw8bit": "adamw_8bit",
    "adamw8bit-unsynced": "adamw_8bit",
    "paged-adamw8bit": "paged_adamw_8bit",
}
"""The arms of benchmarks/step.py that are estimated."""
ARM_SETTINGS = {"compile", "graphs", "liger", "liger-head", "keep-experts"}


@dataclass(frozen=True)
class Measured:
    """A row of benchmarks/step.py.

    Args:
        shape, arm, tokens, expert_rank, optimizer: as in benchmarks/step.py.
        settings: the same as `Settings`; with graphs also if these did not fit.
        card: memory limit in GiB that was set for torch; None for the whole card.
        peak, reserved: GiB; None if it ran out of memory, `reserved` also if it was not recorded.
        has_graphs: layers were captured.
    """

    shape: str
    arm: str
    tokens: int
    expert_rank: int
    optimizer: str
    settings: Settings
    card: float | None
    peak: float | None
    reserved: float | None
    has_graphs: bool

    @property
    def estimate(self) -> MemoryEstimate:
        """Estimate for the settings that were asked for."""
        return estimate(sizes(SHAPES[self.shape]), self.settings)

    @property
    def estimate_as_run(self) -> MemoryEstimate:
        """Estimate without graphs where these did not fit."""
        return estimate(sizes(SHAPES[self.shape]), replace(self.settings, cuda_graphs=self.has_graphs))

    @property
    def is_pressed(self) -> bool:
        """Whether torch had no spare memory to reserve."""
        return self.card is not None or (self.has_graphs and not self.settings.logits)

    def __str__(self) -> str:
        return f"{self.shape}, {self.arm}, {self.tokens}, r {self.expert_rank}, {self.optimizer}, {self.card}"


@cache
def sizes(name: str) -> ModelSizes:
    return read_sizes(name)[1]


def measured() -> Iterator[Measured]:
    """All complete steps of this package whose settings can be estimated."""
    for file in sorted(RESULTS.glob("h200-step*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        for row in found["steps"]:
            arm, *given = row.get("arm", "ours").split("+")
            optimizer = row.get("optimizer", "adamw8bit")
            shape = row.get("shape", found.get("shape"))
            if arm != "ours" or set(given) - ARM_SETTINGS or optimizer not in OPTIMIZERS or shape not in SHAPES:
                continue
            if row.get("layers") not in (None, known_models()[SHAPES[shape]]["num_hidden_layers"]):
                continue
            storage = parse_format(row["storage"])
            settings = Settings(
                storage,
                row.get("rank", 16),
                row.get("expert_rank", 16),
                row["tokens"],
                row.get("batch", 1),
                "keep-experts" in given,
                OPTIMIZERS[optimizer],
                linear_in_4_bits=isinstance(storage, FourBitFormat),
                logits=not {"liger", "liger-head"} & set(given),
                cuda_graphs="graphs" in given,
            )
            yield Measured(
                shape,
                "+".join((arm, *given)),
                row["tokens"],
                settings.expert_rank,
                optimizer,
                settings,
                found.get("settings", {}).get("card"),
                max(filter(None, (row["peak_gib"], row.get("warmup_peak_gib"))), default=None),
                row.get("reserved_gib"),
                row.get("graphs", "0 graphs")[:2] != "0 " and "graphs" in given,
            )


def _difference(found: int, expected: float | None) -> str:
    return "" if expected is None else f"{found / GIB:.1f} ({100 * (found / GIB / expected - 1):+.1f} %)"


def _comparison() -> Iterator[str]:
    yield "| model | arm | card | tokens | experts' r | optimizer | peak | estimate | reserved | estimate | needs |"
    yield "|--|--|--|--|--|--|--|--|--|--|--|"
    for one in measured():
        memory = one.estimate_as_run
        cells = (
            one.shape,
            f"`{one.arm}`, `{one.settings.storage}`",
            "" if one.card is None else f"{one.card:g}",
            f"{one.tokens:,}",
            str(one.expert_rank),
            f"`{one.optimizer}`",
            "out of memory" if one.peak is None else f"{one.peak:.1f}",
            _difference(memory.peak_allocated, one.peak),
            "" if one.reserved is None else f"{one.reserved:.1f}",
            _difference(memory.reserved, one.reserved),
            f"{one.estimate.total / GIB:.1f}",
        )
        yield f"| {' | '.join(cells)} |"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    settings = row.settings
    speed = [*(["graphs"] if settings.cuda_graphs else []), *(["kept"] if settings.keep_experts else [])]
    optimizer = {"adamw_torch_fused": "32", "adamw_8bit": "8", "paged_adamw_8bit": "paged"}[settings.optimizer]
    parts = (f"{settings.tokens:,}", f"r {settings.expert_rank}", storage_name(settings), optimizer, *speed)
    return " · ".join(parts)


def _models() -> Iterator[str]:
    yield f"| model | least, GiB | {' | '.join(f'{card} GiB' for card in CARDS)} |"
    yield "|--|--|" + "--|" * len(CARDS)
    for name in known_models():
        answers = [what_fits(name, sizes(name), card) for card in CARDS]
        cells = [_cell(answer.recommended) for answer in answers]
        yield f"| {name} | {answers[0].smallest.memory.total / GIB:.1f} | {' | '.join(cells)} |"


def documentation() -> str:
    """The text of the page."""
    lines = [
        "# What fits on my card",
        "",
        "Generated by `python tests/card_table.py`; `tests/test_card.py` fails when it is stale.",
        "",
        "```bash",
        "peft-moe-qlora inspect Qwen3-30B-A3B --card 24",
        "```",
        "",
        "The command prints settings that fit on a GPU of the given GiB, the parts of the estimate and code to paste.",
        "It reads no weights. MODEL is",
        "",
        "- the directory of a checkpoint, quantized or not (the command reads its config and tensor headers),",
        "- a `config.json` alone, whose weights are assumed to be in 16 bits (for gpt-oss: experts in MXFP4), or",
        "- a name from the table below, case-insensitive, with or without its organization.",
        "",
        "These options fix a setting; the command searches for the others: `--tokens`, `--batch`, `--rank`,",
        "`--expert-rank`, `--optimizer`, `--keep-experts`, and the storage by `--storage` or `--quant-type`,",
        "`--blocksize` and `--double-quant`. `--json` prints plain data.",
        "",
        "## Search order",
        "",
        f"The command tries lengths {', '.join(f'{one:,}' for one in TOKENS)}, and for each length ranks "
        f"{', '.join(map(str, EXPERT_RANKS))} on experts.",
        "For each length and rank it takes the first settings that fit, in this order:",
        "",
        "1. the storage of the checkpoint if it is quantized, then experts in FP8 with linear layers in 16 bits, then",
        "   all in NF4, then NF4 with 8-bit scales;",
        "2. fp32 AdamW, 8-bit AdamW, paged 8-bit AdamW with its state in CPU memory;",
        "3. compiled layers in CUDA graphs with `keep-experts`, graphs alone, `keep-experts` alone, neither.",
        "",
        "The command recommends the first row that fits: length takes precedence over rank, and rank over storage.",
        "",
        "The estimate assumes LoRA on all linear layers and all experts, factors in fp32, gradient checkpointing,",
        "gradient accumulation (`--no-accumulation` for a step of one batch, which takes less memory), and a fused",
        "loss that never materializes all logits, as in TRL's trainers and Liger (`--logits` for others).",
        "",
        "The memory of a card is what `nvidia-smi` shows in MiB, divided by 1,024. Many cards have less than",
        "their name suggests.",
        "",
        "## Well-known models",
        "",
        "What the command recommends: tokens · rank on experts · storage · bits of AdamW, or *paged* · *graphs* ·",
        f"*kept* (`keep-experts`). *Least* is the memory for {TOKENS[-1]} tokens with rank {EXPERT_RANKS[-1]}.",
        "",
        *_models(),
        "",
        "Sizes come from the published configs. Gemma 4 and Qwen3.5 are counted as text models, without vision.",
        "",
        "## Accuracy of the estimate",
        "",
        "Steps of `python benchmarks/step.py` on one NVIDIA H200, in GiB. *Card*: the value of `--card`, which limits",
        "torch to 1.5 GiB less. *Peak* is `torch.cuda.max_memory_allocated` with captures, *reserved*",
        "`max_memory_reserved`.",
        "*Needs* is what the command compares with the card: reserved memory plus 1.5 GiB for memory outside torch.",
        "",
        *_comparison(),
        "",
        "- Every peak is estimated within 5 %, and so is reserved memory where torch had no room for more. On a GPU",
        "  with free memory, torch's allocator caches freed blocks, and releases them when memory is short.",
        "- No setting that ran out of memory is estimated to fit. Three settings that ran on the small cards are",
        "  estimated to need up to 0.3 GiB more than these have. Where graphs did not fit, the step ran without",
        "  them: *needs* is with graphs, the other estimates are without.",
        "- Graphs with an unfused loss reserve up to 11 % more than estimated: use TRL or Liger.",
        "- gpt-oss in graphs reserves far more than estimated, because its attention does not use SDPA. Graphs are",
        "  not recommended for such models.",
        "- The last row had attention in FP8 too; the estimate assumes 16 bits.",
        "- Not measured: several GPUs, vision towers, Mamba and linear attention (without its kernels transformers",
        "  needs much more), batches above 1, and paged optimizers.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(documentation(), encoding="utf-8")
