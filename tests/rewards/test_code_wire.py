"""Values on their way between the test's process and the sample's: they arrive as they were, and changes find back."""

from __future__ import annotations

import json
import random
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from zoneinfo import ZoneInfo, available_timezones

import numpy
import pytest

from rlhf_ray.rewards.code_seeds import Seeds
from rlhf_ray.rewards.code_tests import code_tests
from rlhf_ray.rewards.code_wire import Decoder, Encoder, Unsendable


def refused(value):
    raise Unsendable(str(value))


def over(value):
    return Decoder(refused).decode(json.loads(json.dumps(Encoder(refused).encode(value))))


@pytest.mark.parametrize("value", [
    None, True, 1 << 80, 2.5, "a", b"\x00", 1 + 2j, (1, (2,)), [1, [2]], {1, 2}, frozenset({3, 4}),
    {(1, 2): [3], None: 4},
    range(1, 9, 2), Fraction(1, 3), Decimal("0.10"), date(2020, 2, 29), time(1, 2, 3, 4), timedelta(days=-1, seconds=5),
    datetime(2020, 1, 2, 3), deque([1, 2], maxlen=2), Counter("aab"), OrderedDict(b=1, a=[2]), bytearray(b"x"),
], ids=repr)  # fmt: skip
def test_plain_data_arrives_as_it_was(value):
    assert over(value) == value and type(over(value)) is type(value)


def test_times_keep_their_zone():
    for zone in (UTC, timezone(timedelta(hours=-3)), timezone(timedelta(hours=1), "here")):
        given = datetime(2020, 1, 2, 3, 4, 5, 6, tzinfo=zone)
        assert over(given) == given and over(given).tzinfo == zone and over(given).tzname() == given.tzname()
    assert over(time(3, tzinfo=UTC)) == time(3, tzinfo=UTC) != time(3)


@pytest.mark.skipif("Asia/Tokyo" not in available_timezones(), reason="the machine has no table of time zones")
def test_a_named_zone_keeps_its_name():
    got = over(datetime(2020, 1, 2, 9, tzinfo=ZoneInfo("Asia/Tokyo")))
    assert got == datetime(2020, 1, 2, tzinfo=UTC) and got.tzinfo.key == "Asia/Tokyo"


def test_a_zone_of_another_s_making_arrives_as_its_distance_from_utc():
    class Plus2(tzinfo):
        def utcoffset(self, when):
            return timedelta(hours=2)

        def tzname(self, when):
            return "two later"

    got = over(datetime(2020, 1, 2, tzinfo=Plus2()))
    assert got == datetime(2020, 1, 1, 22, tzinfo=UTC) and got.tzname() == "two later"


def test_a_dict_with_a_default_keeps_it_where_it_can_be_told():
    def told(value):
        return {"builtin": value.__name__}

    given = Encoder(told).encode(defaultdict(list, a=[1]))
    got = Decoder(lambda given: {"list": list}[given["builtin"]]).decode(given)
    assert got == {"a": [1]} and got["new"] == []


def test_one_object_met_twice_is_one_object_there():
    row, array = [1], numpy.zeros(2)
    got = over([row, row, array, (array, deque([row]))])
    assert got[0] is got[1] is got[3][1][0] and got[2] is got[3][0]


@pytest.mark.parametrize(("value", "change"), [
    ([3, 1], lambda x: x.sort()), ({"a": [1]}, lambda x: x["a"].append(2)), ({1, 2}, lambda x: x.add(3)),
    (deque([1, 2, 3]), lambda x: x.rotate(1)), (Counter("a"), lambda x: x.update("ab")),
    (OrderedDict(a=1, b=2), lambda x: x.move_to_end("a")), (bytearray(b"x"), lambda x: x.extend(b"y")),
], ids=lambda given: type(given).__name__)  # fmt: skip
def test_changes_are_written_into_the_other_s_object(value, change):
    ours, theirs = Encoder(refused), Decoder(refused)
    change(theirs.decode(ours.encode(value)))
    back = Encoder(refused, theirs.containers)
    decoder = Decoder(refused)
    decoder.containers = ours.containers
    for place, container in enumerate(ours.containers):
        decoder.fill(container, back.contents(theirs.containers[place]))
    assert value == theirs.containers[0] and list(value) == list(theirs.containers[0])


def test_a_change_of_an_array_reaches_the_one_it_is_a_view_of():
    table = numpy.array([[1, 2], [3, 4]])
    row = table[1]
    Decoder(refused).fill(row, Encoder(refused).contents(numpy.array([7, 8])))
    assert table.tolist() == [[1, 2], [7, 8]]
    with pytest.raises(ValueError, match="not plain data"):
        Decoder(refused).decode({"array": ["O", [1], [1]]})


def test_a_seed_is_told_once_and_not_where_the_test_has_drawn_since(monkeypatch):
    monkeypatch.setattr(random, "seed", random.seed)  # undone afterwards
    state = random.getstate()
    seeds = Seeds()
    seeds.watch("random")
    random.seed(5)
    assert seeds.take() == {"random": [[5], {}]} and seeds.take() == {}
    random.seed(a=6)
    random.random()
    assert seeds.take() == {}, "from the state one could compute what was drawn"
    random.seed(7)
    random.seed()
    assert seeds.take() == {}
    random.setstate(state)


IN_A_SANDBOX = {  # test -> a sample that is right
    "import numpy as np\nx = np.array([1, 2])\nf(x)\nassert x.tolist() == [2, 4]": "def f(x): x *= 2",
    "import numpy as np\nx = np.array([1, 2])\nassert f(x) == 3\nassert x.tolist() == [0, 0]":
        "def f(x):\n    s = int(x.sum())\n    x[:] = 0\n    return s",
    "from collections import defaultdict\nd = defaultdict(list)\nf(d)\nassert d == {'a': [1]}":
        "def f(d): d['a'].append(1)",
    "from datetime import datetime, timezone\nassert f(2020) == datetime(2020, 1, 2, tzinfo=timezone.utc)":
        "from datetime import *\ndef f(y): return datetime(y, 1, 2, 3, tzinfo=timezone(timedelta(hours=3)))",
    "import random\nrandom.seed(3)\nwant = [random.random() for _ in range(3)]\nrandom.seed(3)\nassert f(3) == want":
        "import random\ndef f(n): return [random.random() for _ in range(n)]",
    "import random, unittest\nclass T(unittest.TestCase):\n    def setUp(self): random.seed(42)\n"
    "    def test(self): self.assertAlmostEqual(f(), 0.6394267984578837)":
        "import random\ndef f(): return random.random()",
    "import numpy as np\nnp.random.seed(0)\nassert abs(f() - 0.5488135039273248) < 1e-12":
        "import numpy\ndef f(): return numpy.random.rand()",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.xdist_group("sandbox")
def test_across_two_processes(tier):
    naive = "from datetime import datetime\ndef f(y): return datetime(y, 1, 2)"
    texts, samples = [*IN_A_SANDBOX, list(IN_A_SANDBOX)[3]], [*IN_A_SANDBOX.values(), naive]
    outcome = code_tests(samples, [""] * len(texts), tests=texts, tier=tier)
    assert outcome.values == (*[1.0] * len(IN_A_SANDBOX), 0.0) and not outcome.failures
