"""The banner, the plain lines, and the live line as a terminal gets it."""

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from qlora_jax.config.sizes import format_duration
from qlora_jax.training.display.run_display import Display, Throughput, evaluation_lines, print_banner
from qlora_jax.training.metrics.step_metrics import eval_loss_metrics


def record(step: int, **changes) -> dict:
    numbers = {"loss": 2.34567, "learning_rate": 2e-4, "grad_norm": 0.312, "tokens": 512, "length": 64, "seconds": 0.5}
    return {"step": step, **numbers, **changes}


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=40), out


def test_plain_lines_at_every_nth_step_and_the_last():
    console, out = plain()
    with Display(5, 0, 2, console) as display:
        for step in range(1, 6):
            display.step(record(step))
        display.evaluation({"step": 0, "eval_loss": math.inf, "eval_perplexity": math.inf})
        display.evaluation({"step": 5, **eval_loss_metrics(np.array([1.0, 1.5]), np.array([1, 1]))})
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5", "step 0/5", "step 5/5"]
    assert lines[0].startswith("step 2/5  loss 2.346  1024 tok/s  0:00 left  lr 2.0e-04  grad 0.31")
    assert lines[-2] == "step 0/5  held-out loss inf, perplexity inf"
    assert lines[-1] == "step 5/5  held-out loss 1.250 [0.000, 4.427], perplexity 3.490"
    assert "\x1b" not in out.getvalue()


def test_questions_have_a_line_for_each_kind():
    console, out = plain()
    right = {"letters_right_by_letter": 0.25, "letters_right_by_letter_low": 0.1, "letters_right_by_letter_high": 0.482}
    with Display(5, 0, 2, console) as display:
        display.evaluation_progress("letters: 3 of 4")  # in a terminal alone
        display.evaluation({"step": 0, **right, "letters_ties": 1})
    assert out.getvalue() == "step 0/5  letters: right by letter 25.0% [10.0, 48.2]\n"


def test_preferences_have_lines_of_two_metrics():
    record = {"step": 3, "eval_loss": 0.5, "eval_loss_low": 0.4, "eval_loss_high": 0.6, "eval_rows": 7}
    for name, value in (("rewards_accuracy", 0.9), ("rewards_margin", 1.0), ("logp_chosen", -2.0)):
        record |= {f"eval_{name}": value, f"eval_{name}_low": value - 0.1, f"eval_{name}_high": value + 0.1}
    assert evaluation_lines(record) == [
        "held-out loss 0.500 [0.400, 0.600]",
        "right by reward 90.0% [80.0, 100.0], reward margin 1.000 [0.900, 1.100]",
        "log p per token of chosen -2.000 [-2.100, -1.900]",
    ]


def test_what_is_paged_is_shown_and_a_problem_told_once():
    console, out = plain()
    moved = {"resident_bytes": 3 * 2**29, "paged_in_bytes": 2**20, "paged_out_bytes": 0, "paging_problems": ["no room"]}
    with Display(2, 0, 1, console) as display:
        for step in (1, 2):
            display.step(record(step, **moved))
    assert out.getvalue().count("no room") == 1 and "step 1: no room" in out.getvalue()
    assert out.getvalue().count("state 1.50 GiB resident, 1.00 MiB in, 0 B out") == 2


@pytest.mark.parametrize(
    ("held", "told"),
    [
        ({}, "grad 0.31"),
        ({"host_bytes": 3 * 2**29}, "grad 0.31  host 1.50 GiB"),
        ({"host_bytes": 2**30, "device_bytes": 2**33}, "grad 0.31  device 8.00 GiB  host 1.00 GiB"),
    ],
)
def test_memory_is_shown_where_it_is_known(held, told):
    console, out = plain()
    with Display(1, 0, 1, console) as display:
        display.step(record(1, **held))
    assert out.getvalue().splitlines() == [f"step 1/1  loss 2.346  lr 2.0e-04  {told}"]


def test_a_terminal_has_one_live_line_and_is_left_as_it_was():
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True)
    with pytest.raises(KeyboardInterrupt), Display(5, 2, 1, console) as display:
        assert "step 2/5" in out.getvalue()
        display.step(record(3))
        display.message("saving [bold]")
        raise KeyboardInterrupt
    text = out.getvalue()
    assert "saving [bold]" in text
    assert "loss 2.346" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def live_line(width: int, **changes) -> str:
    """The last live line of a run, in a terminal of this width."""
    out = io.StringIO()
    with Display(500, 0, 1, Console(file=out, width=width, force_terminal=True)) as display:
        for step in (1, 2):
            display.step(record(step, **changes))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).split("\r")[-1].rstrip()


@pytest.mark.parametrize("width", (60, 63, 80, 96))
def test_a_narrow_terminal_drops_the_last_fields_whole(width):
    line = live_line(width, mfu=0.41, device_bytes=2**33, host_bytes=567_803_248)
    step, _, status = line.partition("loss ")
    assert step.startswith("step 2/500 ") and len(line) <= width
    fields = ["2.346", "1024 tok/s", "MFU 41.0%", "0:00 left", "lr 2.0e-04", "grad 0.31"]
    fields += ["device 8.00 GiB", "host 541.50 MiB"]
    shown = re.sub(r"\d+:\d\d left", "0:00 left", status).split("  ")
    assert shown == fields[: len(shown)] and len(shown) >= 4


def test_a_wide_terminal_shows_every_field():
    assert live_line(150, host_bytes=2**30).endswith("  grad 0.31  host 1.00 GiB")


def test_the_banner_neither_wraps_nor_reads_markup_in_a_file():
    console, out = plain()
    print_banner("train", {"model": "x" * 60, "not used": "[q_proj]"}, console)
    assert out.getvalue().splitlines() == ["train", f"  model     {'x' * 60}", "  not used  [q_proj]"]


def test_pace_leaves_out_the_steps_that_compile():
    pace = Throughput()
    pace.add({"tokens": 100, "seconds": 60.0, "length": 64, "mfu": 0.01}, now=60.0)
    assert pace.tokens_per_second is None
    assert pace.seconds_per_step is None
    assert pace.mfu is None
    pace.add(
        {"tokens": 100, "seconds": 1.0, "length": 64, "mfu": 0.5}, now=63.0
    )  # two seconds of evaluation in between
    pace.add({"tokens": 200, "seconds": 70.0, "length": 128, "mfu": 0.01}, now=133.0)
    pace.add({"tokens": 300, "seconds": 3.0, "length": 128, "mfu": 0.3}, now=136.0)
    assert pace.tokens_per_second == 100.0
    assert pace.seconds_per_step == 3.0
    assert pace.mfu == pytest.approx((0.5 * 1 + 0.3 * 3) / 4)  # mean over time, not over steps


def test_several_devices_have_their_share_of_the_speed():
    console, out = plain()
    with Display(4, 0, 1, console) as display:
        for step in (1, 2):
            display.step(record(step, devices=8))
    assert out.getvalue().splitlines()[1].startswith("step 2/4  loss 2.346  1024 tok/s (128 per device)  0:00 left  lr")


def test_mfu_is_shown_where_it_is_known():
    console, out = plain()
    with Display(4, 0, 1, console) as display:
        for step in (1, 2):
            display.step(record(step, mfu=0.4123))
    assert out.getvalue().splitlines()[1].startswith("step 2/4  loss 2.346  1024 tok/s  MFU 41.2%  0:00 left  lr ")
    assert "MFU" not in out.getvalue().splitlines()[0]  # that step compiled
    console, out = plain()
    with Display(4, 0, 1, console) as display:
        for step in (1, 2):
            display.step(record(step))
    assert "MFU" not in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75.2, "1:15"), (3675, "1:01:15"), (360000, "100:00:00")])
def test_duration(seconds, text):
    assert format_duration(seconds) == text
