r"""The math reward: where the answer stands, what makes no difference, and what must never score 1.

False positives are the worse mistake: a policy finds them.
"""

from __future__ import annotations

import json
import threading
import time

import pytest

from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.failures import FailurePolicy
from rlhf_ray.rewards.math_answer import math_answer
from rlhf_ray.rewards.math_reading import final_part, read_answer

RIGHT = {  # kind -> (the data's answer, completion)
    "bare LaTeX": [
        (r"3\sqrt{11}", r"It is $\boxed{3\sqrt{11}}$."),
        (r"p - q", r"\boxed{p-q}"),
        (r"p - q", r"\boxed{-q+p}"),
        (r"x^2+4x-5", r"\boxed{(x+5)(x-1)}"),
        (r"\tan x", r"\boxed{\frac{1}{\cot x}}"),
        (r"\frac{\sqrt5}{5}", r"\boxed{\dfrac{1}{\sqrt{5}}}"),
        ("2ab+3", "2ab + 3"),
        ("-4i", r"\boxed{(1-i)^2 - 2i}"),
        ("$\\frac{1}{2}$", r"\boxed{\frac12}"),
        (r"\boxed{7}", "7"),
        ("2^{10}", r"\boxed{1024}"),
        ("2^{n+1}", r"\boxed{2\cdot 2^n}"),
    ],
    "fractions and mixed numbers": [
        (r"\frac53", r"\boxed{\frac{5}{3}}"),
        (r"\dfrac{5}{3}", r"\boxed{10/6}"),
        (r"\frac{11}{50}", r"\boxed{0.22}"),
        (r"1\frac{3}{4}", r"\boxed{\frac{7}{4}}"),
        ("1 3/4", r"\boxed{1.75}"),
        (r"-2\frac12", r"\boxed{-2.5}"),
        (r"\frac\pi6", r"\boxed{\frac{\pi}{6}}"),
        (r"\frac13", r"\boxed{0.333333}"),
    ],
    "separators of thousands": [
        (r"21,\!600", r"\boxed{21600}"),
        ("21600", "The answer is 21,600."),
        ("21,600", r"\boxed{21{,}600}"),
        ("2000", r"\boxed{2\,000}"),
        ("1,234.5", r"\boxed{1234.50}"),
        ("1e3", r"\boxed{1000}"),
        (".0000712", r"\boxed{0.0000712}"),
    ],
    "units": [
        (r"7 \text{ cm}", r"\boxed{7\text{ centimeters}}"),
        (r"7\text{ cm}", r"\boxed{7}"),
        ("7", r"\boxed{7\,\mathrm{cm}}"),
        (r"7\text{ cm}^2", r"\boxed{7\text{ square centimetres}}"),
        (r"6\pi\text{ inches}", r"\boxed{6\pi}"),
        (r"75^\circ", r"\boxed{75}"),
        (r"75^\circ", r"\boxed{75 \text{ degrees}}"),
        (r"\frac{90}7\text{ degrees}", r"\boxed{\frac{90}{7}^\circ}"),
        (r"\$41", r"\boxed{41 \text{ dollars}}"),
        ("41", "#### $41.00"),
        (r"\$12,\!500", r"\boxed{12500}"),
        (r"4:10 \text{ p.m.}", r"\boxed{4:10 \text{ PM}}"),
        ("4:10", "The answer is 4:10 p.m."),
    ],
    "percentages": [
        (r"35\%", r"\boxed{35}"),
        (r"35\%", r"\boxed{0.35}"),
        (r"35\%", r"\boxed{\frac{7}{20}}"),
        ("0.35", r"\boxed{35\%}"),
        (r"35\%", "The answer is 35 percent."),
        (r"2.5\%", r"\boxed{2.5\%}"),
    ],
    "equations": [
        ("x=6", r"\boxed{6}"),
        ("6", r"\boxed{x=6}"),
        ("6", r"\boxed{x = 2+4 = 6}"),
        ("6", r"\boxed{2+4=6}"),
        ("y = 3x + 1", r"\boxed{y=1+3x}"),
        ("y=3x+1", r"\boxed{3x - y + 1 = 0}"),
        ("6", r"\boxed{\text{Area} = 6}"),
        (r"x \in [2,3]", r"\boxed{[2,3]}"),
    ],
    "several values": [
        ("2, 4, 9", r"\boxed{9,2,4}"),
        ("2, 4, 9", "The answer is 2, 4, and 9."),
        (r"2 \pm \sqrt{7}", r"\boxed{2+\sqrt{7}, 2-\sqrt{7}}"),
        (r"2 \pm \sqrt{7}", r"\boxed{2-\sqrt7 \text{ or } 2+\sqrt7}"),
        (r"\{2\pm\sqrt{3},-1\}", r"\boxed{-1, 2-\sqrt3, 2+\sqrt3}"),
        (r"\pm 3", r"\boxed{3, -3}"),
    ],
    "points, intervals, matrices": [
        ("(4,7)", r"\boxed{\left( 4, 7 \right)}"),
        ("(4,7)", r"\boxed{(4, \frac{14}{2})}"),
        (r"(3,\infty)", r"\boxed{\left(3, +\infty\right)}"),
        ("(1,6)", r"\boxed{1 < x < 6}"),
        ("1<x<6", r"\boxed{(1,6)}"),
        (r"(0,2) \cup (2,5)", r"\boxed{(2,5) \cup (0,2)}"),
        (r"\begin{pmatrix} 2 & 0 \\ 0 & -3 \end{pmatrix}", r"\boxed{\begin{bmatrix} 2 & 0\\0 & -3\end{bmatrix}}"),
        (r"\begin{pmatrix} 2/7 \\ -9 \end{pmatrix}", r"\boxed{\begin{pmatrix} \frac27 \\ -\frac{18}{2} \end{pmatrix}}"),
    ],
    "words": [
        (r"\text{Mira}", r"Hence $\boxed{\text{Mira}}$."),
        ("Mira", r"\boxed{\text{Mira}}"),
        (r"\text{Mira}", "The answer is Mira."),
        (r"\text{(C)}", r"\boxed{C}"),
        ("C", "Answer: (C)"),
        (r"\text{(C)}", r"\boxed{\textbf{(C)}\ 12}"),
        ("C", "The answer is C) 12 cm."),
        (r"\text{odd}", r"\boxed{\textbf{odd}}"),
        ("Route 66", r"\boxed{\text{Route 66}}"),
        ("no solution", r"\boxed{\text{No solution}}"),
        ("31_5", r"\boxed{31_{5}}"),
        ("April 9, 2021", "The answer is April 9, 2021."),
        ("April 9, 2021", r"\boxed{\text{April 9, 2021}}"),
        (r"\text{A, D}", r"\boxed{\text{A, D}}"),
    ],
    "where the answer stands": [
        ("24", r"\boxed{23}, no: \boxed{24}"),
        ("24", r"\boxed{\boxed{24}}"),
        ("24", r"\boxed 24"),
        ("24", "#### 24\n\nQuestion: what are 5 and 6?"),
        ("24", "3+4=7 #### 24"),
        ("24", "The answer is $24$. I hope it is correct."),
        ("24", "**Answer:** 24"),
        ("24", "The final answer is:\n\n$$\n24\n$$"),
        ("24", "The answer is 24 because she keeps 3."),
        ("24", "The answer is 24, so she keeps 3."),
        ("24", "The answer is $24$, not 23."),
        ("24", "She has 24 eggs."),
        ("24", "24"),
        ("24", r"So \(x=24\)"),
        ("24", "答案是24。"),
        ("24", "所以一共有24个苹果"),
        ("she keeps 3 #### 24", r"\boxed{24}"),
    ],
}  # fmt: skip

WRONG = {
    "several candidates": [
        ("1", r"\boxed{1 \text{ or } 2}"),
        ("1", "The answer is 1 or 2."),
        ("3", r"\boxed{1,2,3,4,5}"),
        ("3", "The answer is 1, 2, 3, 4, 5"),
        ("3", "The answer is between 2 and 3"),
        ("3", "The answer is 3 or maybe 4"),
        ("1, 2", r"\boxed{1}"),
        ("1, 2", r"\boxed{1,2,3}"),
        ("1, 2", r"\boxed{1,1,2}"),
        ("1", r"\boxed{1,1}"),
        ("6", r"\boxed{\pm 6}"),
        ("C", r"\boxed{A, B, C, D}"),
        (r"\text{(C)}", r"\boxed{\text{(B) (C)}}"),
        ("C", "The answer is C) or B)."),
        ("C", r"\boxed{(C)(D)}"),
        (r"\text{odd}", r"\boxed{\text{odd or even}}"),
    ],
    "negations and conditions": [
        ("6", "The answer is not 6."),
        ("6", r"\boxed{\text{not } 6}"),
        ("6", r"\boxed{6 \text{ if } x>0}"),
        (r"\text{odd}", r"\boxed{\text{not odd}}"),
    ],
    "order and brackets": [
        ("(4,7)", r"\boxed{(7,4)}"),
        ("(4,7)", r"\boxed{7,4}"),
        ("4,7", r"\boxed{(7,4)}"),
        ("(4,7)", r"\boxed{[4,7]}"),
        ("(4,7)", r"\boxed{\{4,7\}}"),
        (r"\{4,7\}", r"\boxed{(4,7)}"),
        (r"(3,\infty)", r"\boxed{[3,\infty)}"),
        ("(4,7]", r"\boxed{[4,7)}"),
        ("(100,200)", r"\boxed{100200}"),
        ("x=1, y=2", r"\boxed{x=2, y=1}"),
        (r"\begin{pmatrix} 1\\2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 2\\1 \end{pmatrix}}"),
        (r"\begin{pmatrix} 1\\2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1&2 \end{pmatrix}}"),
        (r"\begin{pmatrix} 1\\2 \end{pmatrix}", r"\boxed{(1,2)}"),
    ],
    "units": [
        (r"7\text{ cm}", r"\boxed{7\text{ m}}"),
        (r"7\text{ cm}", r"\boxed{7\text{ cm}^2}"),
        (r"7\text{ cm}^2", r"\boxed{7\text{ cubic cm}}"),
        (r"\$41", r"\boxed{41 \text{ cents}}"),
        (r"\$41", r"\boxed{€41}"),
        (r"75^\circ", r"\boxed{75 \text{ radians}}"),
        ("7 apples", r"\boxed{7 \text{ pears}}"),
        (r"4:10 \text{ p.m.}", r"\boxed{4:10 \text{ a.m.}}"),
        ("0.5", r"\boxed{0.5\%}"),
        (r"0.5\%", r"\boxed{0.5}"),
        ("35", r"\boxed{0.35}"),
        (r"35\%", r"\boxed{3.5}"),
    ],
    "numbers": [
        ("31_5", r"\boxed{31}"),
        ("31", r"\boxed{31_5}"),
        ("31_5", r"\boxed{31_6}"),
        ("16", r"\boxed{31_5}"),
        (".0000712", r"\boxed{0.0000711}"),
        ("0.15", r"\boxed{0.1500001}"),
        (r"\frac13", r"\boxed{0.33333}"),
        ("3", r"\boxed{1 2}"),
        ("12", r"\boxed{1 2}"),
        ("0", r"\boxed{2\,000}"),
        ("0", r"\boxed{0.0000001}"),
        (r"6 \pi", r"\boxed{6}"),
        ("6", r"\boxed{6\pi}"),
        ("6", r"\boxed{6x}"),
        ("-6", r"\boxed{6}"),
        ("23", r"\boxed{2^3}"),
        (r"\frac23", r"\boxed{23}"),
        (r"1\frac34", r"\boxed{\frac34}"),
        (r"\infty", r"\boxed{-\infty}"),
        ("6", r"\boxed{\frac{1}{0}}"),
        ("4+9i", r"\boxed{13i}"),
        ("4:10", r"\boxed{2:5}"),
        ("10", r"\boxed{4:10}"),
        ("10", "It leaves at 4:10"),
        ("2021", "It was on April 9 or so"),
    ],
    "equations": [
        ("6", r"\boxed{3=6}"),
        ("6", r"\boxed{x=3=6}"),
        ("6", r"\boxed{x>6}"),
        ("x=6", r"\boxed{y=6}"),
        ("y=3x+1", r"\boxed{y=3x-1}"),
    ],
    "words": [
        (r"\text{Mira}", r"\boxed{\text{Rami}}"),
        ("Evelyn", r"\boxed{Lyneve}"),
        ("April 9, 2021", "April 8, 2021"),
        ("Route 66", r"\boxed{66}"),
        ("no solution", r"\boxed{0}"),
        ("0", "I do not know"),
    ],
    "where the answer stands": [
        ("24", ""),
        ("24", r"\boxed{}"),
        ("24", r"\boxed{24} and so \boxed{}"),
        ("24", r"\boxed{24} and so \boxed{2"),
        ("24", r"\boxed{\frac{24"),
        ("24", r"\boxed{23} or rather 24. The answer is 24"),
        ("24", "#### 23\n24"),
        ("24", "The answer is 23. 24"),
        ("2ab+3", "3"),
    ],
}  # fmt: skip


def scores(rows):
    answers, completions = zip(*rows, strict=True)
    return math_answer(completions, answer=answers).values


@pytest.mark.parametrize("kind", RIGHT)
def test_what_makes_no_difference(kind):
    values = scores(RIGHT[kind])
    assert [row for row, value in zip(RIGHT[kind], values, strict=True) if value != 1.0] == []


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong(kind):
    values = scores(WRONG[kind])
    assert [row for row, value in zip(WRONG[kind], values, strict=True) if value != 0.0] == []


@pytest.mark.parametrize("kind", RIGHT)
def test_both_sides_are_read_by_the_same_rule(kind):
    """What a completion may look like, the data's answer may look like: each reading equals itself."""
    texts = [text for row in RIGHT[kind] for text in row]
    assert set(math_answer(texts, answer=texts).values) == {1.0}


@pytest.mark.parametrize(
    ("completion", "right", "value"),
    [
        ("The answer is 18.", "#### 18", 1.0),
        (r"so \boxed{\frac{36}{2}}", "18", 1.0),
        ("#### 70,000", "#### 70000", 1.0),
        ("#### $18.00", "#### 18", 1.0),
        ("18 apples, no: #### 17", "#### 18", 0.0),
        ("0.3333", r"\frac{1}{3}", 0.0),
        ("", "#### 18", 0.0),
        ("I do not know", "#### 18", 0.0),
    ],
)
def test_by_hand(completion, right, value):
    assert math_answer([completion], answer=[right]).values == (value,)


def test_the_final_part():
    assert final_part("3+4=7 #### 7 \n") == "7" and final_part("#### 1 #### 2") == "2"
    assert final_part("seven") == "seven"
    assert final_part(r"\boxed{\frac{1}{\{2\}}} #### 3") == r"\frac{1}{\{2\}}", "an escaped brace is none"
    assert final_part("so x = 5 and then 3/4 of it") == "3/4"
    assert final_part("$a$ is 3, so $b=4$ follows") == "b=4"


@pytest.mark.parametrize("text", [
    " " * 100_000, "1," * 50_000, r"\(" * 50_000, r"\boxed{" * 20_000, r"\boxed{" + "{" * 50_000, "answer is " * 20_000,
    r"\boxed{" + r"\text{a}" * 250 + "}", r"\boxed{" + r"\frac" * 390 + "}", r"\boxed{" + "{(" * 400 + ")}" * 400 + "}",
], ids=range(9))  # fmt: skip
def test_reading_takes_no_longer_than_the_text_is(text):
    """A quadratic pattern would take minutes; the words are read in this process, where nothing stops them."""
    assert read_answer(text).latex != "18" and math_answer([text], answer=["18"]).values == (0.0,)


@pytest.mark.slow
def test_every_solution_of_math_is_right_and_its_neighbour_s_is_not(shared_data):
    with open(shared_data / "math500.half.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    solutions, answers = [row["solution"] for row in rows], [row["answer"] for row in rows]
    assert len(rows) == 250 and sum(math_answer(solutions, answer=answers).values) == 250
    assert sum(math_answer(answers, answer=answers).values) == 250, "the bare answers, too"
    shifted = answers[1:] + answers[:1]
    # No two neighbours are equal and spelled in two ways: the answers were read one by one.
    equal = [float(a == b) for a, b in zip(answers, shifted, strict=True)]
    assert list(math_answer(solutions[1:] + solutions[:1], answer=answers).values) == equal and sum(equal) == 2


def test_gsm8k_answers_are_right_and_shifted_ones_are_not(shared_data):
    from rlhf_ray.data.rows import read_rows

    answers = [row.fields["answer"] for row in read_rows(str(shared_data / "gsm8k.test.jsonl"))]
    assert len(answers) == 600
    assert sum(math_answer(answers, answer=answers).values) == 600
    shifted = answers[1:] + answers[:1]
    equal = [float(final_part(a) == final_part(b)) for a, b in zip(answers, shifted, strict=True)]
    assert list(math_answer(shifted, answer=answers).values) == equal and sum(equal) < 10


def test_an_answer_that_cannot_be_checked_in_time_is_wrong_and_the_next_one_is_checked():
    """Also outside the main thread, where signals, math-verify's own time limits, do not exist."""
    found = {}

    def score():
        towers = ["$9^{9^{9^{9^9}}}$", "#### 36/2"]
        found["values"] = math_answer(towers, answer=["18", "18"], seconds=0.5).values

    thread = threading.Thread(target=score)
    started = time.monotonic()
    thread.start()
    thread.join()
    assert found["values"][0] == 0.0 and time.monotonic() - started < 30, "60 times its limit"
    assert math_answer(["#### 36/2"], answer=["18"]).values == (1.0,)


def test_an_unreadable_answer_in_the_data_is_a_failure_of_its_row():
    outcome = math_answer(["1", "2"], answer=[r"so it is \boxed{}", "2"])
    assert outcome.values == (None, 1.0)
    assert r"cannot read the data's own answer 'so it is \\boxed{}'" in outcome.failures[0].what
    explained = "see the book: it is on the page with the picture of the two goats on a hill"
    rewards = RewardSet([load_reward("math", policy=FailurePolicy("drop_group"))]).score(
        ["a", "a", "b"], ["1", "1", "2"], [[1]] * 3, [{"answer": explained}, {"answer": "1"}, {"answer": "2"}]
    )
    assert rewards.keep == [False, False, True] and rewards.by_function["math"][1:] == [1.0, 1.0]


def test_a_row_without_an_answer_is_another_function_s():
    outcome = math_answer(["None", "2"], answer=[None, "2"])
    assert outcome.values == (None, 1.0) and not outcome.failures


def test_a_missing_column_is_explained():
    with pytest.raises(ConfigError, match="no column 'answer', only solution; set args.column"):
        math_answer(["1"], solution=["1"])
    assert math_answer(["1"], column="solution", solution=["1"]).values == (1.0,)
