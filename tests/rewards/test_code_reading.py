"""What a data set's tests mean, what a completion's code is, and when two values or outputs are the same."""

from __future__ import annotations

import json

import pytest

from rlhf_ray.rewards.code_compare import NotPlain, plain, same, same_output
from rlhf_ray.rewards.code_forms import FunctionTest, ProgramTest, TextTest, about_texts, read_tests
from rlhf_ray.rewards.code_tests import code_in
from rlhf_ray.rewards.code_wire import Encoder, Unsendable


def call(*args, expected=(), **named):
    return FunctionTest("f", ((list(args), named),), tuple(expected))


def calls(inputs, outputs):
    return read_tests({"fn_name": "f", "inputs": inputs, "outputs": outputs})


def test_calls_are_read_from_lists_text_and_text_within_text():
    right = [call(1, "a", expected=[3])]
    given = {"fn_name": "f", "inputs": [[1, "a"]], "outputs": [3]}
    assert read_tests(given) == right and read_tests(json.dumps(given)) == right
    assert calls(json.dumps([[1, "a"]]), json.dumps([3])) == right
    assert calls(['1\n"a"'], ["3"]) == right, "a JSON value a line"
    functional = {"input": '1\n"a"\n', "output": "3", "testtype": "functional"}
    assert read_tests([functional], "f") == right and read_tests([{**functional, "func_name": "f"}]) == right


def test_an_output_in_a_list_of_one_is_either():
    assert calls([[1]], [[3]]) == [call(1, expected=[[3], 3])]
    assert calls([[1]], [[3, 4]]) == [call(1, expected=[[3, 4]])] and calls([[1]], [[]]) == [call(1, expected=[[]])]


def test_values_that_python_has_printed_are_read_too():
    assert calls(["['a', None]"], ["True"])[0].expected == (True,)
    assert calls(["['a', None]"], ["True"])[0].readings == (([["a", None]], {}), (["a", None], {}))
    assert calls(["word"], ["two words"]) == [call("word", expected=["two words"])]
    assert calls(["{1, 2}"], ["1"]) == [call("{1, 2}", expected=[1])], "a set is no JSON"


def test_arguments_on_several_lines_of_one_value_by_name_and_with_numbers_as_keys():
    assert calls(["[[1,\n2]]"], ["2"])[0].readings[0] == ([[[1, 2]]], {})
    assert calls([{"a": 1}], [2])[0].readings == (([], {"a": 1}), ([{"a": 1}], {}))
    assert calls([[{"1": 2, "-3": 4}, {"x": 1}]], [0]) == [call({1: 2, -3: 4}, {"x": 1}, expected=[0])]


def test_programs_are_read_from_text_and_from_lists_of_lines():
    right = [ProgramTest("2\na", "b\nc")]
    assert read_tests({"inputs": ["2\na"], "outputs": ["b\nc"]}) == right
    assert read_tests(json.dumps({"inputs": [["2", "a"]], "outputs": [["b", "c"]]})) == right
    assert read_tests([{"input": "2\na", "output": "b\nc", "testtype": "stdin"}]) == right
    assert read_tests({"input": 5, "output": 6}) == [ProgramTest("5", "6")]


def test_texts():
    assert read_tests("assert f(1) == 2") == [TextTest("assert f(1) == 2")]
    assert read_tests(["assert f(1) == 2", "assert f(2) == 3"]) == [
        TextTest("assert f(1) == 2"), TextTest("assert f(2) == 3")
    ]  # fmt: skip
    imports = read_tests(["import math", "def near(a, b):\n    return abs(a - b) < 1", "assert near(f(1), 2)"])
    assert imports == [TextTest("import math\ndef near(a, b):\n    return abs(a - b) < 1\nassert near(f(1), 2)")]
    check = "def check(candidate):\n    assert candidate(1) == 2"
    assert read_tests(check, "f") == [TextTest(f"{check}\ncheck(f)\n")]
    assert read_tests(f"{check}\ncheck(f)") == [TextTest(f"{check}\ncheck(f)")]


@pytest.mark.parametrize(("given", "why"), [
    (None, "there are none"), ([], "there are none"), ("", "neither Python text nor"), ([3], "neither Python text nor"),
    ("assert f(", "no Python"), ("x = 1\nassert x == 1", "never uses anything that a sample could define"),
    ("def check(candidate):\n    assert candidate(1) == 2", "never call it"),
    ({"inputs": ["1"], "outputs": []}, "1 inputs, but 0 outputs"), ({"inputs": "1", "outputs": ["1"]}, "is a int"),
    ({"inputs": "[1", "outputs": ["1"]}, "no JSON"), ("assert open(f()).read() == ''", "use files"),
    ([{"input": "1", "output": "1", "testtype": "functional"}], "nothing names the function"),
    ("from unittest.mock import patch\nwith patch('solution.g'):\n    assert f() == 1", "they replace solution.g"),
])  # fmt: skip
def test_what_could_not_fail_or_not_be_read_is_refused(given, why):
    with pytest.raises(ValueError, match=why):
        read_tests(given)


def test_which_names_are_the_sample_s():
    about = about_texts(["class Node:\n    def __init__(self, value): self.value = value\nassert f(Node(1)) == limit"])
    assert {"f", "limit"} <= set(about["free"]) and "Node" not in about["free"] and about["outside"] == ["Node"]
    assert about_texts(["assert sum([1]) == 1"])["builtin_under_test"] == "sum"
    assert about_texts(["assert sum(f(1)) == 1"])["builtin_under_test"] == ""


@pytest.mark.parametrize(("got", "expected", "value"), [
    (3, 3, True), (3, 4, False), ("3", 3, False), (3, "3", False), (None, None, True), (None, [], False),
    (None, 0, False), (0, None, False), ([], None, False), (True, True, True), (False, None, False),
    (3.0, 3, True), (3, 3.0, True), (0.30000000000000004, 0.3, True), (0.30002, 0.3, False), (1e9, 1e9 + 1.5, True),
    (1_000_001, 1_000_000, False), (True, 1.0, True), (float("nan"), float("nan"), True), (float("nan"), 1.0, False),
    (1 << 2000, 1.5, False), ([1, [2, [3.0]]], [1, [2, [3]]], True), ([1, [2, [3]]], [1, [2, [4]]], False),
    ([1, 2], [2, 1], False), ([1], [1, 2], False), ([0.1 + 0.2], [0.3], True), ("ab", ["a", "b"], False),
    ({"a": [0.1 + 0.2]}, {"a": [0.3]}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({"a": 1, "b": 2}, {"a": 1}, False),
    ({"a": None}, {}, False), ([["a", 1]], {"a": 1}, False),
])  # fmt: skip
def test_values_that_are_the_same(got, expected, value):
    assert same(got, expected) is value


def refused(value):
    raise Unsendable(str(value))


@pytest.mark.parametrize(("value", "seen"), [
    ((1, (2, "a")), [1, [2, "a"]]), ([(1,), [2]], [[1], [2]]),
    ({1: (2,), None: 3, "a": 4}, {"1": [2], "null": 3, "a": 4}),
    (1 << 70, 1 << 70), ({"a": {"b": ()}}, {"a": {"b": []}}), (None, None),
], ids=repr)  # fmt: skip
def test_a_returned_value_as_json_has_it(value, seen):
    assert plain(Encoder(refused).encode(value)) == seen


def test_one_list_twice_is_two_equal_lists():
    row = [1]
    assert plain(Encoder(refused).encode([row, {"a": row}, row])) == [[1], {"a": [1]}, [1]]


@pytest.mark.parametrize("value", [{1}, frozenset("a"), b"x", range(3), 1j, {(1, 2): 3}], ids=repr)
def test_what_json_has_no_form_for_is_no_right_answer(value):
    with pytest.raises(NotPlain):
        plain(Encoder(refused).encode(value))


@pytest.mark.parametrize("forged", [
    {"handle": {}}, {"tuple": 3}, {"a": 1, "b": 2}, {"int": "x"}, {"seen": 7}, {"array": [1]}, {"mapping": [1]},
    {"dict": [[{"dict": []}, 1]]},
])  # fmt: skip
def test_what_a_sample_may_have_written_is_refused(forged):
    with pytest.raises(NotPlain):
        plain(forged)


@pytest.mark.parametrize(("printed", "expected", "value"), [
    ("1 2 \n3\n\n", "1 2\n3", True), ("1 2\n3", "1 2  \n3\n", True), ("a\r\nb\r\n", "a\nb", True), ("", "", True),
    ("", "0", False), ("1\n2", "1 2", False), ("1\n\n2", "1\n2", False), ("1 2", "12", False), ("yes", "YES", False),
    (" 5", "5", True), ("1  2", "1 2", True), ("*\n***", " *\n***", False), ("a b", "a  b", False),
    ("0.3333333333", "0.33333333", True), ("0.500000", "0.5", True), ("0.5", "0.500000", True), (".5", "0.5", True),
    ("1e-7", "0.0", True), ("0.34", "0.33333333", False), ("100000001", "100000000", False), ("3.0", "3", False),
    ("1000000.5", "1000000.0", True), ("1.5e3 x", "1500.0 x", True), ("nan", "0.0", False), ("0.5 1", "0.5 2", False),
    ("1_0", "10.0", False), ("", "0.0", False),
])  # fmt: skip
def test_outputs_that_are_the_same(printed, expected, value):
    assert same_output(printed, expected) is value


CODE = "def f(x):\n    return x\n"
FENCED = f"```python\n{CODE}```"


@pytest.mark.parametrize("completion", [
    CODE, FENCED, f"Here:\n{FENCED}\nDone.", f"Here: {FENCED}", FENCED.replace("python", "Python"),
    FENCED.replace("python", "py"), FENCED.replace("python", ""), FENCED.replace("```python", "```python title='a.py'"),
    FENCED.replace("```", "~~~"), FENCED.removesuffix("```"), f"```\nInput: 3\n```\nso\n{FENCED}",
    f"{FENCED}\nIt prints\n```\n3\n```", f"```cpp\nint x;\n```\nIn Python:\n{FENCED}",
    f"{FENCED}\n```bash\npython a.py\n```",
    f"```python\nx = 1\n```\nBetter:\n{FENCED}", f"Use ```f``` here.\n{FENCED}",
    f"<think>```python\nx = </think>{FENCED}",
    "1. This:\n   ```python\n   def f(x):\n       return x\n   ```\n2. That.", FENCED.replace("x\n```", "x```"),
], ids=range(19))  # fmt: skip
def test_the_code_in_a_completion(completion):
    assert code_in(completion) == CODE


def test_fences_within_the_code_do_not_end_it():
    code = 'def f(x):\n    """As in\n\n    ```\n    f(1)\n    ```\n    or ```f(2)```\n    """\n    return x\n'
    assert code_in(f"```python\n{code}```\nDone.") == code
    assert code_in("```cpp\nint x;\n```") == "", "another language is no Python, nor is the text around it"


@pytest.mark.parametrize("text", [
    "`" * 200_000, "```" + " " * 200_000 + "`", "```\n" * 50_000, "a```" * 50_000, "~~~`\n" * 50_000,
], ids=range(5))  # fmt: skip
def test_reading_a_completion_takes_no_longer_than_it_is(text):
    """A quadratic pattern would take minutes."""
    assert CODE not in code_in(text)
