"""An exported folder says by itself where an answer ends: at what ends a turn, and where it ended before."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_ray.models.scratch import build_scratch
from rlhf_ray.models.tokenizers import char_tokenizer
from rlhf_ray.models.torch_engine import TorchEngine
from rlhf_ray.roles.objectives import SFT
from rlhf_ray.roles.supervised import SupervisedTrainer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tokenizer():
    made = char_tokenizer("abcdefg\n")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|halt|>"]})
    made.chat_template = CHATML
    return made


def exported(stage, model, tokenizer, learner_of, folder):
    if stage == "rl":
        role = learner_of(model)
        role.tokenizer = tokenizer
    else:
        role = SupervisedTrainer(
            TorchEngine(model), SFT.of(tokenizer), {"train": []}, tokens_per_microbatch=8, tokenizer=tokenizer)
    role.export_model(folder)
    written = json.loads((folder / "generation_config.json").read_text())
    assert not written.get("_from_model_config"), "older versions would make it anew from config.json"
    return written["eos_token_id"]


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_an_exported_model_stops_where_a_turn_ends(tokenizer, learner_of, tmp_path, stage):
    model = build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=8, layers=1, heads=2, tie_embeddings=False)
    eos, turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert exported(stage, model, tokenizer, learner_of, tmp_path) == [eos, turn]
    loaded, own = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():  # whatever it has read, the end of a turn comes next
        loaded.lm_head.weight.zero_()
        loaded.lm_head.weight[turn] = loaded(own("ab", return_tensors="pt").input_ids, output_hidden_states=True
                                             ).hidden_states[-1][0, -1]  # fmt: skip
    written = loaded.generate(**own("ab", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert written[0, -1] == turn and written.shape[1] == len(own("ab").input_ids) + 1


def test_what_ended_an_answer_before_still_does_and_the_module_keeps_its_own(tokenizer, learner_of, tmp_path):
    model = build_scratch("qwen2", vocab_size=len(tokenizer), hidden_size=8, layers=1, heads=2)
    eos, turn, halt = (tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.eos_token, "<|im_end|>", "<|halt|>"))
    before = [halt, tokenizer.convert_tokens_to_ids("a")]  # an ordinary token ends nothing: see stop_token_ids
    model.generation_config.eos_token_id = before
    assert exported("rl", model, tokenizer, learner_of, tmp_path) == [eos, halt, turn]
    assert model.generation_config.eos_token_id == before and model.generation_config._from_model_config
    tokenizer.chat_template = None
    model.generation_config.eos_token_id = eos
    assert exported("rl", model, tokenizer, learner_of, tmp_path / "plain") == eos
