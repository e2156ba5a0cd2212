"""The training benchmark: figures from records."""

from typing import ClassVar

import numpy as np
import pytest

from scripts.bench import train as bench
from scripts.bench.support import train_rows
from scripts.bench.support.interleave import WorkerGroup
from scripts.bench.workers import gemm_rate


def turns_of(field: str, *blocks: float, peak: float = 0.0):
    return [[{field: value, "peak_rss_mib": peak, "loss": 1.0}] for value in blocks]


def start(seconds: float, peak: float):
    return {"since_start_s": seconds, "peak_rss_mib": peak}


def test_figures_of_a_row():
    row = bench.Row()
    rate = row.flops() / 1e9  # a step at this rate takes a second
    turns = {
        "ours": turns_of("seconds", 2.0, 4.0, peak=500),
        "slower": turns_of("seconds", 9.0, 9.0, peak=900),
        "faster": turns_of("seconds", 3.0, 6.0, peak=1000),
        "gemm jax": turns_of("gflops", rate, rate / 2),
        "gemm torch": turns_of("gflops", rate / 4, rate),
    }
    cold = {"ours": start(20, 600), "faster": start(80, 1000), "slower": start(30, 900)}
    players = {n: bench.summary(row, turns, n, cold[n], start(9, 100)) for n in ("ours", "slower", "faster")}
    assert players["ours"]["share"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert players["ours"]["tokens_per_s"] == 512 / 3
    assert players["ours"]["cold"] == {"first_step_s": 20, "peak_rss_mib": 600}
    assert players["ours"]["warm"] == {"first_step_s": 9, "peak_rss_mib": 500}
    verdict = bench.verdict(turns, players)
    assert (verdict["opponent"], verdict["speed"], verdict["memory"]) == ("faster", 1.5, 0.6)


@pytest.mark.parametrize(
    ("name", "fast", "dtype"), [("f32", True, "float32"), ("b1-r16", True, "bfloat16"), ("b1-r16", False, "float32")]
)
def test_the_product_rate_is_that_of_the_dtype_of_the_row(
    monkeypatch: pytest.MonkeyPatch, name: str, fast: bool, dtype: str
):
    class Recorder(WorkerGroup):
        commands: ClassVar[list[list[str]]] = []

        def start(self, name: str, command: list[str], counted: int = 1) -> None:
            self.commands.append(command)

    monkeypatch.setattr(train_rows, "fast_bfloat16", lambda: fast)
    monkeypatch.setattr(bench, "WorkerGroup", Recorder)
    monkeypatch.setattr(bench, "commands_of", lambda row: {})
    assert bench.measure(bench.ROWS[name], 1, 1, True, 1.0)["speed"] is None
    assert [command[-4:] for command in Recorder.commands] == [
        ["--library", library, "--dtype", dtype] for library in ("jax", "torch")
    ]
    assert np.asarray(gemm_rate.jax_product(2, 3, 4, dtype)()).dtype == dtype


def test_an_opponent_that_failed_leaves_no_ratio(capsys):
    turns = {"ours": turns_of("seconds", 2.0, peak=500)}
    players = {"ours": bench.summary(bench.Row(), turns, "ours", None, start(9, 500))}
    verdict = bench.verdict(turns, players)
    assert (verdict["opponent"], verdict["speed"], verdict["memory"]) == (None, None, None)
    bench.show("row", {"flop": 1e9, "players": players, "failures": {"--compile model": "no answer"}, **verdict})
    assert "--compile model: FAILED: no answer" in capsys.readouterr().out
