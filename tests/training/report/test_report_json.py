"""Summaries of a run's records, and its curves as SVG."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from qlora_jax.measures.metrics import Metric
from qlora_jax.measures.statistics import wilson_interval
from qlora_jax.training.metrics.record_summaries import (
    before_and_after,
    preference_summary,
    question_summary,
    training_summary,
)
from qlora_jax.training.metrics.step_metrics import flatten_metrics
from qlora_jax.training.report.curves import GIB, Chart, Line, charts
from qlora_jax.training.report.plot import NARROW, WIDE, chart_svg, draw_chart, lengths_svg, loss_svg


def step(number: int, loss: float | None = 1.0, tokens: int = 100, seconds: float = 1.0) -> dict:
    return {"step": number, "loss": loss, "tokens": tokens, "supervised_tokens": tokens // 2, "seconds": seconds}


def test_records_of_a_run_in_figures():
    held = [{"step": n, "eval_loss": n + 1} for n in (2, 0, 1)]
    held[-1] |= {"eval_loss_low": 1.5, "eval_loss_high": 2.5}
    held = [one | {"step": step} for one, step in zip(held, (0, 2, 3), strict=True)]
    steps = [step(1, seconds=50.0), step(2, tokens=300), step(3, 0.5)]
    found = training_summary([held[0], steps[0], steps[1], held[1], steps[2], held[2]])
    assert found == {
        "steps": 3,
        "last_loss": 0.5,
        "first_eval": {"step": 0, "loss": 3, "interval": None, "perplexity": math.exp(3)},
        "last_eval": {"step": 3, "loss": 2, "interval": [1.5, 2.5], "perplexity": math.exp(2)},
        "best_eval": {"step": 2, "loss": 1, "interval": None, "perplexity": math.exp(1)},
        "tokens": 500,
        "supervised_tokens": 250,
        "seconds": 52.0,
        "tokens_per_second": 100.0,  # the median of 2, 300 and 100: the first step compiled
        "mfu": None,
    }
    known = [one | {"mfu": share} for one, share in zip(steps, (0.001, 0.5, 0.4), strict=True)]
    assert training_summary(known)["mfu"] == 0.4


def test_a_run_without_steps_or_held_out_rows_has_no_figures_of_them():
    assert training_summary([]) is training_summary([{"step": 0, "eval_loss": 3.0}]) is None
    found = training_summary([step(1, None)])
    assert found["last_loss"] is None and found["first_eval"] is None and found["best_eval"] is None


def test_replies_before_and_after():
    def reply(step: int, prompt: object, text: str) -> dict:
        return {"step": step, "prompt": {"prompt": prompt}, "reply": text, "end": "stop"}

    rows = [reply(step, prompt, f"{prompt[0]} at {step}") for step in (0, 5, 9) for prompt in ("a", [{"role": "user"}])]
    first, second = before_and_after(rows)
    assert first == ({"prompt": "a"}, ((0, "a at 0"), (9, "a at 9")))
    assert json.loads(second.prompt["prompt"]) == [{"role": "user"}] and second.replies[1][0] == 9
    assert before_and_after(rows[:-1]) == [first]  # the run was killed there
    assert [sample.replies for sample in before_and_after(rows[:1])] == [((0, "a at 0"),)]
    assert before_and_after([]) == []


def test_a_chat_reads_as_turns():
    turns = [{"role": "user", "content": "Is 2 odd?"}, {"role": "assistant", "content": "No."}]
    (sample,) = before_and_after([{"step": 0, "prompt": {"messages": turns}, "reply": "", "end": "stop"}])
    assert sample.prompt == {"messages": "user: Is 2 odd?\nassistant: No."}


def on_a_card(number: int, length: int = 64, **changes) -> dict:
    held = {"device_bytes": 3 * GIB, "device_peak_bytes": 5 * GIB, "host_bytes": 2 * GIB}
    return step(number) | {"learning_rate": number / 10, "length": length, "mfu": 0.4} | held | changes


def test_charts_of_what_a_card_tells():
    steps = [on_a_card(1, seconds=60.0), on_a_card(2), on_a_card(3, 128, seconds=60.0), on_a_card(4, 128, mfu=0.5)]
    rate, speed, mfu, memory = charts([{"step": 0, "eval_loss": 3.0}, *steps], 6 * GIB)
    assert [(line.steps, line.values) for line in rate.lines] == [([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4])]
    assert [(line.steps, line.values) for line in speed.lines] == [([2, 4], [100.0, 100.0])]  # 1 and 3 compiled
    assert [(line.steps, line.values) for line in mfu.lines] == [([2, 4], [40.0, 50.0])]
    told = {line.label: line.values for line in memory.lines}
    assert told == {"device": [3.0] * 4, "peak so far": [5.0] * 4, "planned": [6.0] * 4, "host": [2.0] * 4}


def answered(number: int, right: int, other: int) -> dict:
    """Returns the record of 10 questions by letter."""
    counts = {"right by letter": right, "mean over 2 subjects": other}
    return {"step": number} | flatten_metrics(
        "letters", [Metric(name, "share", n / 10, wilson_interval(n, 10)) for name, n in counts.items()]
    )


def test_questions_in_figures_and_charts():
    records = [answered(0, 1, 2), on_a_card(1), answered(1, 7, 6)]
    first, second = question_summary(records)
    assert (first["kind"], first["share"]) == ("letters", "right by letter")
    assert first["first"] == {"step": 0, "value": 0.1, "interval": [*wilson_interval(1, 10)]}
    assert second["last"] == {"step": 1, "value": 0.6, "interval": [*wilson_interval(6, 10)]}
    chart, *_ = charts(records, GIB)
    assert (chart.caption, chart.unit) == ("Questions by letter", "% right")
    told = [(line.label, line.main, line.steps) for line in chart.lines]
    assert told == [("right by letter", True, [0, 1]), ("mean over 2 subjects", False, [0, 1])]
    low, high = wilson_interval(7, 10)
    assert [
        ends[1] / 100 for ends in (chart.lines[0].values, chart.lines[0].low, chart.lines[0].high)
    ] == pytest.approx([0.7, low, high])
    svg = chart_svg(chart, NARROW)
    assert svg.count("fill-opacity: 0.15") == 2 and "right by letter" in svg
    assert question_summary([step(1)]) == []


def preferences(number: int, accuracy: float, prefix: str = "") -> dict:
    names = ("rewards_chosen", "rewards_rejected", "logp_chosen", "logp_rejected")
    values = {"rewards_accuracy": accuracy} | {name: -index - accuracy for index, name in enumerate(names)}
    ends = {"": 0.0} | ({"_low": -0.1, "_high": 0.1} if prefix else {})
    return {f"{prefix}{name}{end}": value + shift for name, value in values.items() for end, shift in ends.items()}


def test_preferences_in_figures_and_charts():
    loss = {"eval_loss": 0.5, "eval_rows": 9}
    held = [{"step": n} | loss | preferences(n, right, "eval_") for n, right in ((0, 0.5), (2, 0.9))]
    known = {"learning_rate": 0.1, "length": 64}
    records = [held[0], *(step(n) | known | preferences(n, 0.4 * n) for n in (1, 2)), held[1]]
    assert training_summary(records)["last_eval"]["perplexity"] is None  # the loss is not a mean over tokens
    found = preference_summary(records)
    assert found["rewards_accuracy"] == [
        {"step": 0, "value": 0.5, "interval": [0.4, 0.6]},
        {"step": 2, "value": 0.9, "interval": [0.8, 1.0]},
    ]
    right, rewards, logps, *_ = charts(records, GIB)
    assert [(line.label, line.values, line.dash) for line in right.lines] == [
        ("held out", [50.0, 90.0], "-"),
        ("training", pytest.approx([40.0, 80.0]), "--"),
    ]
    assert [line.label for line in rewards.lines] == [
        f"{kind}, {rows}" for kind in ("chosen", "rejected") for rows in ("held out", "training")
    ]
    assert rewards.lines[0].low == pytest.approx([-0.6, -1.0]) and not logps.from_zero
    for chart, from_zero in ((rewards, True), (logps, False)):
        axes = Figure().subplots()
        draw_chart(axes, chart)
        low, high = axes.get_ylim()
        assert low <= min(map(min, (line.values for line in chart.lines))) and (high >= 0) == from_zero


def test_a_teacher_and_tools_have_charts():
    known = {"learning_rate": 0.1, "length": 64}
    names = {"cross_entropy": 2.0, "teacher_tail": 0.5, "tool_calls": 3.0, "tool_failures": 0.25}
    held = {f"eval_{name}{end}": value for name, value in names.items() for end in ("", "_low", "_high")}
    found = charts([{"step": 0} | held, step(1) | known | names], 0)[:-1]
    assert [[[*line.values] for line in chart.lines] for chart in found] == [
        [[value], [value]] for value in (2.0, 50.0, 3.0, 25.0)
    ]
    assert [chart.unit for chart in found] == ["nats per token", "%", "per reply", "%"]


def test_charts_leave_out_what_is_not_known():
    known = {"learning_rate": 0.1, "length": 64}
    assert charts([], 0) == charts([{"step": 0, "eval_loss": 3.0}], 0) == []
    assert [chart.caption for chart in charts([step(1) | known], 0)] == ["Learning rate"]
    (*_, memory) = charts([step(1) | known, step(2) | known | {"host_bytes": GIB}], 6 * GIB)
    assert [(line.label, line.steps) for line in memory.lines] == [("host", [2])]


class Elements(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)


@pytest.mark.parametrize(
    ("svg", "words"),
    [
        (
            loss_svg([{"step": 0, "eval_loss": 3.0}, step(1, 2.0), step(2, 1.0)], WIDE),
            ("held-out loss", "optimizer step"),
        ),
        (
            chart_svg(charts([on_a_card(1), on_a_card(2)], 6 * GIB)[-1], NARROW),
            ("peak so far", "host", "optimizer step"),
        ),
        (lengths_svg({3: 1, 40: 5}, 32, NARROW), ("data.max_length 32", "tokens per row, before truncation")),
    ],
    ids=["loss", "memory", "lengths"],
)
def test_svg_has_the_pages_colours_and_text_that_stays_text(svg, words):
    assert svg.startswith("<svg") and Elements(svg).tags[0] == "svg"
    assert "var(--ink)" in svg and "var(--first)" in svg and "var(--second)" in svg and "#0" not in svg
    for word in words:
        assert word in svg


def test_max_length_is_drawn_only_where_rows_reach_it():
    assert "max_length" not in lengths_svg({3: 1, 31: 5}, 32, NARROW)


def test_a_drawing_refers_to_nothing_of_another():
    records = [step(1, 2.0), step(2, 1.0)]
    drawings = [loss_svg(records, size) for size in (NARROW, WIDE)] + [lengths_svg({3: 1}, 32, NARROW)]
    named = [set(re.findall(r'\bid="([mp][0-9a-f]{10})"', svg)) for svg in drawings]
    for svg, names in zip(drawings, named, strict=True):
        assert names >= set(re.findall(r'(?:url\(|href=")#(\w+)', svg)) != set()
    assert len(set.union(*named)) == sum(map(len, named))


def test_a_chart_tells_its_unit_in_its_caption():
    (*_, memory), speed = charts([on_a_card(1), on_a_card(2)], 6 * GIB), 12_000
    assert memory.title == "Memory in use, GiB" and Chart("Learning rate", "", []).title == "Learning rate"
    svg = chart_svg(Chart("Speed", "tokens per second", [Line("", [1, 2], [0.0, speed])]), WIDE)
    assert "12,000" in svg and "tokens per second" not in svg
