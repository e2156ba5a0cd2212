"""Programs from a stranger are tested without harm: whatever they do, they pass only by returning what tests expect."""

import os
import socket
import subprocess
import sys

import pytest

from qlora_jax.sandbox.programs import Limits, Program, ProgramOutcome
from qlora_jax.sandbox.runner import run_programs, seal_problem
from tests.marks import SLOW
from tests.sandbox.hostile_programs import HARMLESS, HOSTILE
from tests.sandbox.kernel import landlock_version, needs_seal

TEST = "def check(candidate):\n    assert candidate() == 1\n"
SMALL = Limits(seconds=1, memory=192 << 20, waiting_seconds=4)
ALWAYS = (
    "fork",
    "one large array",
    "file",
    "the parent's environment",
    "connection",
    "signal to the parent",
    "early exit",
    "equal to everything",
    "another check",
    "the answer, found in memory",
    "forged outcome",
    "endless message",
)


def program(source: str, test: str = TEST) -> Program:
    return Program(source=source, entry_point="f", setup="", test=test)


def try_one(source: str, test: str = TEST, **how) -> ProgramOutcome:
    (outcome,) = run_programs([program(source, test)], SMALL, **how)
    return outcome


def attack(names, folder, port) -> dict[str, ProgramOutcome]:
    sources = [HOSTILE[name][0].format(folder=folder, port=port) for name in names]
    return dict(zip(names, run_programs([program(source) for source in sources], SMALL), strict=True))


@needs_seal
@pytest.mark.parametrize(
    "names",
    [ALWAYS, pytest.param([name for name in HOSTILE if name not in ALWAYS], marks=SLOW)],
    ids=["a few", "all others"],
)
def test_hostile_programs_fail_and_change_nothing(names, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "key-123")
    (tmp_path / "mine").write_text("mine")
    mode = (tmp_path / "mine").stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        outcomes = attack(names, tmp_path, server.getsockname()[1])
        with pytest.raises(BlockingIOError):
            server.accept()
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome.reason not in HOSTILE[name][1]}
    assert not wrong
    assert (tmp_path / "mine").read_text() == "mine" and (tmp_path / "mine").stat().st_mode == mode
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@needs_seal
def test_programs_that_are_right_pass(monkeypatch):
    monkeypatch.setenv("SECRET", "key-123")
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(descriptor, True)
    outcomes = run_programs([program(source) for source in HARMLESS.values()], SMALL)
    os.close(descriptor)
    assert {name: one for name, one in zip(HARMLESS, outcomes, strict=True) if not one.passed} == {}


@needs_seal
def test_this_system_can_seal_a_process():
    assert seal_problem() is None


@needs_seal
def test_tests_see_values_and_exceptions():
    source = (
        "def f(*numbers, scale=1):\n    if not numbers: raise ValueError('no number')\n"
        "    return {'sum': scale * sum(numbers), 'all': (numbers, {1.5, 2}), 'big': 10 ** 5000}"
    )
    test = (
        "def check(candidate):\n"
        "    assert candidate(1, 2, scale=3) == {'sum': 9, 'all': ((1, 2), {1.5, 2}), 'big': 10 ** 5000}\n"
        "    try: candidate()\n    except ValueError as error: assert str(error) == 'no number'\n"
        "    else: assert False\n"
    )
    assert try_one(source, test) == ProgramOutcome("passed")
    assert try_one(source, test.replace("9", "8")).reason == "wrong"
    assert try_one("def f(): raise TypeError('a')") == ProgramOutcome("error", "TypeError: a")
    assert try_one("def f(): assert False, 'own'") == ProgramOutcome("error", "RuntimeError: AssertionError: own")
    assert try_one("def f(): return lambda: 1") == ProgramOutcome(
        "error", "TypeError: a value of type function cannot leave the process"
    )


@needs_seal
def test_outcomes_are_in_order_and_one_program_leaves_the_next_alone():
    sources = ["def f(): return 1", "import builtins\nbuiltins.x = 1\ndef f(): return x", "def f(): return x"] * 3
    outcomes = run_programs([program(source) for source in sources], SMALL)
    assert [outcome.reason for outcome in outcomes] == ["passed", "passed", "error"] * 3
    assert run_programs([], SMALL) == []


@pytest.mark.slow
def test_limits_hold_without_a_seal(tmp_path):
    sources = {
        "passed": "def f(): return 1",
        "time": "def f():\n    while True: pass",
        "memory": "def f(): return len(bytearray(1 << 40))",
        "ended": "import os\nos._exit(0)",
        "wrong": f"def f(): open({str(tmp_path / 'written')!r}, 'w').write('x')",
        "error": f"def f(): open({str(tmp_path / 'large')!r}, 'w').write('x' * (2 << 20))",
    }
    outcomes = run_programs([program(source) for source in sources.values()], SMALL, sealed=False)
    assert [outcome.reason for outcome in outcomes] == [*sources]
    assert (tmp_path / "written").read_text() == "x"


@needs_seal
def test_nothing_is_left_running():
    before = _children()
    with pytest.raises(TypeError):
        run_programs([program("def f(): return 1"), object()], SMALL)  # pyright: ignore[reportArgumentType]
    assert _children() == before


def _children() -> set[str]:
    """The processes that this one started."""
    return {pid for task in os.listdir("/proc/self/task") for pid in _read(f"/proc/self/task/{task}/children").split()}


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("worker.seal = lambda folders: None", "a sealed process can open a socket"),
        ("landlock_seccomp._restrict_files = lambda *_: None", "a sealed process can write a file"),
        ("landlock_seccomp._CREATE_RULESET = 9999", "the kernel refuses Landlock (Function not implemented)"),
        (
            "landlock_seccomp.platform.machine = lambda: 'riscv64'",
            "a processor of x86_64, aarch64 is required (found riscv64)",
        ),
        ("sys.platform = 'darwin'", "Linux is required (found darwin)"),
    ],
)
def test_a_seal_that_does_not_hold_is_found(change, problem, tmp_path):
    imports = "import sys\nfrom qlora_jax.sandbox import landlock_seccomp, worker"
    code = f"{imports}\n{change}\nprint(worker.find_problem(sys.argv[1]))"
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    if landlock_version() > 0 or "required" in problem:
        assert found.stdout.strip() == problem
