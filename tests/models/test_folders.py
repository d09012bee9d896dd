from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from rlhf_ray.models.folders import save_folder
from rlhf_ray.models.heads import ValueModel
from rlhf_ray.models.loading import load_policy, load_tokenizer
from rlhf_ray.models.pretrained import write_pretrained
from rlhf_ray.models.scratch import build_scratch, build_scratch_classifier
from rlhf_ray.models.tokenizers import build_tokenizer

TEXTS = [
    "Isn't it  (really) low-key?  Yes!\n\n\tIt is ... 12 + 34 = 46",
    "他说：“GPT模型（新）很好！”\n第2章，我 喜欢　它。",
    " leading, trailing \r\n  ",
    "cafe\u0301 ﬁne ﷺ ㎏",  # which a normaliser would write otherwise
]
TOKENIZERS, MODELS = ("char", "word", "bpe"), ("qwen2", "gpt2", "lstm", "bert")


def tokenizer_of(kind):
    return build_tokenizer(kind, TEXTS, vocab_size=300 if kind == "bpe" else None)


def model_of(kind, tokenizer):
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "layers": 1, "heads": 2}
    if kind == "bert":
        return build_scratch_classifier(kind, labels=["a", "b"], **shape)
    return build_scratch(kind, **shape)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def permissions(folder):
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}


def same(loaded, tokenizer):
    ids = tokenizer(TEXTS).input_ids
    assert loaded(TEXTS).input_ids == ids and loaded.batch_decode(ids) == tokenizer.batch_decode(ids)
    for name in ("pad_token_id", "eos_token_id", "unk_token_id", "bos_token_id", "padding_side", "model_max_length"):
        assert getattr(loaded, name) == getattr(tokenizer, name), name
    assert len(loaded) == len(tokenizer)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_autotokenizer_gives_every_scratch_tokenizer_back_beside_every_model(kind, model, tmp_path):
    tokenizer = tokenizer_of(kind)
    save_folder(tmp_path, model_of(model, tokenizer), tokenizer)
    for folder in (tmp_path, tmp_path / "again"):
        loaded = AutoTokenizer.from_pretrained(folder)
        assert type(loaded) is PreTrainedTokenizerFast
        same(loaded, tokenizer)
        same(load_tokenizer(folder), tokenizer)
        # What somebody has loaded and written again, for a model of any kind, is still that tokenizer.
        save_folder(tmp_path / "again", model_of(model, tokenizer), load_tokenizer(folder))
    same(AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True), tokenizer)


def test_without_it_autotokenizer_takes_the_models_own_rules(tmp_path):
    """So the test above can fail; and such a folder, of an earlier version, is loaded as before."""
    tokenizer = tokenizer_of("word")
    for part in (model_of("qwen2", tokenizer), tokenizer):
        part.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert type(other) is Qwen2Tokenizer and other(TEXTS).input_ids != tokenizer(TEXTS).input_ids
    same(load_tokenizer(tmp_path), tokenizer)
    assert load_policy(tmp_path).config.vocab_size == len(tokenizer)


@pytest.mark.slow
def test_a_program_without_this_package_reads_the_same_ids(tmp_path):
    expected = {}
    for kind in TOKENIZERS:
        for model in MODELS:
            tokenizer = tokenizer_of(kind)
            save_folder(tmp_path / f"{kind}-{model}", model_of(model, tokenizer), tokenizer)
            expected[f"{kind}-{model}"] = tokenizer(TEXTS).input_ids
    script = (
        "import json, pathlib, sys; from transformers import AutoTokenizer\n"
        "folder, texts, found = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), {}\n"
        "for path in folder.iterdir(): found[path.name] = AutoTokenizer.from_pretrained(path)(texts).input_ids\n"
        "assert 'rlhf_ray' not in sys.modules\n"
        "(folder / 'found.json').write_text(json.dumps(found))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text()) == expected


def test_a_models_own_tokenizer_and_code_of_somebody_elses_stay_as_they_are(tmp_path):
    tokenizer = Qwen2Tokenizer(vocab={"a": 0, "b": 1, "<|endoftext|>": 2}, merges=[])
    save_folder(tmp_path / "own", model_of("qwen2", tokenizer), tokenizer)
    settings = json.loads((tmp_path / "own" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "Qwen2Tokenizer" and "auto_map" not in settings
    theirs = tokenizer_of("char")
    theirs.init_kwargs["auto_map"] = {"AutoTokenizer": [None, "theirs--code.Tokenizer"]}
    save_folder(tmp_path / "theirs", tokenizer=theirs)
    settings = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert settings["auto_map"] == {"AutoTokenizer": [None, "theirs--code.Tokenizer"]}


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(mask, expected, tmp_path, umask):
    tokenizer = tokenizer_of("char")
    umask(mask)
    write_pretrained(model := model_of("lstm", tokenizer), model.state_dict().items(), tmp_path / "policy", tokenizer)
    critic = ValueModel(model_of("qwen2", tokenizer).model)
    write_pretrained(critic, critic.state_dict().items(), tmp_path / "critic", None)
    found = permissions(tmp_path / "policy") | permissions(tmp_path / "critic")
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json", "lstm.py"} <= set(found)
    assert set(found.values()) == {expected}
    assert not [name for name in found if name.startswith(".")]


def test_a_file_that_may_be_read_by_more_people_stays_so(tmp_path, umask):
    (tmp_path / "run.sh").touch()
    (tmp_path / "run.sh").chmod(0o755)
    umask(0o077)
    save_folder(tmp_path, tokenizer=tokenizer_of("char"))
    assert permissions(tmp_path)["run.sh"] == 0o755
