"""TRL's trainers on experts in 4 bits. test_third_parties.py tests what they rely on without TRL."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import VOCABULARY, assert_same_bytes, packed_bytes, tiny_config, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from peft_moe_qlora import MoeQLoraConfig, quantize_experts
from peft_moe_qlora.training import cast_trainable_to_fp32

trl = pytest.importorskip("trl", reason="TRL is not installed; it needs Python 3.11", exc_type=ModuleNotFoundError)
import datasets  # noqa: E402 (comes with TRL)

pytestmark = pytest.mark.filterwarnings("ignore")
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<u>", "<a>"]
WORDS = [f"w{number}" for number in range(VOCABULARY - len(SPECIAL))]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<a> {{ m.content + ' </s>' }}{% else %}<u> {{ m.content }} "
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=TEMPLATE,
    )


def turns(role: str, seed: int, count: int = 8) -> list[list[dict[str, str]]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(WORDS), (count, 8), generator=generator).tolist()
    return [[{"role": role, "content": " ".join(WORDS[word] for word in row)}] for row in drawn]


PROMPTS = turns("user", 1)
CHOSEN, REJECTED = turns("assistant", 2), turns("assistant", 3)
CHATS = [prompt + answer for prompt, answer in zip(PROMPTS, CHOSEN)]
DATA = {
    "SFT": {"messages": CHATS},
    "DPO": {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED},
    "KTO": {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False] * 4},
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
    "Reward": {"chosen": CHATS, "rejected": [p + a for p, a in zip(PROMPTS, REJECTED)]},
}
OPTIONS = {
    "DPO": {"beta": 0.1},
    "GRPO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.04},
    "RLOO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.04},
}


def trainer_for(kind: str, model: nn.Module, tokenizer: PreTrainedTokenizerFast, directory: Path):
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(directory),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        **OPTIONS.get(kind, {}),
    )
    rewards = {"reward_funcs": _length} if kind in ("GRPO", "RLOO") else {}
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_dict(DATA[kind]),
        processing_class=tokenizer,
        **rewards,
    )


def _length(completions, **_) -> list[float]:
    return [float(len(str(completion))) for completion in completions]


def expert_factors(model: nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if ".experts." in name and f".{adapter}." in name}


def log_probabilities(model: nn.Module, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    ids = torch.arange(6, 38).view(2, 16)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float().log_softmax(-1)


@pytest.fixture(scope="module")
def after_sft(tokenizer, tmp_path_factory) -> nn.Module:
    """A wrapped bf16 model with experts in 4 bits, trained by SFT so that its adapter is no longer zero."""
    torch.manual_seed(0)
    # without the auxiliary loss, which transformers 5.17 can't compute during generation
    base = tiny_model(dtype=torch.bfloat16, router_aux_loss_coef=0.0)
    quantize_experts(base, progressbar=False)
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    codes, before = packed_bytes(model), expert_factors(model, "default")
    trainer_for("SFT", model, tokenizer, tmp_path_factory.mktemp("sft")).train()
    assert_same_bytes(packed_bytes(model), codes)
    after = expert_factors(model, "default")
    assert all(not torch.equal(after[name], before[name].to(after[name].dtype)) for name in before)
    return model


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_reference_equals_the_policy(after_sft, tokenizer, tmp_path, kind):
    """TRL copies the adapter to one named `ref`, which must equal it before the first step and not change."""
    model = copy.deepcopy(after_sft)
    trainer = trainer_for(kind, model, tokenizer, tmp_path)
    policy, reference = log_probabilities(model, "default"), log_probabilities(model, "ref")
    # the policy is bf16 after SFT, and its copy is bitwise equal
    assert (policy.exp() * (policy - reference)).sum(-1).abs().max() < 1e-6
    model.set_adapter("default")
    frozen, trained = expert_factors(model, "ref"), expert_factors(model, "default")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
    assert all(p.requires_grad for name, p in model.named_parameters() if ".default." in name)
    codes = packed_bytes(model)
    trainer.train()
    assert_same_bytes(packed_bytes(model), codes)
    assert all(torch.equal(factor, frozen[name]) for name, factor in expert_factors(model, "ref").items())
    assert any(not torch.equal(factor, trained[name]) for name, factor in expert_factors(model, "default").items())


def test_reward_model_trains_its_head_and_its_experts(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = tiny_config("qwen3_moe", num_labels=1)
    base = AutoModelForSequenceClassification.from_config(config).to(torch.bfloat16)
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS"))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer_for("Reward", model, tokenizer, tmp_path).train()
    named = dict(model.named_parameters())
    still = [name for name, value in before.items() if torch.equal(named[name].to(value.dtype), value)]
    # the first step changes only B, since B starts at zero; the second one A
    assert not still
    assert any(".score." in name for name in before)
    assert any(".experts." in name for name in before)


def test_cast_trainable_to_fp32_restores_fp32_factors(tokenizer, tmp_path):
    """TRL casts them to bf16, which `cast_trainable_to_fp32` undoes."""
    base = tiny_model(dtype=torch.bfloat16)
    quantize_experts(base, progressbar=False)
    model = get_peft_model(base, MoeQLoraConfig(r=4, task_type="CAUSAL_LM"))
    trainer = trainer_for("SFT", model, tokenizer, tmp_path)
    assert {factor.dtype for factor in expert_factors(model, "default").values()} == {torch.bfloat16}
    cast_trainable_to_fp32(trainer.model)
    trainer.train()
    assert {factor.dtype for factor in expert_factors(model, "default").values()} == {torch.float32}
