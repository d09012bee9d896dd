r"""The math reward on Chinese answers, angles, logarithms, repeating decimals and unions; see test_math_answer.py."""

from __future__ import annotations

import pytest

from rlhf_ray.rewards.math_answer import math_answer
from rlhf_ray.rewards.math_reading import Answer, read_answer

RIGHT = {  # kind -> (the data's answer, completion)
    "Chinese": [
        ("24", "答案为２４。"),
        ("24", "答案应是24，因为每人有3个。"),
        ("24", "答：他一共有24个苹果。"),
        ("24个", "答案：24"),
        ("3.5米", r"\boxed{3.5\text{ m}}"),
        ("3.5米", "所以绳子长3.5米。"),
        ("20平方厘米", r"\boxed{20\text{ cm}^2}"),
        ("60千米/小时", "60 km/h"),
        ("2小时", "The answer is 2 hours."),
        ("41元", "一共要付41块钱。"),
        ("1.2万元", "12000元"),
        ("12000", r"\boxed{1.2\text{万}}"),
        ("3000000", "答案是300万"),
        ("5亿", r"\boxed{5\times 10^8}"),
        (r"25\%", "增长了百分之25"),
        (r"25\%", "答案是25％"),
        ("36", "所以，答案为：36"),
        ("36", "答案是： 36 个。"),
        ("36", "答案爲36"),
        ("36", "答案是36，所以每人有9个。"),
        ("36", "答案是$36$，即6的平方。"),
        ("36", "答案是36，而不是38。"),
        ("36", "答案是“36”。"),
        ("36", "答案是36？"),
        ("36", "Answer：36"),
        ("小明", "答案是：【小明】"),
        ("B", "故选：B"),
        ("B", "正确选项是B，其余都错。"),
        ("B", "因此正确答案是选项B。"),
        (r"\text{(C)}", "因此应选择（C）。"),
        ("C", "【答案】C"),
        ("C", "所以答案是C选项。"),
        ("BD", "故选：BD．"),
        (r"\frac{2}{3}", "【答案】$\\frac{2}{3}$\n【解析】由 $x=7$ 可得。"),
        (r"14\text{ cm}", r"\boxed{\text{14厘米}}"),
        (r"14\text{ cm}", r"\boxed{\text{14 cm}}"),
        ("2小时40分钟", "一共要2小时40分钟。"),
        ("2023年3月8日", r"\boxed{2023年3月8日}"),
        ("31", "정답은 31입니다."),
    ],
    "angles, logarithms, repeating decimals, unions": [
        (r"30^\circ", r"\boxed{\angle A = 30^\circ}"),
        ("60", r"\boxed{m\angle ABC = 60^\circ}"),
        (r"\log_2 8", r"\boxed{3}"),
        (r"\frac16", r"\boxed{0.1\overline{6}}"),
        (r"(-\infty,-1) \cup (1,\infty)", r"\boxed{x < -1 \text{ or } x > 1}"),
        (r"x \le -1 \text{ or } 2 \le x < 3", r"\boxed{[2,3) \cup (-\infty,-1]}"),
        (r"5\text{ hours}", r"\boxed{5 h}"),
        (r"5\text{ m}^2", r"\boxed{5 m^2}"),
    ],
}

WRONG = {
    "Chinese": [
        ("24", "答案不是24。"),
        ("24", "答案是23或24"),
        ("24", "答案是23，不是24"),
        ("24", "答：他先有24个，答案是23"),
        ("24", "答案是：23，所以不是24"),
        ("24", "答案是“23”，而不是“24”。"),
        ("A", "正确选项是B，不是A。"),
        ("24", "24万"),
        ("1.2", "一共1.2万元"),
        ("1.2万", "1.2亿"),
        ("3000000", "3000万"),
        ("3.5米", "所以绳子长3.5厘米。"),
        ("20平方米", "20立方米"),
        ("20平方米", "20米"),
        ("60千米/小时", "60米/秒"),
        ("2小时", "2分钟"),
        ("41元", "41度"),
        (r"25\%", "百分之2.5"),
        ("B", "故选：A"),
        ("B", "答案是A，不选B"),
        ("A", "选项A不对"),
        ("C", "【答案】D"),
        ("BD", "故选：BC．"),
        (r"14\text{ cm}", r"\boxed{\text{14米}}"),
        ("2小时40分钟", "一共要3小时40分钟。"),
        ("2023年3月8日", "答案是2023年4月8日。"),
        ("31", "정답은 13입니다."),
    ],
    "angles, logarithms, repeating decimals, unions": [
        (r"30^\circ", r"\boxed{\angle A = 60^\circ}"),
        (r"\log_2 9", r"\boxed{3}"),
        (r"\frac16", r"\boxed{0.\overline{16}}"),
        (r"(-\infty,-1) \cup (1,\infty)", r"\boxed{x \le -1 \text{ or } x > 1}"),
        (r"(-\infty,-1) \cup (1,\infty)", r"\boxed{x < -1}"),
        (r"(-\infty,-1) \cup (1,\infty)", r"\boxed{-1, 1}"),
        (r"5\text{ hours}", r"\boxed{5 m}"),
        (r"5\text{ m}^2", r"\boxed{5 m}"),
        ("5", r"\boxed{5 h}"),
    ],
}


def scores(rows):
    answers, completions = zip(*rows, strict=True)
    return math_answer(completions, answer=answers).values


@pytest.mark.parametrize("kind", RIGHT)
def test_what_makes_no_difference(kind):
    values = scores(RIGHT[kind])
    assert [row for row, value in zip(RIGHT[kind], values, strict=True) if value != 1.0] == []
    swapped = scores([(given, right) for right, given in RIGHT[kind]])
    assert set(swapped) == {1.0}, "both sides are read by the same rule"


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong(kind):
    values = scores(WRONG[kind])
    assert [row for row, value in zip(WRONG[kind], values, strict=True) if value != 0.0] == []


@pytest.mark.parametrize(("text", "answer"), [
    ("一共1.25万元", Answer("12500", "yuan")), ("3千万", Answer("30000000")), ("0.5平方米", Answer("0.5", "m2")),
    ("12个", Answer("12")), ("百分之12.5", Answer("12.5", "percent")), ("5支", Answer("5", "支")),
    (r"2.0\overline{45}", Answer(r"\frac{45}{22}")),
])  # fmt: skip
def test_what_is_read(text, answer):
    assert read_answer(text) == answer
