"""Hostile chat templates end with an error that names the template, the conversation and the limit."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qlora_jax.data.tokenizer import chat_template
from qlora_jax.data.tokenizer.chat_template import Rendering, render, start_rendering
from qlora_jax.data.tokenizer.template_pipe import Limits
from qlora_jax.data.tokenizer.template_process import TemplateProcess
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer, with_chat_template
from qlora_jax.sandbox.limits import python_environment
from tests.data.tokenizer.hostile_templates import ENDLESS, REFUSED
from tests.marks import EXHAUSTIVE, SLOW
from tests.sandbox.kernel import needs_seal

ROOT = Path(__file__).parents[3]
USER = {"role": "user", "content": "Hi"}
REACHED = (
    r"^own\.jinja: the chat template (took more than 0\.1 s of processor time|needed more than 192 MiB of memory|"
    r"wrote more than 65,536 characters beyond its own and the conversation's) for a conversation with roles "
    r"\['user'\]\. Set chat_template \(data\.chat_template in training\) to another jinja file\.$"
)
ALWAYS = ("nested range", "repeated text", "text of nested lists")
IN_CI = (
    "doubled text",
    "doubled list",
    "printf width",
    "lipsum",
    "tojson indent",
    "batch",
    "center",
    "recursive macro",
)
MARKED = [pytest.param(name, marks=SLOW if name in IN_CI else EXHAUSTIVE) for name in ENDLESS if name not in ALWAYS]


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[float, TemplateProcess]]:
    """Processes with little memory, by the seconds that a rendering may take."""
    found = {seconds: TemplateProcess(Limits(seconds=seconds, memory=192 << 20)) for seconds in (0.1, 5.0)}
    yield found
    for process in found.values():
        process.stop()


@pytest.fixture
def limited(processes: dict[float, TemplateProcess], monkeypatch: pytest.MonkeyPatch) -> TemplateProcess:
    """Rendering with a small limit of memory, so that it is reached sooner."""
    monkeypatch.setattr(chat_template, "_process", processes[5.0])
    monkeypatch.setattr(chat_template, "_refusals", {})
    return processes[5.0]


def render_all(template: str, chats: Sequence[Rendering], name: str = "own.jinja") -> list[str | ValueError]:
    return [text for (text,) in start_rendering(template, [[chat] for chat in chats], {}, name)()]


def rendered(template: str, count: int = 1) -> list[str | ValueError]:
    return render_all(template, [Rendering([USER])] * count)


@pytest.mark.parametrize("name", [*ALWAYS, *MARKED])
def test_a_template_without_end_is_an_error(
    limited: TemplateProcess, processes: dict[float, TemplateProcess], monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setattr(chat_template, "_process", processes[0.1])
    started = time.monotonic()
    (error,) = rendered(ENDLESS[name])
    assert isinstance(error, ValueError) and re.search(REACHED, str(error)), error
    assert time.monotonic() - started < 5


def test_an_output_beyond_the_limit_is_an_error(limited: TemplateProcess):
    assert rendered("{{ 'a' * 60000 }}") == ["a" * 60_000]
    (error,) = rendered("{{ 'a' * 300000 }}")
    assert isinstance(error, ValueError) and "wrote more than 65,536 characters" in str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_fails_is_an_error(limited: TemplateProcess, name: str):
    template, message = REFUSED[name]
    (error,) = rendered(template)
    assert isinstance(error, ValueError) and re.search(f"^own\\.jinja: .*({message})", str(error)), error
    assert len(str(error)) < 3000


def test_only_the_conversation_at_which_a_limit_is_reached_and_later_ones_are_refused(
    limited: TemplateProcess, monkeypatch: pytest.MonkeyPatch
):
    template = "{{ messages[0].content }}{% if messages[0].content == 'stop' %}{{ 'a' * 9000000000 }}{% endif %}"
    chats = [Rendering([{"role": "user", "content": text}]) for text in ("a", "b", "stop", "c")]
    first, second, reached, later = render_all(template, chats)
    assert (first, second) == ("a", "b")
    assert re.search(REACHED, str(reached)) and str(later) == str(reached)
    with monkeypatch.context() as patch:
        patch.setattr(limited, "submit", pytest.fail)  # a template that reached a limit must not run again
        assert all(str(text) == str(reached) for text in rendered(template, 1000))
    assert rendered("{{ 1 + 1 }}") == ["2"], "other templates must still be rendered"


def test_the_error_names_the_file_of_the_template(limited: TemplateProcess, smollm2_source: dict, tmp_path: Path):
    own = tmp_path / "own.jinja"
    own.write_text("{{ 'a' * 9000000000 }}")
    source = {**smollm2_source, "chat_template": own.read_text() + " ", "template_name": "model/tokenizer_config.json"}
    tokenizer = load_tokenizer(source)
    for named, name in ((tokenizer, "model/tokenizer_config.json"), (with_chat_template(tokenizer, own), str(own))):
        with pytest.raises(ValueError, match=rf"^{re.escape(name)}: the chat template needed more"):
            named.render([USER])


def test_long_conversations_may_be_written_several_times(limited: TemplateProcess):
    """A limit on the output alone would refuse long rows."""
    long = Rendering([{"role": "user", "content": "a" * 2_000_000}])
    (text,) = render_all("{{ messages[0].content * 2 }}", [long])
    assert text == "a" * 4_000_000


def test_many_long_conversations_do_not_share_the_memory_limit(limited: TemplateProcess):
    chats = [Rendering([{"role": "user", "content": str(n) + "a" * 8_000_000}]) for n in range(12)]
    texts = render_all("{{ messages[0].content[0] }}", chats)
    assert texts == [str(n)[0] for n in range(12)]


def test_halves_of_surrogate_pairs_and_other_values_arrive(limited: TemplateProcess):
    message = {"role": "user", "content": "\ud83d é👍", "day": (2026, 1.5, None, b"x")}
    assert render("{{ messages[0].content }} {{ messages[0].day }}", Rendering([message]), {}) == (
        "\ud83d é👍 (2026, 1.5, None, b'x')"
    )


def test_threads_take_turns(limited: TemplateProcess):
    results: dict[int, list[str | ValueError]] = {}

    def work(number: int) -> None:
        chats = [Rendering([{"role": "user", "content": f"{number}.{n}"}]) for n in range(50)]
        for _ in range(10):
            results[number] = render_all("{{ messages[0].content }}", chats)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: [f"{number}.{n}" for n in range(50)] for number in range(4)}


def test_large_requests_and_replies_do_not_wait_for_each_other(limited: TemplateProcess):
    """Both pipes are full at once: the worker writes the first reply while the second request is sent."""
    chat = Rendering([{"role": "user", "content": "a" * 4_000_000}])
    finish = [start_rendering("{{ messages[0].content * 2 }}", [[chat]], {}) for _ in range(3)]
    assert [texts() for texts in finish] == [[["a" * 8_000_000]]] * 3


def test_requests_behind_one_that_ends_the_process_are_answered(limited: TemplateProcess):
    conversations = [[Rendering([USER])]]
    before, reached, after = (
        start_rendering(template, conversations, {}) for template in ("{{ 1 }}", "{{ 'a' * 9000000000 }}", "{{ 3 }}")
    )
    assert after() == [["3"]] and before() == [["1"]]
    assert re.search("needed more than 192 MiB of memory", str(reached()))


def test_a_long_conversation_of_many_turns_is_rendered_with_all_its_beginnings(limited: TemplateProcess):
    """They share the messages, so their text is much longer than what is sent."""
    chat = [{"role": "user", "content": "a" * 20_000} for _ in range(60)]
    prompts = [Rendering(chat[:turn]) for turn in range(1, 61)]
    assert rendered("a") == ["a"]
    process = limited._process
    (texts,) = start_rendering("{% for m in messages %}{{ m.content }}{% endfor %}", [prompts], {})()
    assert [len(text) for text in texts if isinstance(text, str)] == [20_000 * turn for turn in range(1, 61)]
    assert limited._process is process, "the limit ended the process"


def test_an_earlier_text_may_be_asked_for_after_a_later_one(limited: TemplateProcess):
    finish = [start_rendering(f"{{{{ {number} }}}}", [[Rendering([USER])]], {}) for number in range(5)]
    assert [texts() for texts in reversed(finish)] == [[[f"{number}"]] for number in (4, 3, 2, 1, 0)]


def test_a_process_that_somebody_killed_is_started_again(limited: TemplateProcess):
    assert rendered("{{ 1 }}") == ["1"]
    process = limited._process
    assert process is not None
    process.kill()
    process.wait()
    assert rendered("{{ 1 }}") == ["1"]


def test_an_interrupt_does_not_mix_up_replies(limited: TemplateProcess, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            while True:
                rendered("{% for i in range(99999) %}{% endfor %}a")
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert rendered("b") == ["b"]


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="the limits of a process are in Linux's /proc")
def test_the_kernel_limits_the_process(limited: TemplateProcess):
    assert rendered("a") == ["a"]
    assert limited._process is not None
    limits = Path(f"/proc/{limited._process.pid}/limits").read_text()
    assert re.search(rf"Max address space +{192 << 20} ", limits) and re.search(r"Max core file size +0 ", limits)


SEALED = """
import os, socket, subprocess, sys, tempfile
from qlora_jax.data.tokenizer import template_worker
written = os.path.join(tempfile.gettempdir(), 'written')
attempts = {
    "read": lambda: open("pyproject.toml"), "list": lambda: os.listdir("/"), "proc": lambda: open("/proc/self/environ"),
    "write": lambda: open(written, "w"), "socket": socket.socket, "fork": os.fork,
}
def outcome(attempt):
    try:
        attempt()
    except PermissionError:
        return True
def serve(*_):
    print({name for name, attempt in attempts.items() if not outcome(attempt)} or "all refused", sorted(os.environ))
template_worker._serve = serve
template_worker.main("1", str(768 << 20), "1000")
"""


@needs_seal
def test_the_process_is_sealed_and_has_no_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TZ", "UTC")
    environment = {**python_environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SEALED], cwd=ROOT, env=environment, capture_output=True, text=True)
    printed, _, names = done.stdout.partition(" [")
    assert printed == "all refused", done.stderr
    assert {"PYTHONPATH", "TZ"} <= {*re.findall(r"\w+", names)} <= {"PYTHONPATH", "TZ", "LC_CTYPE", "LD_LIBRARY_PATH"}


def test_modules_that_jinja_imports_late_and_the_date_are_at_hand(limited: TemplateProcess):
    assert rendered("{{ lipsum(n=1) | length > 10 }} {{ strftime_now('%Y-%m') }}") == [f"True {time.strftime('%Y-%m')}"]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="the environment is in Linux's /proc")
def test_the_process_inherits_no_environment(limited: TemplateProcess):
    assert rendered("a") == ["a"] and limited._process is not None
    environment = Path(f"/proc/{limited._process.pid}/environ").read_text()
    assert {*re.findall(r"(\w+)=", environment)} <= {"PYTHONPATH", "TZ", "LD_LIBRARY_PATH", "PYTHONHOME"}


def test_the_process_ends_with_the_one_that_started_it():
    code = (
        "import os, sys; from qlora_jax.data.tokenizer import chat_template as c\n"
        "c.render('a', c.Rendering([]), {}); print(c._process._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and not done.stderr
    deadline = time.monotonic() + 10
    while _runs(int(done.stdout)):
        assert time.monotonic() < deadline, "the process still runs"
        time.sleep(0.01)


def _runs(process_id: int) -> bool:
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


FORK = """
import os
from qlora_jax.data.tokenizer import chat_template as c

def render():
    return c.render("a", c.Rendering([]), {}), c._process._process.pid

first = render()
child = os.fork()
if not child:
    text, process_id = render()
    c._process.stop()
    os._exit(0 if text == "a" and process_id != first[1] else 1)
_, status = os.waitpid(child, 0)
print(status, render() == first)
"""


def test_a_fork_starts_its_own_process():
    done = subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0 True\n", "")


MEASURE = """
import json, resource, sys, time
from qlora_jax.data.tokenizer.chat_template import Rendering, start_rendering
seconds = {}
for name, template in json.load(sys.stdin).items():
    started = time.monotonic()
    ((error,),) = start_rendering(template, [[Rendering([{"role": "user", "content": "Hi"}])]], {})()
    seconds[name] = time.monotonic() - started if isinstance(error, ValueError) else "rendered"
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([seconds, peaks]))
"""


@pytest.mark.slow
@pytest.mark.exhaustive
def test_no_hostile_template_takes_five_seconds_or_a_gigabyte():
    """Measures all of them with the limits of users."""
    templates = ENDLESS | {name: template for name, (template, _) in REFUSED.items()}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(templates), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seconds, peaks = json.loads(done.stdout)
    assert max(seconds.values()) < 5 and max(peaks) < 1e6, (seconds, peaks)
