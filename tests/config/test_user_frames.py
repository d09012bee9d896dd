"""A reward that raises shows where in the user's own file, and nothing of anybody else's."""

from __future__ import annotations

import json
import re
import threading

import pytest

from rlhf_ray.config.user_frames import frames_of_users
from rlhf_ray.errors import ConfigError, RewardError
from rlhf_ray.rewards.compose import RewardSet, load_reward
from rlhf_ray.rewards.server import RewardServer

FILE = """
import json

PRICES = {"tea": 2}

def price(text):
    return PRICES[text.strip()]

def by_price(completions, **_):
    return [float(price(text)) for text in completions]

async def later(completions, **_):
    return by_price(completions)

def by_library(completions, **_):
    return [json.loads(text) for text in completions]

def without_end(completions, **_):
    return without_end(completions)

def mistaken(completions, **_):
    return [price() for _ in completions]

def reworded(completions, **_):
    try:
        return by_price(completions)
    except KeyError as error:
        raise ValueError("no price") from error

def mistaken_while_handling(completions, **_):
    try:
        return by_price(completions)
    except KeyError:
        return [nobody]

def hidden(completions, **_):
    try:
        return by_price(completions)
    except KeyError:
        raise ValueError("no price") from None

def around(completions, **_):
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first

class Several(Exception):
    # As asyncio's ExceptionGroup, which Python 3.10 does not have.
    def __init__(self, exceptions):
        super().__init__(f"{len(exceptions)} went wrong")
        self.exceptions = exceptions

def in_a_group(completions, **_):
    found = []
    for text in [*completions, "soup"]:
        try:
            price(text)
        except KeyError as error:
            found.append(error)
    raise Several(found)

def in_a_pool(completions, **_):
    import multiprocessing
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.map(price, completions)

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return price(solution_str)
"""
LOOKUP = "PRICES[text.strip()]"


@pytest.fixture
def place(tmp_path):
    (tmp_path / "prices.py").write_text(FILE)
    return tmp_path


def message(place, name, **settings):
    reward = load_reward(f"{place}/prices.py:{name}", name="mine", **settings)
    try:
        with pytest.raises(RewardError) as caught:
            RewardSet([reward]).score(["p"], ["coffee"], [[1]], [{}])
    finally:
        reward.close()
    return str(caught.value)


@pytest.mark.parametrize("name, line", [("by_price", 10), ("later", 10), ("compute_score", 68)])
def test_the_lines_of_the_file_the_innermost_last(place, name, line):
    first, *frames = message(place, name).splitlines()
    assert first.startswith("reward 'mine' raised KeyError: 'coffee'; mend the function")
    assert frames[-1] == f"  {place}/prices.py:7 in price: return {LOOKUP}"
    assert frames[-2].startswith(f"  {place}/prices.py:{line} in ")
    assert len(frames) <= 4 and all("prices.py" in frame for frame in frames)


@pytest.mark.slow
def test_also_from_the_process_of_its_own(place):
    assert f"{place}/prices.py:7 in price: return {LOOKUP}" in message(place, "by_price", isolated=True)
    assert f"{place}/prices.py:7 in price: return {LOOKUP}" in message(place, "later", isolated=True)


def told(place, name, **settings):
    """Without the numbers of lines."""
    return re.sub(r"(?m)^  .*/prices.py:\d+ in (\w+|<listcomp>): .*$", r"  \1", message(place, name, **settings))


@pytest.mark.parametrize("name, how", [("reworded", "caused by"), ("mistaken_while_handling", "while handling")])
def test_the_exception_behind_it_is_shown_with_its_own_lines(place, name, how):
    first, _, behind = told(place, name).partition(f"  {how} KeyError: 'coffee'\n")
    assert first.count("KeyError") == 0 and first.endswith(f"  {name}\n")
    assert behind.startswith(f"  {name}\n  by_price\n") and behind.endswith("  price")


def test_an_exception_that_is_hidden_on_purpose_stays_so(place):
    assert told(place, "hidden").splitlines()[1:] == ["  hidden"]


def test_exceptions_that_cause_each_other_come_once(place):
    assert told(place, "around").splitlines()[1:] == ["  around", "  caused by ValueError: second"]


def test_members_of_a_group_are_shown(place):
    assert told(place, "in_a_group").splitlines()[1:] == [
        "  in_a_group", "  in the group KeyError: 'coffee'", "  in_a_group", "  price",
        "  in the group KeyError: 'soup'", "  in_a_group", "  price",
    ]  # fmt: skip


def test_an_async_function_has_nothing_of_ours_behind_its_exception(place):
    assert "no running event loop" not in message(place, "later")


@pytest.mark.slow
def test_lines_that_ran_in_a_pool_of_processes(place):
    assert told(place, "in_a_pool").splitlines()[-2:] == ["  in_a_pool", "  price"]
    assert told(place, "reworded", isolated=True).endswith("  price")


def test_calls_inside_a_library_are_left_out(place):
    _, *frames = message(place, "by_library").splitlines()
    assert [frame.partition(" in ")[0].strip() for frame in frames] == [f"{place}/prices.py:16"] * len(frames)
    assert "json.loads(text)" in frames[-1]


def test_a_recursion_without_end_is_short(place):
    said = message(place, "without_end").splitlines()
    assert len(said) == 7 and "outer calls are not shown" in said[1]


def test_a_mistake_inside_the_function_is_not_a_missing_column(place):
    said = message(place, "mistaken")
    assert "missing 1 required positional argument" in said and "mend the function" in said
    assert "prices.py:22" in said and "the data gives it" not in said


def test_a_file_that_cannot_be_loaded_names_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("def f(completions):\n    return [1.0\n\nx = 3\n")
    (tmp_path / "fails.py").write_text("LIMIT = 1\nRATIO = LIMIT / 0\n")
    with pytest.raises(ConfigError, match=r"SyntaxError(?s:.*)broken\.py:2: return \[1\.0"):
        load_reward(f"{tmp_path}/broken.py:f")
    with pytest.raises(ConfigError, match=r"ZeroDivisionError(?s:.*)fails\.py:2 in <module>: RATIO = LIMIT / 0"):
        load_reward(f"{tmp_path}/fails.py:f")


def test_neither_the_library_s_lines_nor_our_own():
    try:
        json.loads("{")
    except ValueError as error:
        assert [line.partition(":")[0] for line in frames_of_users(error)] == [__file__]
    with pytest.raises(RewardError) as caught:
        RewardSet([load_reward("exact_answer")]).score(["p"], ["c"], [[1]], [{}])
    assert "the data gives it" in str(caught.value) and "\n" not in str(caught.value)


def test_the_lines_travel_over_http(place):
    server = RewardServer(RewardSet([load_reward(f"{place}/prices.py:by_price")]))
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        with pytest.raises(RewardError, match="prices.py:7 in price"):
            RewardSet([load_reward(server.url)]).score(["p"], ["coffee"], [[1]], [{}])
    finally:
        server.close()
        thread.join()
