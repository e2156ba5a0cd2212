"""The report of a run on disk: report.json, and one HTML page that loads nothing: no script, no font, no picture.

Rows, paths and settings are text that someone wrote: jinja2 escapes all of it, and the page's own policy
(Content-Security-Policy) lets a browser run no script whatever came through.
"""

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from qlora_jax.config.files import config_text
from qlora_jax.config.sizes import format_bytes
from qlora_jax.data.report import DataReport
from qlora_jax.data.report_text import VISIBLE, facts
from qlora_jax.training.display import duration
from qlora_jax.training.needs import KINDS
from qlora_jax.training.plot import lengths_svg, loss_svg
from qlora_jax.training.report import RunReport, before_and_after, report_facts, training_facts
from qlora_jax.training.run_plan import RunPlan

PAGE_FILE, FACTS_FILE = "report.html", "report.json"


def write_report(report: RunReport, run: Path) -> Path:
    """Writes both files into the folder `run`, which is made; returns the page's path."""
    run.mkdir(parents=True, exist_ok=True)
    texts = {FACTS_FILE: json.dumps(report_facts(report), indent=2) + "\n", PAGE_FILE: page(report)}
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
        loss=Markup(loss_svg(report.records)) if training_facts(report.records) else None,
        samples=before_and_after(report.samples),
        facts=facts(report.data),
        histograms=_histograms(report.data),
        used=1 - report.data.padding_share,
        rows=report.rows,
        fits=report.plan.fits,
        plan=_plan(report.plan, report.peak),
        kinds=_kinds(report.plan),
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


def _histograms(data: DataReport) -> list[tuple[str, Markup]]:
    sides = {"training rows": data.train, "held-out rows": data.eval}
    return [(name, Markup(lengths_svg(side.lengths, data.max_length))) for name, side in sides.items() if side]


def _plan(plan: RunPlan, peak: int | None) -> dict[str, str]:
    used = {} if peak is None else {"held at most, loading included": _share(peak, plan.need.total)}
    return {name: words for name, words in plan.rows().items() if name != "made of"} | used


def _share(peak: int, planned: int) -> str:
    return f"{format_bytes(peak)}, {peak / planned:.0%} of the plan"


def _kinds(plan: RunPlan) -> list[tuple[str, str, str]]:
    """(kind, bytes on the device, bytes in host memory) of what takes any."""
    device, host = plan.need.device, plan.need.host
    return [(kind, format_bytes(device[kind]), format_bytes(host[kind])) for kind in KINDS if device[kind] + host[kind]]


def _tiles(report: RunReport) -> list[tuple[str, str]]:
    """What a reader looks for first."""
    done = training_facts(report.records)
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
        ("last training loss", "not finite" if done["last_loss"] is None else f"{done['last_loss']:.3f}"),
        ("tokens a second", f"{done['tokens_per_second']:,.0f}"),
        ("time in steps", duration(done["seconds"])),
        ("tokens seen", f"{done['tokens']:,}"),
        ("of them learned", f"{done['supervised_tokens']:,}"),
    ]


def _held_out(done: dict[str, Any]) -> list[tuple[str, str]]:
    if done["first_eval"] is None:
        return []
    first, last, best = (done[name] for name in ("first_eval", "last_eval", "best_eval"))
    told = [("held-out loss", f"{first['loss']:.3f} → {last['loss']:.3f}")]
    return (
        told if best["step"] == last["step"] else [*told, (f"least, at step {best['step']:,}", f"{best['loss']:.3f}")]
    )
