"""Generated code runs shut in, and passes only by returning what the tests ask for."""

import os
import shutil
import socket
import sys
from collections import deque
from datetime import UTC, date, datetime, time
from decimal import Decimal
from fractions import Fraction

import pytest
from reference import REFERENCE, needs_reference, read_lines, read_reference

from finetune.errors import MachineError
from finetune.evaluation.sandbox import programs
from finetune.evaluation.sandbox.exchange import Opaque, pack, unpack
from finetune.evaluation.sandbox.isolation import BUBBLEWRAP
from finetune.evaluation.sandbox.programs import Program, choose_runner, find_sandbox, run_program
from finetune.evaluation.tasks.rules.humaneval import make_program

needs_sandbox = pytest.mark.skipif(sys.platform != "linux" or isinstance(find_sandbox(), str), reason="no sandbox here")

GIVEN = "import math\n\ndef add(a, b):\n"
TESTS = """
def check(candidate):
    assert candidate(1, 2) == 3
    assert candidate(2, 2) == 4

check(add)
"""
# Each returns the right sum only if it gets what it must not get, or tries to pass without it. SECRET, FOLDER and PORT are filled in.
HOSTILE = {
    "exits at once": "    return 0\nimport os\nos._exit(0)\n",
    "exits politely": "    return 0\nimport sys\nsys.exit(0)\n",
    "exits when called": "    import os\n    os._exit(0)\n",
    "raises SystemExit": "    raise SystemExit(0)\n",
    "is equal to everything": "    return type('E', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})()\n",
    "an int that is equal to everything": "    return type('E', (int,), {'__eq__': lambda s, o: True, '__index__': lambda s: 3})(0)\n",
    "a text that is equal to everything": "    return type('E', (str,), {'__eq__': lambda s, o: True})('x')\n",
    "patches the check": "    return 0\ndef check(candidate):\n    return True\n",
    "patches assert": "    return 0\nimport builtins\nbuiltins.AssertionError = KeyboardInterrupt\n__debug = False\n",
    "patches all functions in memory": (
        "    return 0\nimport gc\nfor f in gc.get_objects():\n    if type(f) is type(add) and f.__name__ == 'check':\n"
        "        f.__code__ = (lambda c: True).__code__\n"
    ),
    "prints that it passed": "    print('passed', {'passed': True})\n    return 0\nprint('passed')\n",
    "writes a verdict into every file": (
        '    import os\n    for n in range(1, 64):\n        try:\n            os.write(n, b\'{"passed": true, "reason": "passed"}\\n\')\n'
        "        except OSError:\n            pass\n    return 0\n"
    ),
    "patches the exchange": (
        "    return 0\nimport sys\nm = sys.modules['finetune.evaluation.sandbox.inside']\n"
        "m.pack = lambda v: {'type': 'object', 'value': 'Opaque'}\nm._examine = lambda s: None\n"
    ),
    "ends the tests by an exception": "    raise StopIteration\n",
    "names the exception of the clock": "    raise type('_TimeOut', (BaseException,), {})()\n",
    "kills its parent": "    import os\n    os.kill(os.getppid(), 9)\n    return 0\n",
    "kills everything": "    import os\n    os.kill(-1, 9)\n    return 0\n",
    "kills its group": "    import os\n    os.killpg(0, 9)\n    return 0\n",
    "never ends": "    while True:\n        pass\n",
    "never ends and ignores signals": (
        "    import signal\n    for n in range(1, 64):\n        try:\n            signal.signal(n, signal.SIG_IGN)\n"
        "        except (OSError, ValueError):\n            pass\n    while True:\n        pass\n"
    ),
    "forks for ever": "    import os\n    while True:\n        try:\n            os.fork()\n        except OSError:\n            pass\n",
    "starts many processes": (
        "    import os, time\n    for n in range(100):\n        if os.fork() == 0:\n            time.sleep(9)\n    return a + b\n"
    ),
    "takes memory": "    x = bytearray(4 << 30)\n    return a + b\n",
    "takes memory in files": (
        "    for n in range(20):\n        with open(f'/tmp/{n}', 'wb') as f:\n            f.write(bytes(8 << 20))\n    return a + b\n"
    ),
    "writes a large file": "    open('x', 'wb').write(bytes(32 << 20))\n    return a + b\n",
    "crashes": "    import ctypes\n    ctypes.string_at(0)\n",
    "reads a file of the user": "    open('SECRET').read()\n    return a + b\n",
    "reads it by another program": "    import subprocess\n    subprocess.run(['/bin/cat', 'SECRET'], check=True)\n    return a + b\n",
    "looks into the home folder": "    import os\n    os.listdir(os.path.expanduser('~root') + '/.ssh/..')\n    os.listdir('/home')\n    return a + b\n",
    "reads the environment": "    import os\n    return a + b if os.environ else 0\n",
    "reads the environment of processes": "    open('/proc/self/environ').read()\n    return a + b\n",
    "opens the network": "    import socket\n    socket.create_connection(('127.0.0.1', PORT), 1)\n    return a + b\n",
    "writes outside": "    open('FOLDER/new', 'w').write('x')\n    return a + b\n",
    "writes beside Python": "    import json\n    open(json.__file__ + '.new', 'w').write('x')\n    return a + b\n",
    "deletes": "    import shutil\n    shutil.rmtree('FOLDER')\n    return a + b\n",
    "makes namespaces": "    import ctypes\n    return a + b if ctypes.CDLL(None).unshare(0x10000000) == 0 else 0\n",
    "mounts": "    import ctypes\n    return a + b if ctypes.CDLL(None).mount(b't', b'/tmp', b'tmpfs', 0, None) == 0 else 0\n",
    "changes its user": "    import os\n    os.setuid(0)\n    return a + b if os.getuid() == 0 else 0\n",
    "opens many files": "    f = [open('/dev/null') for n in range(500)]\n    return a + b\n",
}


def make(completion, seconds=1.0, tests=TESTS):
    return Program("", GIVEN, completion, tests, "add", seconds)


@needs_sandbox
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained_and_fail(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    secret = tmp_path / "secret.txt"
    secret.write_text("mine", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = HOSTILE[name].replace("SECRET", str(secret)).replace("FOLDER", str(tmp_path))
        verdict = run_program(make(code.replace("PORT", str(server.getsockname()[1]))))
    assert not verdict.passed, verdict
    assert secret.read_text(encoding="utf-8") == "mine"
    assert os.listdir(tmp_path) == ["secret.txt"]  # noqa: PTH208


def test_thirty_hostile_programs_are_tried():
    assert len(HOSTILE) >= 30


@needs_sandbox
@pytest.mark.parametrize(
    "completion",
    [
        "    return a + b\n",
        "    print('x')\n    open('note', 'w').write('x')\n    return int(open('note').read() == 'x') * (a + b)\n",
    ],
)
def test_a_right_program_passes(completion):
    assert run_program(make(completion, seconds=5.0)).passed


@needs_sandbox
def test_tests_use_names_of_the_given_part_and_see_changed_arguments():
    tests = "values = [3, 1, 2]\nassert add(values, 0) is None\nassert values == [1, 2, 3] and math.pi > 3\n"
    assert run_program(make("    a.sort()\n", 5.0, tests)).passed
    assert run_program(make("    raise KeyError(a)\n", 5.0, "try:\n    add(1, 2)\nexcept KeyError:\n    pass\n")).passed
    assert not run_program(make("    a = sorted(a)\n", 5.0, tests)).passed


@needs_sandbox
@needs_reference
def test_verdicts_are_those_of_code_eval():
    """Every kind of hand-made output once; the whole comparison of 160 is in benchmarks/evaluation.py."""
    rows = {row["task_id"]: row for row in read_lines(REFERENCE / "data" / "humaneval_eval.jsonl")}
    seen = set()
    for reference in read_reference("harness/humaneval_20_samples.json")["rows"]:
        for sample in reference["samples"]:
            if reference["task_id"] in rows and (sample["kind"], sample["passed"]) not in seen:
                seen.add((sample["kind"], sample["passed"]))
                program = make_program(rows[reference["task_id"]], sample["after_stop_strings"], 2.0)
                assert run_program(program).passed == sample["passed"], sample
    assert len(seen) > 10


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(10**400),
        0.1,
        float("inf"),
        "é\ud800",
        2 + 3j,
        b"\0x",
        [1, (2, {3: {4}})],
        frozenset({1}),
        range(3),
        {},
        deque([1, (2,)]),
        Decimal("-1.50"),
        Fraction(-7, 3),
        datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
        date(2024, 2, 29),
        time(1, 2, 3),
        {1: "a"}.keys(),
        {1: "a"}.items(),
    ],
)
def test_plain_values_cross_unchanged(value):
    assert unpack(pack(value)) == value
    assert type(unpack(pack(value))) is type(value)


def test_other_values_lose_their_methods():
    equal = type("Equal", (list,), {"__eq__": lambda self, other: True, "__iter__": lambda self: iter([1])})
    assert unpack(pack(equal([7]))) == [7]
    assert isinstance(unpack(pack(object())), Opaque)
    assert list(unpack(pack(n for n in (1, 2)))) == [1, 2]
    values = unpack(pack({1: "a", 2: "a"}.values()))
    assert (list(values), type(values)) == (["a", "a"], type({}.values()))
    for bad in (
        {"type": "int", "value": "x"},
        {"type": "dict", "value": [[1]]},
        [1],
        {"type": "set", "value": [[]]},
        {"type": "Decimal", "value": "x"},
        {"type": "Fraction", "value": ["0x1", "0x0"]},
        "x",
    ):
        with pytest.raises(ValueError):
            unpack(bad)


def test_without_a_sandbox_the_task_refuses(monkeypatch):
    monkeypatch.setattr(programs, "find_sandbox", lambda: "user namespaces: unshare: Operation not permitted")
    with pytest.raises(MachineError, match=r"no sandbox .*Operation not permitted.*bubblewrap.*--unsafe-code"):
        choose_runner()
    assert choose_runner(is_unsafe=True)(make("    return a + b\n", 5.0)).passed


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
@pytest.mark.parametrize("name", HOSTILE)
def test_bubblewrap_contains_hostile_programs_too(name, tmp_path):
    (tmp_path / "secret.txt").write_text("mine", encoding="utf-8")
    code = HOSTILE[name].replace("SECRET", str(tmp_path / "secret.txt")).replace("FOLDER", str(tmp_path))
    if os.getuid() == 0 and name == "starts many processes":
        pytest.skip("limits on processes do not bind root")
    assert not run_program(make(code.replace("PORT", "9")), BUBBLEWRAP).passed
    assert os.listdir(tmp_path) == ["secret.txt"]  # noqa: PTH208


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_bubblewrap_lets_a_right_program_pass():
    assert run_program(make("    open('note', 'w').write('x')\n    return a + b\n", 5.0), BUBBLEWRAP).passed
