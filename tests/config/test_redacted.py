"""What is hidden in texts and settings, and what must stay as it is."""

from __future__ import annotations

import pytest
import yaml

from rlhf_ray.config.load import dump_config, load_config, parse_config
from rlhf_ray.config.redacted import hidden_in, legible, redacted, redacted_settings
from rlhf_ray.config.rewards import default_name
from rlhf_ray.config.schema import RunConfig
from rlhf_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://ada:p%40ss@host:8000/score", "https://***@host:8000/score"),
        ("https://token@host", "https://***@host"),
        ("https://ada:p@ss@host/x", "https://***@host/x"),
        ("https://ada:p/ss@host/x?y=1", "https://***@host/x?y=***"),  # a bare / in a password
        ("https://ada:p?ss", "https://***?***"),
        ("http://h:80/score?token=abc&model=m", "http://h:80/score?token=***&model=***"),
        ("http://h?s3cret", "http://h?***"),
        ("http://h/a?b=c=d#e", "http://h/a?b=***#***"),
        ("http://[::1]:80/score", "http://[::1]:80/score"),
        ("no answer from http://h:80: Connection refused", "no answer from http://h:80: Connection refused"),
        ("(see http://u:p@h/x?y=z).", "(see http://***@h/x?y=***)."),
        ("'http://u:p@h:80', or http://[::1]", "'http://***@h:80', or http://[::1]"),
        ("ada@host.org wrote 1/2?", "ada@host.org wrote 1/2?"),
        ("hf://datasets/owner/name", "hf://datasets/owner/name"),
        ("a HTTP://u:p@h and b ftp://v:q@i", "a HTTP://***@h and b ftp://***@i"),
    ],
)
def test_texts(text, shown):
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "http://" + ":" * 10**6 + " x", "http://" * 10**5, "://a@" * 10**5], ids=list("abcd")
)
def test_a_long_text_takes_no_longer_than_its_length(text):
    assert redacted(text)  # one that takes the square of it does not end within the limit of a test


def test_a_secret_that_is_known_is_hidden_wherever_it_is_quoted():
    assert redacted("no such key: sk-123 (sk-123)", "sk-123") == "no such key: *** (***)"
    assert redacted("nothing", "") == "nothing"


def test_settings_are_hidden_by_their_names_and_as_urls():
    settings = {
        "function": "https://ada:pw@host/score",
        "args": {"api_key": "sk-1", "X-API-Key": "sk-2", "token": "t", "db_password": "pw", "headers": [
            {"Authorization": "Bearer x"}]},
        "token_env": "MY_TOKEN", "api_key_env": "KEY", "eos_token": "</s>", "max_tokens": 5, "tokenizer": "gpt2",
        "answer_key": "answer", "password": "", "secret": None,
        "system_prompt": "Say https://ada:pw@host/?q=1 aloud.",  # what a model reads is no address
    }  # fmt: skip
    shown = redacted_settings(settings)
    assert shown == {
        **settings,
        "function": "https://***@host/score",
        "args": {"api_key": "***", "X-API-Key": "***", "token": "***", "db_password": "***",
                 "headers": [{"Authorization": "***"}]},
    }  # fmt: skip
    assert hidden_in(settings) == []
    assert hidden_in(shown) == [
        "function", "args.api_key", "args.X-API-Key", "args.token", "args.db_password",
        "args.headers.0.Authorization",
    ]  # fmt: skip


def test_the_name_of_a_server_holds_no_secret():
    names = {
        "https://ada:pw@host:80/score": "host:80",
        "http://host?token=abc": "host",
        "http://host:80?token=abc": "host:80",
        "http://host#abc": "host",
        "file.py:judge": "judge",
        "keyword": "keyword",
    }
    assert {url: default_name(url) for url in names} == names


def test_a_written_config_has_none_and_is_refused_until_they_are_set_again(tmp_path):
    given = {
        "data": {"path": "prompts.jsonl"},
        "model": {"path": "some/model"},
        "rewards": [{"function": "https://ada:pw7@host?key=k7", "args": {"api_key": "sk7"}}],
    }
    config = parse_config(given, RunConfig, "here")
    assert config.rewards[0].function == "https://ada:pw7@host?key=k7"
    text = dump_config(config)
    assert "pw7" not in text and "k7" not in text and "sk7" not in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert "rewards.0.function: a secret was hidden here" in str(error.value)
    assert "rewards.0.args.api_key: a secret was hidden here" in str(error.value)
    again = load_config(path, ["rewards.0.function=https://ada:pw7@host?key=k7", "rewards.0.args.api_key=sk7"])
    assert again == config
    assert yaml.safe_load(text)["rewards"][0]["function"] == "https://***@host?key=***"


@pytest.mark.parametrize("setting", ["rewards.0.function=https://ada:p/w7@host", "rewards.0=https://ada:pw7@host"])
def test_what_is_said_of_a_wrong_config_shows_no_secret(tmp_path, setting):
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {path: prompts.jsonl}\nmodel: {path: some/model}\nrewards: [{function: exact_answer}]\n"
    )
    with pytest.raises(ConfigError) as error:
        load_config(path, [setting])
    assert "w7" not in str(error.value) and "rewards.0" in str(error.value)


def test_control_characters_are_shown_and_not_sent():
    assert legible("a\x1b[31mb\x07\u202e\x9b\udc80") == "a\\x1b[31mb\\x07\\u202e\\x9b\\udc80"
    assert legible("Äpfel 5 €\n\tzwei 日本") == "Äpfel 5 €\n\tzwei 日本"
