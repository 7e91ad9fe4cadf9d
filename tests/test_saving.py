"""The adapter file follows its specification, and every way of loading it gives the same model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from transformers import AutoModelForCausalLM
from transformers_adapters import needs_adapter_methods

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, saved_adapter

MODEL_TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"]


@pytest.fixture(params=MODEL_TYPES)
def model_type(request) -> str:
    return request.param


def save(directory: Path, model_type: str = "qwen3_moe", dtype=torch.float32, **options) -> torch.Tensor:
    """Writes `base` and `adapter`; returns the logits of the adapted model."""
    base = tiny_model(model_type, dtype=dtype)
    base.save_pretrained(directory / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype).eval()
    config = MoeQLoraConfig(**{"r": 4, "expert_r": 3, "target_modules": "all-linear", **options})
    model = get_peft_model(base, config)
    randomize_adapter(model)
    model.save_pretrained(directory / "adapter")
    return logits(model.eval(), token_ids())


def load_base(directory: Path, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype).eval()


def test_file_contains_exactly_the_documented_keys(tmp_path):
    """E=4 experts, hidden 64, intermediate 64. Shapes do not depend on gpt-oss's interleaved (E, in, out) stacks."""
    save(tmp_path, "gpt_oss", target_modules=["q_proj", "experts"])
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = {}
    for i in range(2):
        experts = f"base_model.model.model.layers.{i}.mlp.experts"
        expected[f"{experts}.gate_up_proj.lora_A.weight"] = (4, 3, 64)
        expected[f"{experts}.gate_up_proj.lora_B.weight"] = (4, 128, 3)
        expected[f"{experts}.down_proj.lora_A.weight"] = (4, 3, 64)
        expected[f"{experts}.down_proj.lora_B.weight"] = (4, 64, 3)
        attention = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        expected[f"{attention}.lora_A.weight"] = (4, 64)
        expected[f"{attention}.lora_B.weight"] = (64, 4)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected


def test_config_file_contains_what_loading_needs(tmp_path):
    save(tmp_path, quant_type="fp4", blocksize=128)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_QLORA"
    assert config["format_version"] == 1
    assert (config["quant_type"], config["blocksize"], config["double_quant"]) == ("fp4", 128, False)


def test_delta_is_scaling_times_b_times_a(tmp_path):
    """The documented delta, computed from the file and added to the stacks, gives the model's outputs."""
    expected = save(tmp_path, target_modules=["experts"], quant_type=None, lora_alpha=6)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = load_base(tmp_path)
    scaling = 6 / 4
    for i, layer in enumerate(base.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            prefix = f"base_model.model.model.layers.{i}.mlp.experts.{name}"
            delta = scaling * torch.bmm(tensors[f"{prefix}.lora_B.weight"], tensors[f"{prefix}.lora_A.weight"])
            getattr(layer.mlp.experts, name).data += delta
    torch.testing.assert_close(logits(base, token_ids()), expected, rtol=0, atol=1e-5)


def test_reloading_is_bitwise_equal(model_type, tmp_path):
    expected = save(tmp_path, model_type)
    model = PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(model, token_ids()), expected)


@pytest.mark.parametrize("options", [{"quant_type": None}, {"double_quant": True}, {"use_rslora": True}], ids=str)
def test_reloading_with_options_is_bitwise_equal(options, tmp_path):
    expected = save(tmp_path, **options)
    model = PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(model, token_ids()), expected)


def test_reloading_selected_projections_is_bitwise_equal(tmp_path):
    expected = save(tmp_path, target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    model = PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "adapter")
    assert torch.equal(logits(model, token_ids()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_cpu_mem_usage_gives_the_same_tensors(dtype, tmp_path):
    """Memory-mapped tensors may have another alignment, so logits can differ in the last bit; tensors must not."""
    save(tmp_path, dtype=dtype, target_modules=["experts"])
    plain = PeftModel.from_pretrained(load_base(tmp_path, dtype), tmp_path / "adapter")
    lean = PeftModel.from_pretrained(load_base(tmp_path, dtype), tmp_path / "adapter", low_cpu_mem_usage=True)
    expected, found = plain.state_dict(), lean.state_dict()
    assert expected.keys() == found.keys()
    for name in expected:
        assert found[name].device == expected[name].device, name
        assert torch.equal(found[name], expected[name]), name


FRESH = """
import sys, torch, peft_moe_qlora
from pathlib import Path
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
directory, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
ids, expected = torch.load(directory / "expected.pt").values()

def base():
    return AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)

def hf_load_adapter():
    model = base()
    model.load_adapter(directory / "adapter")
    return model

ways = {
    "PeftModel": lambda: PeftModel.from_pretrained(base(), directory / "adapter"),
    "AutoPeftModel": lambda: AutoPeftModelForCausalLM.from_pretrained(directory / "adapter", dtype=dtype),
    "load_adapter": hf_load_adapter,
    "AutoModel": lambda: AutoModelForCausalLM.from_pretrained(directory / "adapter", dtype=dtype),
}
torch.set_num_threads(1)
for name, way in ways.items():
    with torch.no_grad():
        found = way().eval()(input_ids=ids).logits
    print(name, torch.equal(found, expected), (found.float() - expected.float()).abs().max().item())
"""


def test_every_way_of_loading_in_a_fresh_process(tmp_path):
    """After one import. PEFT's own ways are exact; transformers' map tensors, see the test above."""
    expected = save(tmp_path)
    config_file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "base")}))
    torch.save({"ids": token_ids(), "logits": expected}, tmp_path / "expected.pt")
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path), "float32"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    lines = {name: (equal, float(error)) for name, equal, error in map(str.split, result.stdout.splitlines())}
    assert set(lines) == {"PeftModel", "AutoPeftModel", "load_adapter", "AutoModel"}
    assert lines["PeftModel"] == lines["AutoPeftModel"] == ("True", 0)
    assert lines["load_adapter"][1] <= 1e-5
    assert lines["AutoModel"][1] <= 1e-5


@pytest.mark.parametrize("quantize_linear", [False, True])
def test_transformers_does_not_round_the_factors(quantize_linear, tmp_path):
    """On a 16-bit model it would create them in 16 bits, and load into these."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_model(dtype=torch.bfloat16).save_pretrained(base)
    kwargs = {"dtype": torch.bfloat16}
    if quantize_linear:
        kwargs |= {"quantization_config": MoeQuantizationConfig(), "device_map": "cpu"}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, **kwargs), MoeQLoraConfig(r=4, target_modules="all-linear")
    )
    randomize_adapter(model)
    model.eval().save_pretrained(adapter)
    expected = {name: factor for name, factor in model.base_model.model.named_parameters() if ".lora_" in name}
    assert {factor.dtype for factor in expected.values()} == {torch.float32}

    def by_load_adapter():
        model = AutoModelForCausalLM.from_pretrained(base, **kwargs)
        model.load_adapter(adapter)
        return model

    def by_pipeline():
        options = {name: value for name, value in kwargs.items() if name != "dtype"}
        found = transformers.pipeline(
            "text-generation",
            model=str(adapter),
            tokenizer=byte_tokenizer(),
            dtype=torch.bfloat16,
            device="cpu",  # transformers 5.17 moves a model of a single-device `device_map` to a GPU
            model_kwargs=options,
        )
        return found.model

    for load in (by_load_adapter, lambda: AutoModelForCausalLM.from_pretrained(adapter, **kwargs), by_pipeline):
        found = load()
        factors = {name: factor for name, factor in found.named_parameters() if ".lora_" in name}
        assert factors.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(factors[name], expected[name])] == []
        assert torch.equal(logits(found.eval(), token_ids()), logits(model, token_ids()))


def test_loading_without_the_import_names_the_missing_type(tmp_path):
    save(tmp_path)
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "adapter")], capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "MOE_QLORA" in result.stderr


@needs_adapter_methods
def test_transformers_own_adapter_methods(tmp_path):
    model = tiny_model()
    model.add_adapter(MoeQLoraConfig(r=4), adapter_name="first")
    model.add_adapter(MoeQLoraConfig(r=4), adapter_name="second")
    randomize_adapter(model)
    ids = token_ids()
    second = logits(model, ids)
    model.set_adapter("first")
    assert not torch.equal(logits(model, ids), second)
    model.disable_adapters()
    base = logits(model, ids)
    model.enable_adapters()
    model.set_adapter("second")
    assert torch.equal(logits(model, ids), second)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.{name}" for name in model.get_adapter_state_dict("second")
    }
    model.delete_adapter("second")
    assert not torch.equal(logits(model, ids), second)
    other = tiny_model()
    other.load_adapter(tmp_path)
    torch.testing.assert_close(logits(other, ids), second, rtol=0, atol=1e-5)
    assert not torch.equal(base, second)


def test_text_generation_pipeline(tmp_path):
    tokenizer = byte_tokenizer()
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4))
    randomize_adapter(model)
    generate = transformers.pipeline("text-generation", model=model.eval(), tokenizer=tokenizer)
    text = generate("abc", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("abc")


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): code - 94 for code in range(97, 123)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def make_trainer(directory: Path, steps: int) -> transformers.Trainer:
    transformers.set_seed(0)
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"))
    ids = torch.randint(3, 64, (16, 12), generator=torch.Generator().manual_seed(7))
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


def test_trainer_resumes_where_it_stopped(tmp_path):
    straight = make_trainer(tmp_path / "straight", 4)
    straight.train()
    make_trainer(tmp_path / "stopped", 2).train()
    resumed = make_trainer(tmp_path / "stopped", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    expected = get_peft_model_state_dict(straight.model)
    found = get_peft_model_state_dict(resumed.model)
    assert expected.keys() == found.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-6, msg=name)
    saved = load_file(tmp_path / "stopped" / "checkpoint-4" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in saved)


def test_config_of_a_saved_adapter_as_start_of_another(tmp_path):
    """The file next to it does not apply to the new adapter."""
    save(tmp_path)
    config = MoeQLoraConfig.from_pretrained(tmp_path / "adapter")
    config.expert_r = 5
    model = get_peft_model(tiny_model(), config)
    loaded = PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "adapter")
    loaded.add_adapter("other", MoeQLoraConfig(**{**config.to_dict(), "expert_r": 2}))
    assert model.experts_report().stacks[0].ranks == {"default": 5}
    assert loaded.experts_report().stacks[0].ranks == {"default": 3, "other": 2}


def test_no_pickle_is_written_or_read(tmp_path):
    """PEFT must not load a pickled adapter next to the config."""
    save(tmp_path)
    assert not list((tmp_path / "adapter").glob("*.bin"))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model.bin.*safetensors"):
        PeftModel.from_pretrained(load_base(tmp_path), tmp_path / "adapter")


def test_writing_a_pickle_is_rejected(tmp_path):
    """Nothing here would read it. A written file is not removed: it may be the only result of a training."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4))
    model.add_adapter("other", MoeQLoraConfig(r=4))
    remedy = r"adapter_model\.bin is a pickle, which is never read.*safe_serialization=True"
    with pytest.raises(ValueError, match=remedy):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("adapter_config.json"))
    with pytest.raises(ValueError, match=rf"other.{remedy}"):
        model.save_pretrained(tmp_path, safe_serialization=False, selected_adapters=["other"])
    # with older safetensors in the directory, which would be loaded instead
    model.save_pretrained(tmp_path / "both")
    assert MoeQLoraConfig.from_pretrained(tmp_path / "both").stored
    with pytest.raises(ValueError, match=remedy):
        model.save_pretrained(tmp_path / "both", safe_serialization=False)
    # in safetensors, whatever the directory contains
    model.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_model(), tmp_path).peft_config["default"].r == 4


@pytest.mark.parametrize("storage", ["nf4", None], ids=str)
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_saving_a_full_model_with_adapters_is_rejected(storage, options, tmp_path):
    """Its tensors would have PEFT's names, which nothing loads."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, quant_type=storage, **options))
    randomize_adapter(model)
    base = model.get_base_model()
    for part in (base, base.model):
        with pytest.raises(
            ValueError, match=r"saving a full model with adapters.*save_pretrained of the|before save_pretrained"
        ):
            part.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.rglob("*.safetensors"))
    expected = logits(model.eval(), token_ids())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    assert torch.equal(logits(again, token_ids()), expected)
    if storage is not None:
        model.unload().save_pretrained(tmp_path / "base")
        AutoModelForCausalLM.from_pretrained(tmp_path / "base")


def test_saving_a_loaded_full_model_with_adapters_is_rejected(tmp_path):
    """A model that transformers loaded into 4 bits."""
    tiny_model().save_pretrained(tmp_path / "dense")
    config = MoeQuantizationConfig(quantize_linear=False)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config, device_map="cpu")
    get_peft_model(base, MoeQLoraConfig(r=4))
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM contains adapters, and saving a full model"):
        base.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.glob("whole/*.safetensors"))


def on_the_hub(cache: Path, adapter: Path, subfolder: str = "") -> None:
    """Puts an adapter into a cache as the repository own/adapter."""
    repository = cache / "models--own--adapter"
    shutil.copytree(adapter, repository / "snapshots" / "0123abc" / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")


@pytest.mark.parametrize("subfolder", ["", "part"])
@pytest.mark.parametrize("is_offline", [True, False], ids=["offline", "online"])
def test_pickles_on_the_hub(is_offline, subfolder, tmp_path, monkeypatch):
    """PEFT would load them if there are no safetensors."""
    save(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = file.read_bytes()
    torch.save(load_file(file), tmp_path / "adapter" / "adapter_model.bin")
    file.unlink()
    on_the_hub(tmp_path / "cache", tmp_path / "adapter", subfolder)
    snapshot = tmp_path / "cache" / "models--own--adapter" / "snapshots" / "0123abc" / subfolder
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    if not is_offline:

        def file_exists(repository: str, name: str, **options) -> bool:
            assert repository == "own/adapter"
            return (snapshot.parent if subfolder else snapshot).joinpath(name).is_file()

        monkeypatch.setattr(saved_adapter, "file_exists", file_exists)
        monkeypatch.setattr("peft.config.hf_hub_download", lambda *_, **__: str(snapshot / "adapter_config.json"))
    place = {"cache_dir": str(tmp_path / "cache"), "subfolder": subfolder or None}
    message = r"adapter_model\.bin of own/adapter on the hub is a pickle, which is never read"
    with pytest.raises(ValueError, match=message):
        MoeQLoraConfig.from_pretrained("own/adapter", **place)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(load_base(tmp_path), "own/adapter", **place)
    (snapshot / "adapter_model.safetensors").write_bytes(whole)
    assert MoeQLoraConfig.from_pretrained("own/adapter", **place).expert_r == 3
    for file in ("adapter_model.safetensors", "adapter_model.bin"):
        (snapshot / file).unlink()
    assert MoeQLoraConfig.from_pretrained("own/adapter", **place).expert_r == 3  # usable to start another adapter


def test_auto_peft_model_is_a_peft_model(tmp_path):
    expected = save(tmp_path)
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert torch.equal(logits(model.eval(), token_ids()), expected)


def test_model_card_shows_how_to_load_the_adapter(tmp_path):
    """Once, after any number of saves; and the printed code works."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(model, MoeQLoraConfig(r=2))
    for _ in range(2):
        model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert text.count("import peft_moe_qlora") == 1
    code = text[text.index("```python") + len("```python") :]
    code = code[: code.index("```")].replace("path of this directory, or name on the hub", str(tmp_path / "adapter"))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    model.add_adapter("other", MoeQLoraConfig(r=2))
    model.save_pretrained(tmp_path / "adapter", selected_adapters=["other"])
    assert "import peft_moe_qlora" in (tmp_path / "adapter" / "other" / "README.md").read_text()


def test_base_is_recognized(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), MoeQLoraConfig(r=2))
    base = model.peft_config["default"].base
    assert base["model_type"] == "qwen3_moe"
    assert base["samples"]
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on other weights")
        for dtype in (torch.float32, torch.bfloat16):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
            again = PeftModel.from_pretrained(again, tmp_path / "adapter")
            assert again.peft_config["default"].base == base
        # a reused configuration does not refer to a file
        config = MoeQLoraConfig(r=2)
        get_peft_model(tiny_model(), config)
        other = get_peft_model(tiny_model(std=0.1), config)
        assert other.peft_config["default"].base["samples"] != base["samples"]
    with pytest.warns(RuntimeWarning, match="trained on other weights"):
        PeftModel.from_pretrained(tiny_model(std=0.16), tmp_path / "adapter")


def test_linear_layers_in_another_storage_are_named(tmp_path):
    """Experts are quantized as in training, whatever the base; linear layers stay as in the base."""
    tiny_model().save_pretrained(tmp_path / "base")

    def base(**options):
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)

    in_4_bits = {"quantization_config": MoeQuantizationConfig(), "device_map": "cpu"}
    model = get_peft_model(base(**in_4_bits), MoeQLoraConfig(r=2, target_modules="all-linear"))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained with linear layers")
        again = PeftModel.from_pretrained(base(**in_4_bits), tmp_path / "adapter")
    assert torch.equal(again(input_ids=token_ids()).logits, model.eval()(input_ids=token_ids()).logits)
    with pytest.warns(RuntimeWarning, match="linear layers in nf4/64, but this base has them in floating point"):
        PeftModel.from_pretrained(base(), tmp_path / "adapter")


@needs_adapter_methods
@pytest.mark.parametrize("quantize", [False, True], ids=["in memory", "loaded in 4 bits"])
def test_transformers_saves_the_factors_of_linear_layers(quantize, tmp_path):
    save(tmp_path, "mixtral")
    options = {"quantization_config": MoeQuantizationConfig(), "device_map": "cpu"} if quantize else {}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **options)
    model.load_adapter(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "again")
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert any("q_proj" in key for key in expected)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
