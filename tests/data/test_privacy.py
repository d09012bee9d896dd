"""Every number here is fictitious: example.com, 555-01xx, published test cards and accounts, retired identities."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rlhf_ray.config.data import DatasetConfig
from rlhf_ray.data.datasets import load_supervised
from rlhf_ray.data.privacy import PersonalData, find_personal, masked, masked_row, masked_value, shape
from rlhf_ray.data.rows import Row
from rlhf_ray.errors import DataError
from rlhf_ray.models.tokenizers import bpe_tokenizer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to ann.lee+news@mail.example.com.", "Write to [EMAIL]."),
        ("邮箱zhang@example.cn，谢谢", "邮箱[EMAIL]，谢谢"),
        ("<bo@example.co.uk>", "<[EMAIL]>"),
        ("Call (202) 555-0123 now", "Call [PHONE] now"),
        ("202-555-0123 or 202.555.0187", "[PHONE] or [PHONE]"),
        ("+1 202 555 0123, +44 20 7946 0958", "[PHONE], [PHONE]"),
        ("电话：13800138000，微信同号", "电话：[PHONE]，微信同号"),
        ("手机138-0013-8000请拨打", "手机[PHONE]请拨打"),
        ("+86 138 0013 8000", "[PHONE]"),
        ("座机010-62345678", "座机[PHONE]"),
        ("phone=13800138000", "phone=[PHONE]"),
        ("电话１３８００１３８０００，ｂｏ＠example.com", "电话[PHONE]，[EMAIL]"),  # full-width forms
        ("+٤٤ ٢٠ ٧٩٤٦ ٠٩٥٨", "[PHONE]"),
        ("card 4111 1111 1111 1111, 5555-5555-5555-4444", "card [CARD], [CARD]"),
        ("378282246310005 3782 822463 10005", "[CARD] [CARD]"),
        ("卡号6011000990139424。", "卡号[CARD]。"),
        ("身份证11010519491231002X号", "身份证[ID]号"),
        ("his number is 078-05-1120.", "his number is [ID]."),
        ("GB82 WEST 1234 5698 7654 32 is", "[IBAN] is"),
        ("DE89370400440532013000", "[IBAN]"),
        ("gb82west12345698765432 gb82 west 1234 5698 7654 32", "[IBAN] [IBAN]"),
        ("GB82-WEST-1234-5698-7654-32, DE89370400440532013000是", "[IBAN], [IBAN]是"),
        ("联系zhangsan@example.com（工作）", "联系[EMAIL]（工作）"),
        ("bo@example.com(work), bo@example.co.uk[1]", "[EMAIL](work), [EMAIL][1]"),
        ("电话：13800138000/13900139000", "电话：[PHONE]/[PHONE]"),
        ("电话：13800138000 / 010-62345678", "电话：[PHONE] / [PHONE]"),
        ("Tel 202-555-0123/202-555-0187", "Tel [PHONE]/[PHONE]"),
        ("card 4111111111111111/4012888888881881", "card [CARD]/[CARD]"),
        ("13800138000=张三", "[PHONE]=张三"),
        ("13800138000，13900139000", "[PHONE]，[PHONE]"),
        ("张三,13800138000,25", "张三,[PHONE],25"),
        ("(010) 62345678, （010）62345678, 010 6234 5678", "[PHONE], [PHONE], [PHONE]"),
        ("010-62345678-801", "[PHONE]"),  # an extension
        ("400-810-8888, 800-8108-888", "[PHONE], [PHONE]"),
        ("138.0013.8000", "[PHONE]"),
        ("400-8108888, 138-00138000", "[PHONE], [PHONE]"),
        ("202\u2013555\u20130123, 4111\u00a01111\u00a01111\u00a01111, 138\u201100138000", "[PHONE], [CARD], [PHONE]"),
        # What stands beside a number in running text, Markdown, HTML and code is no operator of a sum.
        ("**13800138000** (work), *(202) 555-0123*, **4111111111111111**", "**[PHONE]** (work), *[PHONE]*, **[CARD]**"),
        ("- 13800138000\n- 13900139000\n+1 202 555 0123", "- [PHONE]\n- [PHONE]\n[PHONE]"),
        ("Room 5\n* 13800138000\n* 13900139000", "Room 5\n* [PHONE]\n* [PHONE]"),
        ("<p>13800138000</p><h1>202-555-0123</h1>4111111111111111<br>", "<p>[PHONE]</p><h1>[PHONE]</h1>[CARD]<br>"),
        ("Bo <13800138000> 5", "Bo <[PHONE]> 5"),
        ("Tel 202-555-0123 / Fax 202-555-0187", "Tel [PHONE] / Fax [PHONE]"),
        ("202-555-0123 (home) / 202-555-0187 (cell)", "[PHONE] (home) / [PHONE] (cell)"),
        ("13800138000/微信, 13800138000/a@example.com, 13800138000+QQ", "[PHONE]/微信, [PHONE]/[EMAIL], [PHONE]+QQ"),
        ("tel2=13800138000&n=1, phones[0] = 13900139000", "tel2=[PHONE]&n=1, phones[0] = [PHONE]"),
        ("4111 1111 1111 1111 / 12/25", "[CARD] / 12/25"),
        (r"hi\nbo@example.com\t13800138000\u000abo@example.com", r"hi\n[EMAIL]\t[PHONE]\u000a[EMAIL]"),
        (r'{\"to\": \"hi\\nbo@example.com\"', r'{\"to\": \"hi\\n[EMAIL]\"'),  # JSON text in JSON text
    ],
)
def test_what_is_personal_is_masked(text, expected):
    assert masked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "In 1999-2005, on 2020-12-31 at 12:30:45",
        "1,234,567,890 and 3.14159265358979 and 0.4111111111111111",
        "2^34 = 17179869184",
        "17179869184 - 5 = 17179869179",
        "他花了13800000000元",
        "It cost $13800138000",
        "4111111111111112",  # Luhn's digit is wrong
        "1234567812345670",  # right, but no issuer's
        "0000000000000000",
        "4111111111111111 + 1",
        "110105194912310021",  # the check digit is X
        "11010519491331002X",  # month 13
        "000-12-3456 and 666-12-3456 and 900-12-3456 and 123-00-4567 and 123-45-0000",
        "123-45-67890",
        "GB82 WEST 1234 5698 7654 33",  # mod 97
        "GB82 WEST 1234 5698 7654 32X",
        "DE8937040044053201300",  # a digit short
        "scores = q@k.transpose(1, 2)",
        "@property\nuser@localhost",
        "y = x@self.net(z); q@k.to(device); obj.name@decorator(f); a@b.c(x); x@w.at[0]",
        "13800138000/3, 3/13800138000, 13800138000/6900069000 = 2, 13800138000/13800138000=1",
        "17179869184=单价×数量",
        "x = 17179869184 * n, 17179869184*n, 17179869184**2, 17179869184 + (1), 3 * 17179869184, 17179869184^n",
        "17179869184 < 3, 17179869184 > x, 17179869184/x, (1+2)=17179869184, 17179869184 ÷ 两, 17179869184 =",
        "3,14159265358",
        "0,13800138000 and 13,800,138,000",
        "gb82 west 1234 5698 7654 33",  # mod 97
        "400 500 6000 items",
        "call 2025550123 times",  # ten digits in one may be any number
        "ISBN 978-3-16-148410-0, version 10.0.19041.1",
        "28980 - 18480 = 10500; 1000-450-300 = 250",
    ],
)
def test_what_only_looks_personal_stays(text):
    assert [(text[f.start : f.end], f.kind) for f in find_personal(text)] == []


def test_an_identity_number_is_not_a_card_too():
    # Right by both check digits, ISO 7064's and Luhn's, and 62 is UnionPay's; of a person born in 1900.
    (found,) = find_personal("no. 620102190001010256")
    assert (found.kind, found.start, found.end) == ("identity number", 4, 22)


def test_shapes_show_nothing_but_the_form():
    assert shape("ann.lee@example.com") == "a**.***@*******.***"
    assert shape("(202) 555-0123") == "(***) ***-****"


def test_rows_are_masked_at_every_depth():
    row = {"messages": [{"role": "user", "content": "I am bo@example.com"}], "n": 4, "none": None,
           "meta": {"tags": ["202-555-0123", "x"]}}  # fmt: skip
    counts = Counter()
    assert masked_row(row, lambda kind, text: counts.update([f"{kind}: {text}"])) == {
        "messages": [{"role": "user", "content": "I am [EMAIL]"}], "n": 4, "none": None,
        "meta": {"tags": ["[PHONE]", "x"]},
    }  # fmt: skip
    assert counts == {"email: bo@example.com": 1, "phone: 202-555-0123": 1}


def hidden(value):
    return masked_value(value, lambda kind, text: None)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"m": "hi\nbo@example.com"}, {"m": "hi\n[EMAIL]"}),
        ({"m": "call\n13800138000", "n": 13800138000}, {"m": "call\n[PHONE]", "n": "[PHONE]"}),
        ([{"n": [4111111111111111, 5, True, None, 1.5, -13800138000]}],
         [{"n": ["[CARD]", 5, True, None, 1.5, -13800138000]}]),
        ({"n": 13800138000.0}, {"n": "[PHONE]"}),
        ({"电话": "１３８００１３８０００"}, {"电话": "[PHONE]"}),
        ({"a@example.com": 1, "b@example.com": 2, "c": {"13800138000": 3}},
         {"[EMAIL]": 1, "[EMAIL] 2": 2, "c": {"[PHONE]": 3}}),
        ([{"a@example.com": 1}, {"a@example.com": [{"b@example.com": 2}]}],
         [{"[EMAIL]": 1}, {"[EMAIL]": [{"[EMAIL]": 2}]}]),
        ({"a@example.com": 1, "[EMAIL]": 2, "b@example.com": 3, "[EMAIL] 3": 4, "c@example.com 2": 5},
         {"[EMAIL] 2": 1, "[EMAIL]": 2, "[EMAIL] 4": 3, "[EMAIL] 3": 4, "[EMAIL] 2 2": 5}),
        ({"电": "\ud835 bo@example.com 电"}, {"电": "\ud835 [EMAIL] 电"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_text_is_masked_as_what_it_says(said, expected, ascii_only):
    text = json.dumps(said, ensure_ascii=ascii_only)
    assert hidden(said) == expected
    assert hidden(text) == json.dumps(expected, ensure_ascii=ascii_only)
    twice = json.dumps({"arguments": text}, ensure_ascii=ascii_only)
    assert json.loads(json.loads(hidden(twice))["arguments"]) == expected


def test_the_rest_of_json_text_stays_as_it_is_written():
    text = '{\n  "x" : 1.50, "big":1e400,"x":"\\u7535\\/",\n  "to":"bo\\u0040example.com" }'
    assert hidden(text) == text.replace("bo\\u0040example.com", "[EMAIL]")
    assert hidden("[bo@example.com](mailto:bo@example.com)") == "[[EMAIL]](mailto:[EMAIL])"  # no JSON


def test_arguments_are_still_json_once_masked(write):
    tokenizer = bpe_tokenizer(["abc"], vocab_size=260, max_length=1000)
    call = {"function": {"name": "send", "arguments": json.dumps({"m": "hi\nbo@example.com", "to": 13800138000})}}
    path = write({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    )
    train, _ = load_supervised(DatasetConfig(path=path, cleaning={"privacy": "mask"}), tokenizer, seed=0)
    assert '{"m": "hi\\n[EMAIL]", "to": "[PHONE]"}' in tokenizer.decode(train[0].token_ids)


def test_what_is_nested_too_deeply_is_refused():
    deep = "bo@example.com"
    for _ in range(20_000):
        deep = [deep]
    with pytest.raises(DataError, match=r"^rows\.jsonl:3: is nested too deeply"):
        PersonalData("mask").seen(Row({"meta": deep}, "rows.jsonl:3"))
    json_text = "[" * 20_000 + '"bo@example.com"' + "]" * 20_000  # which Python does not read: it is a text
    assert "bo@example.com" not in hidden(json_text)


def test_hostile_texts_take_linear_time():
    for text in (
        "a" * 200_000 + "@", "a.@" * 60_000, "1 " * 10_000, "1-" * 20_000, "bo@example.com, " * 10_000,
        "GB82 " + "A " * 100_000, "\\" * 200_000, "gb82 abcd" * 20_000, "13800138000/" * 1_000, '["' + '\\\\' * 100_000,
    ):  # fmt: skip
        hidden(text)
    many = {f"a{number}@example.com": number for number in range(300)}
    assert len(hidden(many)) == len(json.loads(hidden(json.dumps(many)))) == 300


@pytest.mark.parametrize(
    ("mode", "learned", "says"),
    [
        ("none", "bo@example.com", ""),
        ("count", "bo@example.com", "; personal data: 2 email (cleaning.privacy=mask hides it)"),
        ("mask", "[EMAIL]", "; personal data: 2 email (masked)"),
    ],
)
def test_a_run_counts_or_masks(write, mode, learned, says):
    tokenizer = bpe_tokenizer(["abc"], vocab_size=260, max_length=1000)
    path = write({"prompt": "who?", "completion": "bo@example.com"}, {"prompt": "ann@example.com", "completion": "me"})
    reports = []
    train, _ = load_supervised(
        DatasetConfig(path=path, cleaning={"privacy": mode}), tokenizer, seed=0, on_report=reports.append
    )
    assert tokenizer.decode(train[0].token_ids) == f"who?{learned}<eos>"
    assert str(reports[0]) == f"{path}: 2 rows, 2 examples{says}"


def test_problems_and_reviews_have_none(shared_data):
    for name in ("gsm8k.test", "math500.half", "movie_reviews.test"):
        for number, line in enumerate((shared_data / f"{name}.jsonl").read_text().splitlines(), start=1):
            row = json.loads(line)
            assert hidden(row) == row, f"{name}:{number}"


@pytest.mark.parametrize(
    ("name", "expected"), [("alpaca_seed_tasks", {"email": 3}), ("hh_harmless.test", {"email": 4, "phone": 2})]
)
def test_what_real_texts_hold_is_found(shared_data, name, expected):
    counts = Counter()
    for line in (shared_data / f"{name}.jsonl").read_text().splitlines():
        row, seen = json.loads(line), Counter()
        hidden_row = masked_row(row, lambda kind, _, seen=seen: seen.update((kind,)))
        assert json.loads(hidden(line)) == hidden_row  # the line as JSON text
        counts += seen
    assert counts == expected
