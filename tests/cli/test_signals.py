"""A signal ends a verb also where Python drops its exception, or a library turns it into an error of its own."""

import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from finetune.cli import main as main_module
from finetune.cli.main import main

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")


class Thing:
    """Something with a callback at its end."""


@pytest.fixture
def run(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # A shell's background job, in which tests may run, ignores Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run_verb(work):
        class Parser:
            def parse_args(self, argv):
                return type("Arguments", (), {"verb": "train", "run": staticmethod(lambda arguments: work())})()

        monkeypatch.setattr(main_module, "make_parser", Parser)
        with pytest.raises(SystemExit) as left:
            main([])
        return left.value.code

    yield run_verb
    for number, handler in before.items():
        signal.signal(number, handler)


def work_on():
    """Work for five seconds, as a run does that no signal ends."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        time.sleep(0.01)
    return 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_whose_exception_is_dropped_is_sent_again(run, capsys, number, status):
    """Ctrl-C in the middle of a sweep was lost in 6 of 10 tries, with "Exception ignored in", and the sweep went on for hours."""
    hook = sys.unraisablehook

    def work():
        thing = Thing()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(number))
        del thing
        assert kept() is None
        return work_on()

    assert run(work) == status
    assert "Traceback" not in capsys.readouterr().err
    assert sys.unraisablehook == hook
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_that_a_library_makes_of_a_signal_is_no_bug(run, capsys):
    """matplotlib's C++ part raised a TypeError about arguments, which ended in a traceback."""

    def work():
        try:
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise TypeError("incompatible function arguments") from None

    assert run(work) == 130
    assert capsys.readouterr().err == "finetune train: interrupted\n"


def test_another_error_keeps_its_traceback(monkeypatch, run):
    def work():
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        run(work)


ENDING = """
import atexit, sys, threading, time
from finetune.cli import main

class Held:
    def __del__(self):
        print("taken apart")

held = Held()
verb = main.main

def run():
    atexit.register(lambda: print("cleaned up"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("the thread has ended"))).start()
    verb()

main.main = run
sys.argv = ["finetune", *{words}]
main.enter()
"""


@pytest.mark.parametrize(("words", "status"), [(["recipes"], 0), (["plan", "no-such-recipe"], 2)])
def test_a_process_ends_when_its_work_is_done_without_taking_apart_what_it_has_loaded(words, status):
    """With torch that took half a second after the result was there."""
    ended = subprocess.run([sys.executable, "-c", ENDING.format(words=words)], capture_output=True, text=True)
    assert ended.returncode == status, ended.stderr
    lines = ended.stdout.splitlines()
    assert "the thread has ended" in lines
    assert lines[-1] == "cleaned up"


def test_a_bug_keeps_its_traceback_and_status(tmp_path):
    code = "from finetune.cli import main\nmain.main = lambda: 1 / 0\nmain.enter()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, "ZeroDivisionError: division by zero")


FULL = "standard output, or a file that was being written: No space left on device\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        ("recipes > /dev/full", 2, f"finetune recipes: {FULL}"),
        ("--version > /dev/full", 2, f"finetune: {FULL}"),
        ("recipes >&-", 0, ""),
        ("recipes | true", 0, ""),
        ("plan no-such-recipe 2> /dev/full", 2, ""),
        ("plan no-such-recipe >&- 2>&-", 2, ""),
        ("plan no-such-recipe 2>&-", 2, ""),
        ("no-such-verb 2>&- <&-", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_no_bug(line, status, said):
    """A full disk and a closed output ended in a traceback and the status of a bug, also after the work was done.

    With standard error closed, its messages went to standard output.
    """
    shell = f"set -o pipefail; {shlex.quote(sys.executable)} -m finetune {line}"
    ended = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert status != 2 or not ended.stdout


def test_no_file_takes_the_number_of_a_stream_that_is_closed(tmp_path):
    """The first file that was opened got the number 2, and a library's message would have been written into it."""
    code = (
        "import os; from finetune.cli import main\n"
        f"main.main = lambda: print(os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY) > 2)\nmain.enter()"
    )
    ended = subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} 0<&- 2>&-"], stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert ended.stdout == "True\n"


def test_work_goes_on_where_nobody_reads_its_messages(tmp_path):
    """`train … 2>&1 | head -1` ended at its second message: no run was left, and the status was that of success."""
    code = (
        "import sys; from finetune.cli import main\n"
        f"main.main = lambda: [print('message', file=sys.stderr), sys.stderr.flush(), open({str(tmp_path / 'work')!r}, 'w')]\n"
        "main.enter()"
    )
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert (tmp_path / "work").is_file()
    assert ended.stdout == b""
    (tmp_path / "work").unlink()
    with Path(__file__).open("rb") as script:  # open for reading alone, as a script of bash hands it on for `2>&-`
        subprocess.run([sys.executable, "-c", code], stderr=script)
    assert (tmp_path / "work").is_file()
    reading, writing = os.pipe()
    os.close(reading)
    status = subprocess.run([sys.executable, "-m", "finetune", "plan", "no-such"], stderr=writing).returncode
    os.close(writing)
    assert status == 2
