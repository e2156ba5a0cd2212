"""Writes the report of a run: report.json, and an HTML page that loads no script, font or image.

Rows, paths and settings are untrusted text. jinja2 escapes all of it, and the page's Content-Security-Policy keeps a
browser from running scripts.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from qlora_jax.atomic_files import write_text
from qlora_jax.config.sizes import format_bytes
from qlora_jax.config.yaml_files import config_text
from qlora_jax.data.report.stats import DataReport
from qlora_jax.data.report.text import report_lines
from qlora_jax.page_template import page_template
from qlora_jax.training.display.banner import rate_rows
from qlora_jax.training.metrics.metrics_file import JSON_FILE, PAGE_FILE
from qlora_jax.training.metrics.record_summaries import before_and_after, training_summary
from qlora_jax.training.plan.records import BREAKDOWN, KINDS, Requirements, RunPlan
from qlora_jax.training.report.curves import charts
from qlora_jax.training.report.plot import NARROW, WIDE, Size, chart_svg, lengths_svg, loss_label, loss_svg
from qlora_jax.training.report.report_json import RunReport, report_json
from qlora_jax.training.report.tiles import result_tiles


def write_report(report: RunReport, run: Path) -> Path:
    """Writes both files into the folder `run`, which it creates if necessary; returns the page's path."""
    run.mkdir(parents=True, exist_ok=True)
    write_json(report, run)
    write_text(run / PAGE_FILE, page(report))
    return run / PAGE_FILE


def write_json(report: RunReport, run: Path) -> None:
    """Writes report.json alone, from which `watch` takes the length and the memory plan of a run that trains."""
    write_text(run / JSON_FILE, json.dumps(report_json(report), indent=2) + "\n")


def page(report: RunReport) -> str:
    """Returns the page as HTML."""
    return page_template(__package__, "report.html.jinja").render(
        title=Path(report.config.output).name,
        model=report.config.model.path,
        tiles=_tiles(report),
        loss=_loss(report),
        curves=_curves(report),
        samples=before_and_after(report.samples),
        facts=[*report_lines(report.data), *_learning_rate(report).items()],
        histograms=_histograms(report.data),
        used=1 - report.data.padding_share,
        rows=report.rows,
        head=report.data.parts.head,
        fits=report.plan.fits,
        plan=_plan(report.plan, report.peak),
        places=list(_places(report.plan.requirements)),
        kinds=_kinds(report.plan.requirements),
        config=config_text(report.config),
    )


class _Figure(NamedTuple):
    """A drawing on the page.

    Fields:
      label: the text for screen readers.
      narrow: the drawing for half a page or a phone.
      wide: the drawing for a full row of a wide page; None if it shares a row.
    """

    caption: str
    label: str
    narrow: Markup
    wide: Markup | None


Drawing = tuple[str, str, Callable[[Size], str]]  # caption, label, function that draws at a size


def _figures(drawings: Sequence[Drawing]) -> list[_Figure]:
    """Arranges two drawings per row of a wide page; the last of an odd number takes a full row."""
    full_row = len(drawings) - 1 if len(drawings) % 2 else None
    return [
        _Figure(caption, label, Markup(draw(NARROW)), Markup(draw(WIDE)) if index == full_row else None)
        for index, (caption, label, draw) in enumerate(drawings)
    ]


def _loss(report: RunReport) -> list[_Figure]:
    if not training_summary(report.records):
        return []
    draw = functools.partial(loss_svg, report.records)
    objective = report.config.objective
    label = loss_label(objective)
    caption = "Nats per supervised token" if objective == "sft" else f"{label[0].upper()}{label[1:]}"
    return _figures([(caption, "loss over optimizer steps", draw)])


def _curves(report: RunReport) -> list[_Figure]:
    found = charts(report.records, report.plan.peak_bytes)
    return _figures([(c.title, f"{c.caption} over optimizer steps", functools.partial(chart_svg, c)) for c in found])


def _learning_rate(report: RunReport) -> dict[str, str]:
    return rate_rows(report.config, report.config.train.total_steps(report.data.steps_per_epoch))


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
    name = "measured peak, including loading, without Python and its libraries"
    measured = {} if peak is None else {name: _share(peak, plan.peak_bytes)}
    return {name: text for name, text in plan.rows().items() if name != BREAKDOWN} | measured


def _share(peak: int, planned: int) -> str:
    return f"{format_bytes(peak)}, {peak / planned:.0%} of the plan"


def _places(requirements: Requirements) -> Mapping[str, Mapping[str, int]]:
    """Returns the bytes by kind on the device, and in host memory if it has any."""
    return {"device": requirements.device} | (
        {"host memory": requirements.host} if any(requirements.host.values()) else {}
    )


def _kinds(requirements: Requirements) -> list[tuple[str, list[str]]]:
    """Returns (kind, bytes in each place) of the kinds that are not zero."""
    places = _places(requirements).values()
    sizes = {kind: [place[kind] for place in places] for kind in KINDS}
    return [
        (kind, [format_bytes(count) if count else "none" for count in counts])
        for kind, counts in sizes.items()
        if any(counts)
    ]


def _tiles(report: RunReport) -> list[tuple[str, str]]:
    """Returns the figures at the top of the page."""
    data = report.data
    return result_tiles(report.records) or [
        ("rows", f"{data.train.kept:,} of {data.train.rows:,}"),
        ("steps per epoch", f"{data.steps_per_epoch:,}"),
        ("supervised targets", f"{data.train.supervised:,}"),
        ("positions used", f"{1 - data.padding_share:.1%}"),
    ]
