from __future__ import annotations

from rlhf_ray.data.columns import EmptyRowError
from rlhf_ray.data.dialogues import dialogue_messages, is_dialogue, shared_messages, shared_text
from rlhf_ray.data.rows import read_rows
from rlhf_ray.data.types import parse

HEAD = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: so\n\nAssistant:"


def test_answers_that_begin_alike_keep_their_beginning():
    assert shared_text(f"{HEAD} I do.", f"{HEAD} I don't.", where="f:1") == (HEAD, " I do.", " I don't.")


def test_the_prompt_ends_with_the_last_question_that_both_share():
    chosen, rejected = f"{HEAD} a\n\nHuman: b\n\nAssistant: c", f"{HEAD} d"
    assert shared_text(chosen, rejected, where="f:1") == (HEAD, " a\n\nHuman: b\n\nAssistant: c", " d")
    assert shared_text(f"{HEAD} same", f"{HEAD} same", where="f:1") == (HEAD, " same", " same")


def test_other_texts_are_cut_where_they_differ_at_a_blank():
    assert shared_text("The sky is blue.", "The sky is green.", where="f:1") == ("The sky is", " blue.", " green.")
    assert shared_text("2+2=4", "2+2=5", where="f:1") == ("2+2=", "4", "5")


def test_dialogues_as_messages():
    assert is_dialogue(HEAD) and not is_dialogue("Human: hi")
    assert dialogue_messages(HEAD) == (
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yo"},
        {"role": "user", "content": "so"},
    )


def test_the_prompts_of_real_dialogues_are_recovered_exactly(shared_data):
    """Checked against another definition: all turns but the last. 4 of 1800 rows go apart before their last turn."""
    rows = apart = empty = 0
    for name in ("train", "test"):
        for row in read_rows(str(shared_data / f"hh_harmless.{name}.jsonl")):
            chosen, rejected = row.fields["chosen"], row.fields["rejected"]
            rows += 1
            try:
                (record,) = parse(row, "preference")
            except EmptyRowError:
                empty += 1
                assert chosen.endswith("\n\nAssistant:") or chosen.rsplit("\n\nAssistant:", 1)[1].isspace(), row.where
                continue
            assert (record.prompt + record.chosen, record.prompt + record.rejected) == (chosen, rejected)
            assert record.prompt.startswith("\n\nHuman:") and record.prompt.endswith("\n\nAssistant:")
            last = {text.rsplit("\n\nAssistant:", 1)[0] + "\n\nAssistant:" for text in (chosen, rejected)}
            if last != {record.prompt}:
                apart += 1
                assert len(last) == 2, f"{row.where}: both have the same last question, and it was not found"
    assert (rows, apart, empty) == (1800, 4, 4)


def test_an_answer_that_both_begin_with_is_part_of_both():
    """The rows of a conversation in which the assistant speaks twice: the first message is no unfinished answer."""
    user, same = {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Let me look."}
    good, bad = ({"role": "assistant", "content": text} for text in ("At nine.", "No idea."))
    prompt, chosen, rejected = shared_messages((user, same, good), (user, same, bad), where="here")
    assert (prompt, chosen, rejected) == ((user,), (same, good), (same, bad))
