"""What the records of a run come to, and its curves as SVG."""

import json
from html.parser import HTMLParser

import jax
import pytest

from qlora_jax.optim.residency import Memory
from qlora_jax.training.peak import watch_peak
from qlora_jax.training.plot import lengths_svg, loss_svg
from qlora_jax.training.report import before_and_after, training_facts


def step(number: int, loss: float | None = 1.0, tokens: int = 100, seconds: float = 1.0) -> dict:
    return {"step": number, "loss": loss, "tokens": tokens, "supervised_tokens": tokens // 2, "seconds": seconds}


def test_records_of_a_run_in_figures():
    held = [{"step": 0, "eval_loss": 3.0}, {"step": 2, "eval_loss": 1.5}, {"step": 3, "eval_loss": 2.0}]
    steps = [step(1, seconds=50.0), step(2, tokens=300), step(3, 0.5)]
    found = training_facts([held[0], steps[0], steps[1], held[1], steps[2], held[2]])
    assert found == {
        "steps": 3,
        "last_loss": 0.5,
        "first_eval": {"step": 0, "loss": 3.0},
        "last_eval": {"step": 3, "loss": 2.0},
        "best_eval": {"step": 2, "loss": 1.5},
        "tokens": 500,
        "supervised_tokens": 250,
        "seconds": 52.0,
        "tokens_per_second": 100.0,  # the median of 2, 300 and 100: the first step compiled
    }


def test_a_run_without_steps_or_held_out_rows_has_no_figures_of_them():
    assert training_facts([]) == training_facts([{"step": 0, "eval_loss": 3.0}]) == {}
    found = training_facts([step(1, None)])
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
        (loss_svg([{"step": 0, "eval_loss": 3.0}, step(1, 2.0), step(2, 1.0)]), ("held out", "optimizer step")),
        (lengths_svg({3: 1, 40: 5}, 32), ("data.max_length 32", "tokens a row, before any is cut")),
    ],
    ids=["loss", "lengths"],
)
def test_svg_has_the_pages_colours_and_text_that_stays_text(svg, words):
    assert svg.startswith("<svg") and Elements(svg).tags[0] == "svg"
    assert "var(--ink)" in svg and "var(--first)" in svg and "var(--second)" in svg and "#0" not in svg
    for word in words:
        assert word in svg


def test_max_length_is_drawn_only_where_rows_reach_it():
    assert "max_length" not in lengths_svg({3: 1, 31: 5}, 32)


def test_the_peak_is_what_came_after_the_watch_began():
    peak = watch_peak(Memory.of(jax.local_devices(backend="cpu")[0]))
    before = peak()
    if before is None:
        pytest.skip("this system does not let a process forget its peak")
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert 60 << 20 < peak() - before < 80 << 20
