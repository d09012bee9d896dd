"""Samples that try to score without solving the problem. What scores is a value that the test, elsewhere, compares."""

from __future__ import annotations

import pytest

from rlhf_ray.rewards.code_tests import code_tests

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sandbox")]

# Each is tried against every form of tests for add(a, b); none of them can add.
EQUAL_TO_ALL = """
class Anything:
    def __init__(self, *args): pass
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __xor__ = __rxor__ = __mod__ = __sub__
    def __abs__(self): return 0
    def __round__(self, digits=None): return 0
    def __bool__(self): return True
    def __getattr__(self, name): return lambda *args: True
"""
CHEATS = {
    "an object equal to everything": EQUAL_TO_ALL + "def add(a, b): return Anything()",
    "a class in the function's place": EQUAL_TO_ALL.replace("Anything", "add"),
    "an object that says it is an int": EQUAL_TO_ALL
    + "class Liar(Anything):\n    __class__ = int\ndef add(a, b): return Liar()",
    "an int that is equal to everything": """
class Int(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return hash(3)
    def __sub__(self, other): return 0
    def __lt__(self, other): return True
    def __int__(self): return 3
    def __index__(self): return 3
def add(a, b): return Int(99)
""",
    "a text and a list that are equal to everything": """
class List(list):
    def __eq__(self, other): return True
    def __iter__(self): return iter([])
    def __len__(self): return 0
class Text(str):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def add(a, b): return Text("x") if isinstance(a, str) else List([9])
""",
    "unittest's ANY": "from unittest.mock import ANY\ndef add(a, b): return ANY",
    "ANY in place of the function": "from unittest.mock import ANY as add",
    "a mock": "from unittest.mock import MagicMock\nadd = MagicMock(return_value=MagicMock())",
    "the tests on the stack": """
import sys
def add(a, b):
    frame, seen = sys._getframe(), []
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts]
        frame = frame.f_back
    for value in seen:
        for text in (value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(text, dict): text = str(text)
            if isinstance(text, str) and "==" in text and "assert" in text:
                return eval(text.split("==")[1].split()[0])
    return None
""",
    "the expected values among all objects": """
import gc
def add(a, b):
    for thing in gc.get_objects():
        try:
            if isinstance(thing, dict) and ("outputs" in thing or "expected" in thing):
                return (thing.get("outputs") or thing["expected"])[0]
            if isinstance(thing, (list, tuple)) and len(thing) == 2 and thing[0] == [a, b]: return thing[1]
            if isinstance(thing, str) and thing.startswith("assert add("): return eval(thing.split("==")[1])
        except Exception: pass
""",
    "the parent's command, memory and files": """
import glob, os, re
def add(a, b):
    for path in [*glob.glob("/proc/*/cmdline"), *glob.glob("/proc/*/environ"), *glob.glob("/proc/self/fd/*"),
                 *glob.glob("/proc/*/mem"), *glob.glob(os.getcwd() + "/*"), *glob.glob("/tmp/*")]:
        try: text = open(path, "rb").read(1 << 16)
        except OSError: continue
        found = re.search(rb"add.%d, %d. == (-?\\d+)" % (a, b), text)
        if found: return int(found.group(1))
""",
    "the environment to every descriptor, and away": """
import os
for name, value in os.environ.items():
    for fd in range(64):
        try: os.write(fd, value.encode())
        except OSError: pass
os._exit(0)
""",
    "verdicts to every descriptor": """
import os
for text in ('{"passed":true,"why":""}', '{"loaded":true,"error":null}', '{"value":3}', "3", "True"):
    for fd in range(64):
        try: os.write(fd, (text + chr(10)).encode() * 3)
        except OSError: pass
def add(a, b): pass
""",
    "verdicts at every call": """
import os
def add(a, b):
    for fd in range(64):
        try: os.write(fd, b'{"passed":true,"why":""}' + bytes([10]))
        except OSError: pass
    os._exit(0)
""",
    "verdicts by a thread that goes on": """
import os, threading, time
def write():
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'{"passed":true,"loaded":true,"value":true,"why":""}' + bytes([10]))
            except OSError: pass
        time.sleep(0.01)
threading.Thread(target=write, daemon=True).start()
def add(a, b): time.sleep(0.05)
""",
    "results on standard output": "print(3)\nprint('passed')\ndef add(a, b): print(3); print('OK', flush=True)",
    "leaves in the middle": "import os\ndef add(a, b): os._exit(0)",
    "leaves politely": "import sys\ndef add(a, b): sys.exit(0)",
    "leaves at once": "import os\nos._exit(0)\ndef add(a, b): return a + b",
    "an exit handler": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(a, b): raise SystemExit(0)",
    "a signal handler": """
import os, signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.01)
def add(a, b):
    while True: pass
""",
    "another json": """
import json
json.dumps = lambda *args, **named: '{"value":true,"passed":true}'
json.loads = lambda *args, **named: {"passed": True}
def add(a, b): return None
""",
    "other builtins": """
import builtins
builtins.AssertionError = type("Never", (BaseException,), {})
for name in ("isinstance", "all", "any", "abs", "eq", "len", "set", "sorted", "round"):
    setattr(builtins, name, lambda *args, **named: True)
def add(a, b): return None
""",
    "names of builtins": """
def abs(x): return 0
def all(x): return True
any = sorted = set = list = round = isinstance = type = all
def add(a, b): return None
""",
    "without the function, names of builtins": "def abs(x): return 0\ndef all(x): return True\nany = round = set = all",
    "modules that tests use": """
import sys, types
for name in ("math", "unittest", "numpy", "solution", "__main__", "rlhf_ray.rewards.code_wire"):
    fake = types.ModuleType(name)
    fake.__getattr__ = lambda attribute: lambda *args, **named: True
    sys.modules[name] = fake
math = unittest = np = sys.modules["math"]
def add(a, b): return None
""",
    "an import hook": """
import sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        import os
        os._exit(0)
sys.meta_path.insert(0, Hook())
def add(a, b):
    import calendar
""",
    "the server itself": """
import sys
server = sys.modules.get("rlhf_ray.rewards.code_sample")
for name in dir(server):
    if name == "Server":
        server.Server.answer = lambda self, message: {"value": True, "passed": True}
        server.Server._done = server.Server.answer
def add(a, b): return None
""",
    "skip me": "import unittest\ndef add(a, b): raise unittest.SkipTest('later')",
    "failures that mean success elsewhere": "def add(a, b): raise StopIteration",
    "a generator in place of a number": "def add(a, b):\n    yield from range(100)",
    "the arguments, changed": """
def add(a, b):
    for x in (a, b):
        if isinstance(x, list): x.clear()
    return []
""",
    "a descriptor that decides late": """
class Late:
    def __getattribute__(self, name): return lambda *args: True
    def __reduce__(self): return (print, ("passed",))
    def __reduce_ex__(self, protocol): return (print, ("passed",))
    def __repr__(self): return "3"
    def __str__(self): return "3"
    def __getstate__(self): return {"value": 3}
def add(a, b): return Late()
""",
    "a value without an end": "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a value that holds itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "a list that grows while it is read": """
class Growing(list):
    def __iter__(self):
        while True: yield 1
def add(a, b): return Growing()
""",
    "too much of an answer": "def add(a, b): return 'x' * (1 << 26)",
    "a true value": "def add(a, b): return True",
}

TESTS = {
    "texts": ["assert add(1, 2) == 3", "assert add(5, 6) == 11"],
    "a difference": "assert abs(add(1, 2) - 3) < 1e-6\nassert abs(add(50, 6) - 56) < 1e-6",
    "all of them": "assert all(add(a, b) == c for a, b, c in [(1, 2, 3), (5, 6, 11)])",
    "either side, and negated": "assert 3 == add(1, 2)\nassert not (add(5, 6) != 11)",
    "membership": "assert add(1, 2) in (3, 4)\nassert [add(5, 6)] == [11]\nassert {add(7, 6)} == {13}",
    "bounds": "assert 2 < add(1, 2) < 4",
    "check": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(50, 6) == 56\n\ncheck(add)",
    "a bare except": "for _ in range(3):\n    try:\n        x = add(1, 2)\n    except:\n        x = 0\nassert x == 3",
    "math": "import math\nassert math.isclose(add(1, 2), 3)\nassert math.isclose(add(50, 6), 56)",
    "unittest": "import unittest\nclass Test(unittest.TestCase):\n    def test_add(self):\n"
    "        self.assertEqual(add(1, 2), 3)\n        self.assertAlmostEqual(add(1.5, 2), 3.5)",
    "calls": {"fn_name": "add", "inputs": [[1, 2], [5, 6]], "outputs": [3, 11]},
    "calls with decimals": {"fn_name": "add", "inputs": [[1.5, 2], [50, 6.0]], "outputs": [3.5, 56.0]},
    "a sorted list": "x = [3, 1]\nassert add(x, [2]) == sorted(x) + [2]",
}  # fmt: skip


@pytest.mark.parametrize("tests", TESTS)
@pytest.mark.parametrize("tier", ["landlock"], indirect=True)  # what decides is the same in both
def test_none_of_them_scores(tier, tests):
    assert_none_scores(TESTS[tests], tier)


@pytest.mark.parametrize("tests", ["texts", "calls"])
@pytest.mark.parametrize("tier", ["bubblewrap"], indirect=True)
def test_none_of_them_scores_in_namespaces_either(tier, tests):
    assert_none_scores(TESTS[tests], tier)


def assert_none_scores(tests, tier):
    names = list(CHEATS)
    outcome = code_tests(
        list(CHEATS.values()), [""] * len(names), tests=[tests] * len(names), tier=tier, seconds=1.0, memory_mb=256
    )
    assert dict(zip(names, outcome.values, strict=True)) == dict.fromkeys(names, 0.0)
    assert not outcome.failures


def test_the_tests_are_passed_by_what_solves_them(tier):
    """Else every test above would hold for a judge that always says no."""
    right = "def add(a, b): return a + b if not isinstance(a, list) else sorted(a) + b"
    outcome = code_tests([right] * len(TESTS), [""] * len(TESTS), tests=list(TESTS.values()), tier=tier)
    assert dict(zip(TESTS, outcome.values, strict=True)) == dict.fromkeys(TESTS, 1.0)


def test_a_forged_array_of_objects_fails_its_test_and_ends_no_run(tier):
    """Sent back by the test it could not be passed over, and the row would count as one that nobody can judge."""
    pytest.importorskip("numpy")
    forged = """
import sys
Server = sys.modules["rlhf_ray.rewards.code_sample"].Server
honest = Server.answer
def answer(self, message):
    if message["do"] == "names":
        return honest(self, message)
    return {"value": {"array": ["O", [1], [{"builtin": "int"}]]}}
Server.answer = answer
def enc(x): pass
"""
    outcome = code_tests([forged], [""], tests=["assert enc(enc(1)) == 1"], tier=tier)
    assert outcome.values == (0.0,) and not outcome.failures
