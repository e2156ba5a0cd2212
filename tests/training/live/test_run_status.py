"""The state of a run from its folder: while it trains, after it was resumed, and when its files are damaged."""

import json
import math
import os
import subprocess
import sys

import pytest

from qlora_jax.line_digests import with_digest
from qlora_jax.training.live import run_status as module
from qlora_jax.training.live.run_status import RunReader, run_status
from qlora_jax.training.report.curves import Line, thinned
from tests.training.live.small_folder import PLANNED, SmallRun


@pytest.fixture
def run(tmp_path):
    with SmallRun(tmp_path / "mine") as small:
        yield small


def ended_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def line_of(chart, label):
    return next(line for line in chart.lines if line.label == label)


def test_a_run_from_its_first_record_to_its_last(run):
    reader = RunReader(run.folder)
    assert (reader.read().state, reader.read().step) == ("starting", 0)
    run.evaluation(0, 4.0)
    run.steps(1, 5)
    run.evaluation(4, 2.0)
    status = reader.read()
    assert (status.state, status.step, status.total_steps, status.base) == ("training", 4, 10, "models/base")
    assert f"process {os.getpid()} on " in status.message
    assert status.seconds_left == 6 * 3.0  # 2 s in a step and 1 s for its data; the first step compiles
    assert line_of(status.loss, "training") == Line("training", [1, 2, 3, 4], [3.0, 1.5, 1.0, 0.75], low=[], high=[])
    assert line_of(status.loss, "held out")[1:3] == ([0, 4], [4.0, 2.0])
    assert dict(status.tiles)["held-out loss"].startswith("4.000 → 2.000")
    assert dict(status.tiles)["device memory"] == "2.00 GiB"
    memory = next(chart for chart in status.charts if chart.caption == "Memory in use")
    assert line_of(memory, "planned").values == [PLANNED / 2**30] * 4
    assert any(chart.lines[0].values == [50.0, 50.0] for chart in status.charts)  # % right
    assert "epochs: 2.0" in status.settings and not status.problems
    run.steps(5, 11)
    run.lock(None)
    assert (reader.read().state, reader.read().seconds_left) == ("finished", None)


def test_a_reader_reads_added_lines_only_and_returns_the_same_object_without_news(run):
    run.steps(1, 4)
    reader = RunReader(run.folder)
    first = reader.read()
    assert reader.read() is first
    file = run.folder / "metrics.jsonl"
    with file.open("a") as half:
        half.write('{"step": 4, "loss": 1.')  # the run writes at this moment
    assert reader.read().step == 3 and not reader.read().problems
    size = file.stat().st_size
    file.write_bytes(b"x" * 20 + file.read_bytes()[20:])  # in place, far from the end: it is not read again
    os.truncate(file, size - 22)
    run.steps(4, 6)
    status = reader.read()
    assert status.step == 5 and not status.problems and len(status.loss.lines[0].steps) == 5
    assert any("found 1" in problem for problem in run_status(run.folder).problems)


def test_a_resumed_run_has_each_step_once(run):
    run.steps(1, 8)
    reader = RunReader(run.folder)
    assert reader.read().step == 7
    run.resume(4)
    run.steps(5, 9, loss=0.125)  # one step more than before, so that the file is longer
    status = reader.read()
    assert status.step == 8 and status.loss.lines[0].steps == [*range(1, 9)]
    assert status.loss.lines[0].values == [3.0, 1.5, 1.0, 0.75, *[0.125] * 4]


def test_damaged_lines_are_left_out_and_counted(run):
    run.steps(1, 4)
    run.close()
    file = run.folder / "metrics.jsonl"
    lines = file.read_bytes().split(b"\n")
    wrong = [lines[0].replace(b"3.0", b"9.0"), b"\xff\xfe", b'{"loss": 1}', b"", b"[" * 5000]
    file.write_bytes(b"\n".join([*lines[:2], *wrong, *lines[2:]]))
    status = run_status(run.folder)
    assert [*status.loss.lines[0].steps] == [1, 2, 3]
    assert status.problems == [f"{file}: lines that are not records are left out (found {len(wrong)})"]


@pytest.mark.parametrize("name", ["config.yaml", "report.json"])
@pytest.mark.parametrize("text", ["", "{", "[1]", "\0", "data: {steps_per_epoch: -}"])
def test_a_damaged_file_is_a_problem_and_the_rest_is_shown(run, name, text):
    run.steps(1, 4)
    (run.folder / name).write_text(text)
    status = run_status(run.folder)
    assert status.step == 3 and len(status.problems) == 1 and name in status.problems[0]
    json.dumps(status.to_json(), allow_nan=False)


def test_records_of_an_earlier_version_have_no_digests_and_may_lack_keys(run):
    lines = [{"step": n, "loss": 1.0, "tokens": 5, "supervised_tokens": 3, "length": 8, "seconds": 1.0} for n in (1, 2)]
    lines = [line | {"learning_rate": 1e-4} for line in lines] + [{"step": 2, "eval_loss": math.nan}]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "report.json").unlink()
    status = run_status(run.folder)
    assert (status.step, status.total_steps, status.seconds_left) == (2, None, None)
    assert status.to_json()["loss"]["lines"][1]["values"] == [None]


def test_a_run_whose_process_is_gone_has_stopped(run):
    run.steps(1, 4)
    run.lock(process := ended_process())
    status = run_status(run.folder)
    assert status.state == "stopped" and f"process {process} " in status.message and "without saving" in status.message
    run.lock(process, host="elsewhere")  # processes of another machine cannot be seen from here
    assert run_status(run.folder).state == "training"
    run.lock(None)
    assert run_status(run.folder).message == "stopped"
    (run.folder / "run.lock").write_text("\0 damaged")
    assert run_status(run.folder).state == "training"


def test_patience_ends_a_run_before_its_last_step(tmp_path):
    with SmallRun(tmp_path / "run", patience=2) as run:
        for step, loss in ((0, 3.0), (2, 2.0), (4, 2.5)):
            run.evaluation(step, loss)
        run.lock(None)
        assert run_status(run.folder).state == "stopped"
        run.evaluation(6, 2.1)
        assert run_status(run.folder).message == "finished after 2 evaluations without a lower held-out loss"


def test_the_remaining_time_includes_what_happens_between_steps(run, monkeypatch):
    file, times = run.folder / "metrics.jsonl", {}
    monkeypatch.setattr(module, "_changed_at", lambda path: times.get(path, path.stat().st_mtime_ns))
    report = {"data": {"steps": [500]}, "memory_plan": {"device_bytes": {}, "questions_bytes": None}}
    (run.folder / "report.json").write_text(json.dumps(report))
    reader, left = RunReader(run.folder), []
    for count in range(6):
        times[file] = count * 100 * 10**9  # 10 steps in 100 s, of which 30 s are in the records
        run.steps(1 + 10 * count, 11 + 10 * count)
        left.append(reader.read().seconds_left)
    assert left[:2] == [990 * 3.0, 980 * 3.0]  # as the records say
    assert left[2:] == [pytest.approx((1000 - n) * 10.0) for n in (30, 40, 50, 60)]
    run.resume(20)
    times[file] += 1000 * 10**9
    run.steps(21, 22)
    assert reader.read().seconds_left == 979 * 3.0


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path):
    reader = RunReader(tmp_path / "later")
    assert reader.read().state == "waiting" and "does not exist yet" in reader.read().message
    (tmp_path / "later").mkdir()
    (tmp_path / "later/report.json").write_text("{}")  # a dry run wrote it
    assert reader.read().state == "waiting"
    (tmp_path / "later/report.json").unlink()
    (tmp_path / "later").rmdir()
    with SmallRun(tmp_path / "later") as run:
        run.steps(1, 2)
        assert (reader.read().state, reader.read().step) == ("training", 1)
    (tmp_path / "later").rename(tmp_path / "moved")
    assert (reader.read().state, reader.read().step, reader.read().loss) == ("waiting", 0, None)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_another_folder_or_a_file_is_not_a_run(tmp_path, kind):
    path = tmp_path / "it"
    if kind == "file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / "notes.txt").write_text("x")
    status = run_status(path)
    assert status.state == "not a run" and f"{path}: not a run folder (config.yaml is missing)" in status.message


def test_an_error_of_the_disk_is_a_problem_until_it_is_over(run, monkeypatch):
    run.steps(1, 3)
    reader = RunReader(run.folder)
    reader.read()
    with monkeypatch.context() as patch:

        def fail(folder):
            raise OSError(116, "Stale file handle", str(folder))

        patch.setattr(module, "read_holder", fail)
        assert reader.read().problems == [f"{run.folder}: Stale file handle"] and reader.read().step == 2
    assert reader.read().problems == []


def test_texts_cannot_command_a_terminal_or_show_a_password(run):
    run.steps(1, 2)
    run.sample(0, "\x1b[31m\u202e reply")
    run.sample(1, "second")
    config = run.folder / "config.yaml"
    config.write_text(config.read_text().replace("models/base", "https://me:secret@hub/base"))
    found = run_status(run.folder).to_json()
    (sample,) = found["samples"]
    assert sample == {"prompt": {"prompt": "Hello?"}, "replies": [[0, "␛[31m<U+202E> reply"], [1, "second"]]}
    assert "secret" not in json.dumps(found) and found["base"] == "https://***@hub/base"


def test_long_curves_are_means_with_the_range_of_their_values():
    values = [float(n % 4) for n in range(4000)]
    line = thinned(Line("loss", [*range(1, 4001)], values), 500)
    assert len(line.steps) == 500 and line.steps[0] == 8 and line.steps[-1] == 4000
    assert set(line.values) == {1.5} and set(line.low) == {0.0} and set(line.high) == {3.0}
    ends = thinned(Line("x", [1, 2, 3, 4], [1.0, 2, 3, 4], low=[0.0, 1, 2, 3], high=[2.0, 3, 4, 5]), 2)
    assert (ends.values, ends.low, ends.high) == ([1.5, 3.5], [0.5, 2.5], [2.5, 4.5])
    assert thinned(line, 500) is line


def test_pieces_of_a_long_run_are_read_and_its_json_stays_small(run):
    line = {"loss": 1.0, "tokens": 5, "supervised_tokens": 3, "length": 8, "seconds": 1.0, "learning_rate": 1e-4}
    reader, file = RunReader(run.folder), run.folder / "metrics.jsonl"
    for first in range(1, 1001, 250):
        with file.open("a") as out:
            out.writelines(with_digest(json.dumps({"step": n} | line)) for n in range(first, first + 250))
        status = reader.read()
        assert status.step == first + 249
    assert [len(curve["steps"]) for curve in status.to_json()["loss"]["lines"]] == [500]


def test_a_summary_that_takes_long_rests_and_a_new_state_does_not_wait(run, monkeypatch):
    monkeypatch.setattr(module, "_LONG", -1.0)
    monkeypatch.setattr(module, "_REST", 1e6)
    run.steps(1, 3)
    reader = RunReader(run.folder)
    assert reader.read().step == 2
    run.steps(3, 5)
    assert reader.read().step == 2
    run.lock(None)
    assert (reader.read().state, reader.read().step) == ("stopped", 4)


def test_it_does_not_need_jax():
    code = "import sys, qlora_jax.training.live.watch_server; print([m for m in ('jax', 'flax') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
