from __future__ import annotations

import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from rlhf_ray.errors import ModelError
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.loading import (
    hub_is_known,
    load_policy,
    load_pretrained,
    load_reward_model,
    load_shape,
    load_tokenizer,
    stop_token_ids,
)
from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import char_tokenizer, word_tokenizer


@pytest.fixture
def policy_folder(tmp_path):
    folder = tmp_path / "policy"
    build_scratch("qwen2", vocab_size=20, hidden_size=16, layers=1, heads=2).save_pretrained(folder)
    char_tokenizer("abc").save_pretrained(folder)
    return folder


def test_policy_and_tokenizer_of_a_folder(policy_folder):
    model = load_policy(policy_folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert load_tokenizer(str(policy_folder))("abc").input_ids == [3, 4, 5]


def test_a_tokenizer_without_pad_token_gets_eos(tmp_path):
    tokenizer = char_tokenizer("abc")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pad_token_id == loaded.eos_token_id == 1


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_word_tokenizer_keeps_its_blanks_beside_any_model(kind, tmp_path):
    """AutoTokenizer would put Qwen2's splitting rules in place of the saved ones."""
    text = "the movie isn't good, but long."
    tokenizer = word_tokenizer([text])
    model = build_scratch(kind, vocab_size=len(tokenizer), hidden_size=16, layers=1, heads=2, max_length=16)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


def test_missing_folder(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer("runs/some/where")
    for name in ("/" + "n" * 5000, "./a\0b", "~nobody-has-this-name/model"):  # which no file system takes
        with pytest.raises(ModelError, match="no such folder"):
            load_policy(name)


def test_empty_folder(tmp_path):
    with pytest.raises(ModelError, match="empty"):
        load_policy(tmp_path)


def test_folder_without_tokenizer(policy_folder):
    for file in policy_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="has no tokenizer.*save_pretrained"):
        load_tokenizer(policy_folder)


def test_folder_without_model(policy_folder):
    (policy_folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no config.json"):
        load_policy(policy_folder)
    (policy_folder / "adapter_config.json").touch()
    with pytest.raises(ModelError, match="holds a LoRA adapter alone; name the model into which it is merged"):
        load_policy(policy_folder)


def test_folder_with_damaged_weights(policy_folder):
    (policy_folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot load a causal language model .*is the folder complete"):
        load_policy(policy_folder)


def test_a_folder_that_lacks_weights_is_refused_and_not_filled_with_random_ones(policy_folder):
    file = policy_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    for load in (load_policy, ValueModel.from_pretrained):
        with pytest.raises(ModelError, match="hold no .*down_proj.weight, so it is not a"):
            load(policy_folder)


def test_a_policy_is_no_reward_model(policy_folder):
    with pytest.raises(ModelError, match="hold no score.weight, so it is not a sequence classifier"):
        load_reward_model(policy_folder)


@pytest.mark.parametrize("text", ["{}", "{broken"])
def test_a_config_that_says_nothing(policy_folder, text):
    (policy_folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="policy: cannot load a model's config"):
        load_shape(policy_folder)


def test_no_network():
    with pytest.raises(ModelError, match="somebody/no-such-model: cannot load .*check the name and the network"):
        load_policy("somebody/no-such-model")


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_reward_model_scores_a_padded_row_like_the_row_alone(kind, tmp_path):
    common = {"vocab_size": 20, "num_labels": 1, "bos_token_id": None, "eos_token_id": 1}
    if kind == "qwen2":
        shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        model = Qwen2ForSequenceClassification(Qwen2Config(**common, **shape, intermediate_size=16))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(**common, n_embd=16, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path)
    char_tokenizer("abc").save_pretrained(tmp_path)
    loaded, tokenizer = load_reward_model(tmp_path)
    tokenizer.padding_side = "right"
    assert loaded.config.pad_token_id == tokenizer.pad_token_id == 0
    batch = tokenizer(["ab", "abcabc"], padding=True, return_tensors="pt")
    alone = tokenizer(["ab"], return_tensors="pt")
    scores_B = loaded(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
    score = loaded(input_ids=alone.input_ids, attention_mask=alone.attention_mask).logits[0, 0]
    torch.testing.assert_close(scores_B[0], score, atol=1e-6, rtol=0)


def test_what_ends_an_answer(policy_folder, monkeypatch):
    """EOS, and the end of a turn that the model names; no ordinary token, whatever a default config says."""
    tokenizer = load_tokenizer(policy_folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert stop_token_ids(policy_folder, tokenizer) == (eos,)
    GenerationConfig(eos_token_id=[eos, turn, 4]).save_pretrained(policy_folder)
    assert stop_token_ids(policy_folder, tokenizer) == (eos, turn)
    monkeypatch.setenv("HOME", str(policy_folder.parent))
    assert stop_token_ids(f"~/{policy_folder.name}", tokenizer) == (eos, turn)
    (policy_folder / "generation_config.json").unlink()
    shape = load_shape(policy_folder)
    shape.eos_token_id = turn
    shape.save_pretrained(policy_folder)
    assert stop_token_ids(policy_folder, tokenizer) == (eos, turn)


def test_a_runs_folder_in_the_place_of_its_model(tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    for load in (load_tokenizer, load_shape, load_policy):
        with pytest.raises(ModelError, match=r"run: the folder of a run, not of a model; name its model: .*run/model$"):
            load(tmp_path / "run")


def test_a_hub_whose_name_means_nothing_is_not_asked_again_and_again(monkeypatch):
    asked = []

    class Factory:
        @staticmethod
        def from_pretrained(path, **options):
            asked.append(options)
            raise OSError("not in the cache")

    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.invalid")  # .invalid never has an address (RFC 2606)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert not hub_is_known()
    with pytest.raises(ModelError, match=r"the Hub here is https://hub\.invalid; HF_ENDPOINT names a mirror"):
        load_pretrained(Factory, "owner/name", "a model", False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://localhost")
    with pytest.raises(ModelError):
        load_pretrained(Factory, "owner/name", "a model", False)
    monkeypatch.setattr(hub, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:1")  # it may know what this machine does not
    with pytest.raises(ModelError):
        load_pretrained(Factory, "owner/name", "a model", False)
    assert [options.get("local_files_only", False) for options in asked] == [True, False, False]
