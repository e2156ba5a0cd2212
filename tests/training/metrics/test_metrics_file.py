"""metrics.jsonl: written records are read back, also after a kill and a resume."""

import json

import pytest

from qlora_jax.config import Config, DataArgs, ModelArgs, write_config
from qlora_jax.line_digests import with_digest
from qlora_jax.training.metrics.metrics_file import MetricsFile, read_metrics


def step_record(step, loss):
    counts = {"tokens": 9, "supervised_tokens": 4, "length": 16, "seconds": 0.5}
    return {"step": step, "loss": loss, "learning_rate": 1e-4} | counts


def write_steps(path, steps, first_step):
    with MetricsFile(path, first_step) as metrics:
        for step in steps:
            metrics.write(step_record(step, step / 7))


def test_each_record_is_in_the_file_before_write_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        metrics.write(step_record(1, 0.1))
        assert read_metrics(path) == [step_record(1, 0.1)]


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(tmp_path):
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    write_steps(whole, range(1, 9), 0)
    write_steps(resumed, range(1, 7), 0)  # killed after step 6, its checkpoint is of step 4
    write_steps(resumed, range(5, 9), 4)
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_flipped_bit_anywhere_is_an_error_or_changes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [step_record(1, 0.25), {"step": 1, "eval_loss": 0.5}]
    with MetricsFile(path, 0) as metrics:
        for record in records:
            metrics.write(record)
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        try:
            found = read_metrics(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:  # a last line without its end may be half a line
            assert found == records or (found == records[:1] and place == len(content) - 1), (place, found)


def test_files_of_an_earlier_version_have_no_digests_and_are_read_with_one_warning(tmp_path):
    path, samples = tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"
    for each in (path, samples):
        each.write_text(2 * (json.dumps(step_record(1, 0.5)) + "\n"))
    with pytest.warns(UserWarning, match=f"^{tmp_path}: an earlier version .* without digests") as caught:
        assert read_metrics(path) == read_metrics(samples) == 2 * [step_record(1, 0.5)]
    assert len(caught) == 1
    write_steps(path, [2], 1)
    assert [record["step"] for record in read_metrics(path)] == [1, 1, 2]
    path.write_text(path.read_text().replace('"loss": 0.5', '"loss": 0.6'))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: damaged \(its values are not those that were written\)"):
        read_metrics(path)


def test_a_line_that_alone_has_no_digest_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1], 0)
    path.write_text(path.read_text() + json.dumps(step_record(2, 0.5)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a record \(found no digest at its end\)"):
        read_metrics(path)


def test_an_evaluation_that_runs_again_is_not_recorded_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [record for step in (1, 2) for record in (step_record(step, 2.0), {"step": step, "eval_loss": 3.0})]
    for evaluated, kept in ((True, 4), (False, 3)):
        path.write_text("".join(with_digest(json.dumps(record)) for record in [*records, step_record(3, 0.5)]))
        with MetricsFile(path, 2, evaluated=evaluated):
            assert read_metrics(path) == records[:kept]


def test_a_run_from_step_0_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4), 0)
    write_steps(path, range(1, 3), 0)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]


def test_a_run_stopped_after_the_evaluation_of_step_0_keeps_its_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        metrics.write({"step": 0, "eval_loss": 2.0})
        saved = metrics.sync()
    with MetricsFile(path, 0, evaluated=True, saved=saved):
        assert [record["step"] for record in read_metrics(path)] == [0]


@pytest.mark.parametrize("cut", range(1, 20))
def test_half_a_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2], 0)
    text = path.read_text()
    path.write_text(text + '{"step": 3, "loss": 0.5}'[:cut])
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, [3], 2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_anything_else_is_told_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('nonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: found 'nonsense"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (dict(step="1"), "step: found '1', expected a whole number"),
        (dict(tokens=None, seconds=0), r"tokens: found None, .*; seconds: found 0, "),
        (dict(learning_rate=None), "learning_rate: found None, expected a number"),
        (dict(loss=[1.0]), r"loss: found \[1\.0\], expected a number"),
        (dict(host_bytes={}), "host_bytes: found {}, expected a number"),
        (dict(letters_right_low=0.1), "letters_right_high: missing"),
        (dict(reply="x", loss=1.0), "reply: found 'x', expected a number"),
    ],
)
def test_values_of_other_types_are_all_named_with_their_line(tmp_path, changes, problem):
    path = tmp_path / "metrics.jsonl"
    records = [step_record(1, 0.1), step_record(2, 0.1) | changes]
    path.write_text("".join(with_digest(json.dumps(record)) for record in records))
    with pytest.raises(ValueError, match=rf"metrics\.jsonl:2: not a record of a run \({problem}"):
        read_metrics(path)


@pytest.mark.parametrize("content", [b'{"a":' * 100_000, b"[]\n", b'{"step": 1}\n\xff\n', b'{"step": 1, "step": 2}\n'])
def test_a_file_from_elsewhere_is_an_error_that_names_it(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        metrics.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})

    def refuse(word):
        raise AssertionError(word)

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record.pop("xxh3_64") and record == {"step": 1, "loss": None, "grad_norm": None}


def test_a_record_needs_its_step(tmp_path):
    with MetricsFile(tmp_path / "m.jsonl", 0) as metrics, pytest.raises(ValueError, match="`step` is missing"):
        metrics.write({"loss": 1.0})


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_refused(tmp_path, exists):
    """A run folder from elsewhere may contain links to the user's own files."""
    precious = tmp_path / "precious"
    if exists:
        precious.write_text('{"step": 1}\n')
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(OSError, match=r"found a symbolic link to .*precious") as caught:
        MetricsFile(tmp_path / "metrics.jsonl", 1)
    assert caught.value.filename == str(tmp_path / "metrics.jsonl")
    assert precious.exists() == exists and (not exists or precious.read_text() == '{"step": 1}\n')


@pytest.mark.parametrize("name", ["config.yaml", "config.yaml.part", "metrics.jsonl.part"])
def test_no_file_of_a_run_is_written_through_a_link(tmp_path, name):
    """The names of temporary files were guessable once: metrics.jsonl.part."""
    (tmp_path / "precious").write_text("precious")
    write_steps(tmp_path / "metrics.jsonl", [1], 0)
    (tmp_path / name).symlink_to("precious")
    write_config(Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o"), tmp_path / "config.yaml")
    write_steps(tmp_path / "metrics.jsonl", [2], 1)
    assert (tmp_path / "precious").read_text() == "precious"
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
