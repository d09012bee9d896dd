from __future__ import annotations

import json

from typer.testing import CliRunner

from rlhf_ray.cli import app
from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.quality import QualityWishes
from rlhf_ray.data.validate import validate

RIVERS = "the longest river of this country is the one that everybody here calls the Glomma"


def quality(path, **wishes):
    return validate(DatasetConfig(path=path), wishes=QualityWishes(**wishes)).quality


def test_nothing_is_looked_for_that_nobody_asked_for(write):
    found = quality(write({"text": "a@example.com"}, {"text": "b"}))
    assert list(found.lines()) == []
    assert (found.near_duplicates, found.overlap, found.personal, found.lengths) == (None, None, None, None)


def test_near_duplicates_with_their_places(write):
    path = write({"text": RIVERS}, {"text": "the sea"}, {"text": RIVERS + "!"}, {"text": RIVERS})
    report = validate(DatasetConfig(path=path), wishes=QualityWishes(near_duplicates=0.8))
    assert report.left_out == {"duplicate": 1} and report.quality.near_duplicates == 1, "each is counted once"
    assert report.is_good, "a duplicate is no bad row"
    assert str(report).splitlines()[-2:] == [
        "near duplicates of an earlier row: 1", f"  {path}:3 says nearly what {path}:1 says"
    ]  # fmt: skip


def test_overlap_with_other_files(write):
    path = write(*({"prompt": prompt, "completion": "x"} for prompt in ("Who?", RIVERS, "Where?")))
    test = write({"messages": [{"role": "user", "content": "who?"}]}, {"broken": 1}, name="test.jsonl")
    other = write({"prompt": RIVERS + "?!", "completion": "y"}, name="other.jsonl")
    assert quality(path, against=(test, other)).overlap == {f"also in {test}": 1}
    near = quality(path, against=(test, other), near_duplicates=0.8)
    assert near.overlap == {f"also in {test}": 1, f"nearly in {other}": 1}
    assert list(near.lines())[1:] == [
        f"prompts that are asked there too: 1 also in {test}, 1 nearly in {other}",
        f"  {path}:1 asks what {test}:1 asks", f"  {path}:2 asks nearly what {other}:1 asks",
    ]  # fmt: skip
    assert list(quality(test, against=(write({"text": "z"}, name="z.jsonl"),)).lines()) == [
        "prompts that are asked there too: none"
    ]


def test_personal_data_is_counted_and_never_printed(write):
    rows = [{"prompt": f"mail ann{n}@example.com", "completion": "call 202-555-0123"} for n in range(4)]
    path = write(*rows)
    found = quality(path, privacy=True)
    assert found.personal == {"email": 4, "phone": 4}
    lines = list(found.lines())
    assert lines[0] == "personal data: 4 email, 4 phone" and lines[-1] == "  and 3 more"
    assert lines[1] == f"  {path}:1: email a***@*******.***"
    done = CliRunner().invoke(app, ["validate-data", path, "--privacy"])
    assert done.exit_code == 0 and "4 email" in done.output and "ann" not in done.output and "0123" not in done.output
    assert "none found" in str(validate(DatasetConfig(path=write({"text": "x"})), wishes=QualityWishes(privacy=True)))


def test_the_lengths_of_pairs_are_always_said(write):
    pairs = [{"prompt": f"q{n}", "chosen": "one two three", "rejected": "one two"} for n in range(20)]
    lines = list(quality(write(*pairs)).lines())
    assert lines[0].startswith("length of answers: the chosen one is longer in 100%, words on average 3.0 (chosen) and")
    assert lines[1].startswith("warning: a judge that always takes the longer answer is right in 100% of these pairs")
    ranked = quality(write({"prompt": "q", "completions": ["a", "b c", "d e f"], "scores": [1, 2, 2]})).lengths
    assert (ranked.pairs, ranked.longer) == (2, 1.0), "the two of equal score make no pair; 2 and 3 words beat 1"


def test_chinese_lengths_are_characters(write):
    lengths = quality(write({"prompt": "问", "chosen": "很好，谢谢", "rejected": "好"})).lengths
    assert (lengths.chosen_mean, lengths.rejected_mean) == (4.0, 1.0)


def test_the_commands_options_and_json(write):
    path = write({"prompt": RIVERS, "completion": "x"}, {"prompt": RIVERS + "!", "completion": "x"})
    found = CliRunner().invoke(
        app, ["validate-data", path, "--near-duplicates", "0.8", "--against", path, "--privacy", "--json"]
    )
    assert found.exit_code == 0
    quality = json.loads(found.output)["quality"]
    assert quality["near_duplicates"] == 1 and quality["overlap"] == {f"also in {path}": 2}
    assert quality["near_places"] == [[f"{path}:2", f"{path}:1"]] and quality["personal"] == {}
