"""What of YAML a config may use, and how the rest is refused: by line, before Python stumbles over it."""

from __future__ import annotations

import pytest
import yaml

from rlhf_ray.config import dialect


def test_numbers_and_dates_as_people_mean_them():
    assert dialect.read("[1e-6, 1E3, 1.5e2, 0x10]") == [1e-6, 1000.0, 150.0, 16]
    assert dialect.read("[2024-02-29, 2024-02-30, 2001-12-14t21:59:43]") == [
        "2024-02-29", "2024-02-30", "2001-12-14t21:59:43"
    ]  # fmt: skip
    for text in ("1e-6", "2024-02-29", "null", "12", "true"):
        assert dialect.read(dialect.write({"a": text})) == {"a": text}


def test_an_alias_stands_for_its_value():
    assert dialect.read("{a: &x {b: 1}, c: *x, d: {<<: *x, e: 2}}") == {"a": {"b": 1}, "c": {"b": 1},
                                                                       "d": {"b": 1, "e": 2}}  # fmt: skip


@pytest.mark.parametrize(("text", "says"), [
    ("&c [*c]", "an alias of what it stands in"),
    ("&c {a: {b: *c}}", "an alias of what it stands in"),
    ("&c {<<: *c, a: 1}", "an alias of what it stands in"),
    ("*nobody", "undefined alias"),
    ("a: !!int abc", "cannot be read as a value of type int"),
    ("a: !!int ''", "cannot be read as a value of type int"),
    ("a: !!float abc", "cannot be read as a value of type float"),
    ("a: !!bool maybe", "cannot be read as a value of type bool"),
    ("a: " + "9" * 5000, "cannot be read as a value of type int"),
    ("a: 340282366920938463463374607431768211456", "an integer of more than 128 bits"),
    (f"a: -0x{'F' * 33}", "an integer of more than 128 bits"),
    (r'a: "\ud800"', "cannot be read as a value of type str"),
    (r'{"\udfff": 1}', "cannot be read as a value of type str"),
    ("a: !!binary /9j/", "could not determine a constructor"),
    ("a: !!set {b, c}", "could not determine a constructor"),
    ("a: !!omap [{b: 1}]", "could not determine a constructor"),
    ("a: !!timestamp 2024-02-29", "could not determine a constructor"),
    ("a: !!python/name:os.system", "could not determine a constructor"),
    ("{a: 1, a: 2}", "comes twice"),
])  # fmt: skip
def test_what_is_refused_says_where(text, says):
    with pytest.raises(yaml.YAMLError, match=says) as error:
        dialect.read(text)
    assert "line 1, column" in str(error.value)


def test_the_widest_integer():
    assert dialect.read("340282366920938463463374607431768211455") == 2**128 - 1


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", "")])
def test_depth_is_bounded(opening, closing):
    deepest = dialect.DEEPEST - 1  # the value inside is a level too
    assert dialect.read(opening * (deepest if opening != "? " else 1) + "x" + closing * deepest) is not None
    for depth in (deepest + 1, 100_000):
        with pytest.raises(yaml.YAMLError, match="nested more than 64 deep"):
            dialect.read(opening * depth + "x" + closing * depth)


def test_depth_by_aliases_is_bounded():
    """Each line nests the one before it 20 deeper, though none is written deeper than 21."""
    lines = ["- &a0 x", *(f"- &a{i} {'[' * 20}*a{i - 1}{']' * 20}" for i in range(1, 5))]
    assert len(dialect.read("\n".join(lines[:4]))) == 4  # 60 + 3 levels: the list, the innermost text
    with pytest.raises(yaml.YAMLError, match="more than 100,000 values or 64 levels") as error:
        dialect.read("\n".join(lines))
    assert "line 5" in str(error.value)


@pytest.mark.parametrize("form", ["[{}]", "{{list: [{}]}}", "{{<<: [{}]}}"])
def test_aliases_that_multiply_are_refused(form):
    """Ten levels of nine aliases: 9^10 values in half a kilobyte."""
    lines = ["- &b0 {a: x}", *(f"- &b{i} {form.format(', '.join([f'*b{i - 1}'] * 9))}" for i in range(1, 11))]
    with pytest.raises(yaml.YAMLError, match="more than 100,000 values"):
        dialect.read("\n".join(lines))


def test_a_long_list_of_values_is_none_of_these():
    assert len(dialect.read("[" + "1, " * 50_000 + "]")) == 50_000
