"""The report of a run on disk: report.json, and one HTML page that loads nothing: no script, no font, no picture.

Rows, paths and settings are text that someone wrote: jinja2 escapes all of it, and the page's own policy
(Content-Security-Policy) lets a browser run no script whatever came through.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from qlora_jax.config.sizes import format_bytes
from qlora_jax.config.yaml_files import config_text
from qlora_jax.data.report.stats import DataReport
from qlora_jax.data.report.text import VISIBLE, report_lines
from qlora_jax.training.display import format_duration
from qlora_jax.training.plan.preflight import RunPlan
from qlora_jax.training.plan.requirements import KINDS, Requirements
from qlora_jax.training.report.curves import charts
from qlora_jax.training.report.facts import RunReport, before_and_after, question_summary, report_json, training_summary
from qlora_jax.training.report.plot import NARROW, WIDE, Size, chart_svg, lengths_svg, loss_svg

PAGE_FILE, FACTS_FILE = "report.html", "report.json"


def write_report(report: RunReport, run: Path) -> Path:
    """Writes both files into the folder `run`, which is made; returns the page's path."""
    run.mkdir(parents=True, exist_ok=True)
    texts = {FACTS_FILE: json.dumps(report_json(report), indent=2) + "\n", PAGE_FILE: page(report)}
    for name, text in texts.items():
        part = run / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(run / name)
    return run / PAGE_FILE


def page(report: RunReport) -> str:
    """The page's text."""
    return _template().render(
        title=Path(report.config.output).name,
        model=report.config.model.path,
        tiles=_tiles(report),
        loss=_loss(report),
        curves=_curves(report),
        samples=before_and_after(report.samples),
        facts=report_lines(report.data),
        histograms=_histograms(report.data),
        used=1 - report.data.padding_share,
        rows=report.rows,
        fits=report.plan.fits,
        plan=_plan(report.plan, report.peak),
        places=list(_places(report.plan.requirements)),
        kinds=_kinds(report.plan.requirements),
        config=config_text(report.config),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # Control characters that an HTML parser would drop or replace.
    environment.filters["visible"] = lambda text: text.translate(VISIBLE)
    return environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))


class _Figure(NamedTuple):
    """A drawing on the page.

    Fields:
      label: for those who do not see it.
      wide: of one that has a row of the page to itself, for a page that is wide enough.
    """

    caption: str
    label: str
    narrow: Markup
    wide: Markup | None


Drawn = tuple[str, str, Callable[[Size], str]]  # caption, label, and the drawing of a size


def _figures(drawn: Sequence[Drawn]) -> list[_Figure]:
    """Two in a row of a wide page; the last has it to itself where their number is odd."""
    alone = len(drawn) - 1 if len(drawn) % 2 else None
    return [
        _Figure(caption, label, Markup(draw(NARROW)), Markup(draw(WIDE)) if place == alone else None)
        for place, (caption, label, draw) in enumerate(drawn)
    ]


def _loss(report: RunReport) -> list[_Figure]:
    if not training_summary(report.records):
        return []
    draw = functools.partial(loss_svg, report.records)
    return _figures([("Nats per supervised token", "loss over optimizer steps", draw)])


def _curves(report: RunReport) -> list[_Figure]:
    found = charts(report.records, report.plan.peak_bytes)
    return _figures([(c.told, f"{c.caption} over optimizer steps", functools.partial(chart_svg, c)) for c in found])


def _histograms(data: DataReport) -> list[_Figure]:
    sides = {"training rows": data.train, "held-out rows": data.eval}
    return _figures(
        [
            (f"Lengths of {name}", f"lengths of {name}", functools.partial(lengths_svg, side.lengths, data.max_length))
            for name, side in sides.items()
            if side
        ]
    )


def _plan(plan: RunPlan, peak: int | None) -> dict[str, str]:
    held = "held at most, loading included, beyond Python and its libraries"
    used = {} if peak is None else {held: _share(peak, plan.peak_bytes)}
    return {name: words for name, words in plan.rows().items() if name != "made of"} | used


def _share(peak: int, planned: int) -> str:
    return f"{format_bytes(peak)}, {peak / planned:.0%} of the plan"


def _places(need: Requirements) -> Mapping[str, Mapping[str, int]]:
    """Bytes by kind on the device, and in host memory where that holds any."""
    return {"on the device": need.device} | ({"in host memory": need.host} if any(need.host.values()) else {})


def _kinds(need: Requirements) -> list[tuple[str, list[str]]]:
    """(kind, bytes in each place) of what takes any."""
    places = _places(need).values()
    held = {kind: [place[kind] for place in places] for kind in KINDS}
    return [
        (kind, [format_bytes(count) if count else "none" for count in counts])
        for kind, counts in held.items()
        if any(counts)
    ]


def _tiles(report: RunReport) -> list[tuple[str, str]]:
    """What a reader looks for first."""
    done = training_summary(report.records)
    if not done:
        data = report.data
        return [
            ("rows", f"{data.train.kept:,} of {data.train.rows:,}"),
            ("steps an epoch", f"{data.steps_per_epoch:,}"),
            ("targets learned", f"{data.train.supervised:,}"),
            ("places used", f"{1 - data.padding_share:.1%}"),
        ]
    return [
        ("steps", f"{done['steps']:,}"),
        *_held_out(done),
        *_right(report),
        ("last training loss", "not finite" if done["last_loss"] is None else f"{done['last_loss']:.3f}"),
        ("tokens a second", f"{done['tokens_per_second']:,.0f}"),
        *([] if done["mfu"] is None else [("MFU, of the device's peak", f"{done['mfu']:.1%}")]),
        ("time in steps", format_duration(done["seconds"])),
        ("tokens seen", f"{done['tokens']:,}"),
        ("learned of them", f"{done['supervised_tokens']:,}"),
    ]


def _right(report: RunReport) -> list[tuple[str, str]]:
    return [
        (one["share"], f"{one['first']['value']:.1%} → {one['last']['value']:.1%}")
        for one in question_summary(report.records)
    ]


def _held_out(done: dict[str, Any]) -> list[tuple[str, str]]:
    if done["first_eval"] is None:
        return []
    first, last, best = (done[name] for name in ("first_eval", "last_eval", "best_eval"))
    interval = " [{:.3f}, {:.3f}]".format(*last["interval"]) if last["interval"] else ""
    told = [
        ("held-out loss", f"{first['loss']:.3f} → {last['loss']:.3f}{interval}"),
        ("its perplexity", f"{first['perplexity']:.3f} → {last['perplexity']:.3f}"),
    ]
    return (
        told if best["step"] == last["step"] else [*told, (f"least, at step {best['step']:,}", f"{best['loss']:.3f}")]
    )
