"""A whole run: what `python -m qlora_jax.train` does once it has a configuration."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

from qlora_jax.config import Config, to_dict, write_config
from qlora_jax.data.report.text import print_report
from qlora_jax.io.adapter_init import read_initial, write_initial
from qlora_jax.io.checkpoint import CHECKPOINT_FOLDER, CONFIG_FILE, Checkpoints, saved_steps
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.progress import loading
from qlora_jax.optim.page_pool import Memory
from qlora_jax.training.banner import going_on, overview
from qlora_jax.training.compiled_step import Gradients
from qlora_jax.training.display import Display, banner
from qlora_jax.training.loop import Progress, Reporter, restore, run_steps, start, stop_on_signals
from qlora_jax.training.memory_watch import watch_peak
from qlora_jax.training.metrics import MetricsFile, read_metrics
from qlora_jax.training.plan.preflight import RunPlan, out_of_memory_told, plan_run
from qlora_jax.training.profiler import traced_steps
from qlora_jax.training.report.facts import RunReport, shown_rows
from qlora_jax.training.report.page import FACTS_FILE, PAGE_FILE, write_report
from qlora_jax.training.report.plot import plot_loss
from qlora_jax.training.session import Inputs, compile_gradients, open_inputs, prepare
from qlora_jax.training.trackers import Log, check_installed, numbers, trackers

METRICS_FILE, PLOT_FILE, TRACE_FOLDER = "metrics.jsonl", "loss.png", "trace"
SAMPLES_FILE = "samples.jsonl"
OVERSIZED = "oversized"  # the switch of a run that starts although it does not fit


def check_folder(run: Path, *, resume: bool) -> None:
    """Passes an output folder that a new run may take, or that a resumed run can go on in.

    Raises:
      ValueError: it holds a run already and `resume` is false, or the reverse; or something that is no run.
    """
    saved = bool(saved_steps(run))
    if not saved and (run / METRICS_FILE).exists():
        raise ValueError(
            f"{run} holds a run that ended before its first checkpoint (train.save_every): there is nothing to go on "
            "from. Delete the folder, or give another output, and start without --resume"
        )
    if resume and not saved:
        raise ValueError(f"--resume: {run} holds no checkpoint to go on from; start the run without --resume")
    if saved and not resume:
        raise ValueError(f"{run} already holds a run: go on with it by --resume, or give another output folder")
    if resume or not run.exists():
        _check_writable(run)
        return
    if not run.is_dir() or not (_names(run) <= {PAGE_FILE, FACTS_FILE} or (run / CONFIG_FILE).exists()):
        raise ValueError(f"{run} is there already and is no run's folder: give another output")


def _check_writable(run: Path) -> None:
    """Before data and weights are read, for minutes perhaps."""
    nearest = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"output {run}: {nearest} is a file; give another output")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"output {run}: no permission to write in {nearest}; give another output")


def dry_run(config: Config, run: Path, *, oversized: bool, console: Console) -> None:
    """Prints what the run would learn from and need, and writes it to report.html and report.json in the folder `run`.

    Raises:
      ValueError: as `train` does before it reads a weight; of a run that does not fit, once the files are written.
    """
    planned = _plan(config, console, whole=True)
    page = write_report(_report_of(planned, run, None), run)
    banner("dry run", {"report": f"{page}"}, console)
    planned.refuse_oversized(oversized)


class _Planned(NamedTuple):
    """A run that has not read a weight yet."""

    config: Config
    inputs: Inputs
    gradients: Gradients
    plan: RunPlan

    def refuse_oversized(self, allowed: bool) -> None:
        if not (self.plan.fits or allowed):
            raise ValueError(f"memory plan: {self.plan.nearest_fix()}\n  --{OVERSIZED} starts it all the same")


def _plan(config: Config, console: Console, *, whole: bool) -> _Planned:
    """Reads the data and compiles the step; prints what comes of it, or no more than the memory that it needs."""
    check_installed(config.train.track)
    inputs = open_inputs(config)
    config = _pinned(config, inputs)
    if whole:
        print_report(inputs.dataset.report, console)
    with console.status("compiling the training step"):
        gradients = compile_gradients(config, inputs)
        plan = plan_run(config, inputs, gradients)
    banner("memory plan", plan.rows() if whole else {"needs": plan.rows()["needs"]}, console)
    return _Planned(config, inputs, gradients, plan)


def _report_of(planned: _Planned, run: Path, peak: int | None) -> RunReport:
    config, inputs, _, plan = planned
    records, samples = (_records(run / name) for name in (METRICS_FILE, SAMPLES_FILE))
    return RunReport(
        config=config,
        data=inputs.dataset.report,
        rows=shown_rows(inputs.dataset),
        plan=plan,
        peak=peak,
        records=records,
        samples=samples,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.exists() else []


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


class _Report(Reporter):
    """Writes each record to metrics.jsonl, shows it, and hands its numbers on."""

    def __init__(self, metrics: MetricsFile, samples: MetricsFile, display: Display, logs: Sequence[Log]):
        self._metrics, self._samples, self._display, self._logs = metrics, samples, display, logs

    def step(self, record: dict[str, Any]) -> None:
        self._write(record)
        self._display.step(record)

    def evaluation(self, record: dict[str, Any]) -> None:
        self._write(record)
        self._display.evaluation(record)

    def evaluating(self, words: str) -> None:
        self._display.evaluating(words)

    def samples(self, records: list[dict[str, Any]]) -> None:
        for record in records:
            self._samples.write(record)
        self._display.samples(records)

    def _write(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        for log in self._logs:
            log(record["step"], numbers(record))


def train(config: Config, run: Path, *, resume: bool, oversized: bool, console: Console) -> bool:
    """Trains in the folder `run`; True when the last step is done, False when a signal ended it sooner.

    Args:
      oversized: start although the plan says that the device's memory is not enough.

    Raises:
      ValueError: bad input of any kind, a run that does not fit the device, or a loss that is not finite.
      OSError: files that cannot be read or written.
    """
    planned = _plan(config, console, whole=not resume)
    planned.refuse_oversized(oversized)
    config, inputs, gradients, plan = planned
    peak = watch_peak(Memory.of(jax.local_devices()[0]))
    with loading(console) as progress:
        session = prepare(config, inputs, gradients, progress, read_initial(run, config.lora) if resume else None)
    run.mkdir(parents=True, exist_ok=True)
    with Checkpoints(run, config.train.keep) as checkpoints:
        state = restore(session, checkpoints) if resume else start(session)
        write_config(config, run / CONFIG_FILE)
        if session.initial is not None and not resume:
            write_initial(run, session.initial)
        banner(*(going_on(session, state.step, state.best) if resume else overview(session)), console)
        display = Display(session.total_steps, state.step, config.train.log_every, console)
        with (
            trackers(config.train.track, run, to_dict(config), state.step) as logs,
            MetricsFile(run / METRICS_FILE, state.step) as metrics,
            MetricsFile(run / SAMPLES_FILE, state.step) as samples,
            display,
            stop_on_signals(display.message) as stop,
            out_of_memory_told(plan),
            traced_steps(run / TRACE_FOLDER, config.train.trace_steps) as before_step,
        ):
            state = run_steps(session, state, checkpoints, _Report(metrics, samples, display, logs), stop, before_step)
    plot_loss(read_metrics(run / METRICS_FILE), run / PLOT_FILE, title=f"{run.name}: {Path(config.model.path).name}")
    write_report(_report_of(planned, run, peak()), run)
    finished = state.step >= session.total_steps or state.best.is_enough(config.train.patience)
    _say_goodbye(config, state, session.total_steps, finished, console)
    return finished


def _pinned(config: Config, inputs: Inputs) -> Config:
    """With the commit of a model from the Hub, so that the run goes on with the files that it began with."""
    path = inputs.source.hub_name or config.model.path
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))


def next_commands(config: Config, *, finished: bool) -> dict[str, str]:
    """What to type next, by what it does, quoted for a shell."""
    run, module = config.output, "python -m qlora_jax."
    if not finished:
        return {"go on": f"{module}train --config {shlex.quote(str(Path(run) / CONFIG_FILE))} --resume"}
    form = "hf" if config.lora.method == "full" else "peft"
    with_base = " --with_base" if form == "peft" and is_gguf(config.model.path) else ""  # peft loads no GGUF file
    export = f"{module}export --run {shlex.quote(run)} --format {form}{with_base}"
    return {"try it": f"{module}generate --run {shlex.quote(run)}", "export": export}


def _say_goodbye(config: Config, state: Progress, total_steps: int, finished: bool, console: Console) -> None:
    run, step = Path(config.output), state.step
    lines = {
        "checkpoint": f"{run / CHECKPOINT_FOLDER / str(step)}",
        "report": f"{run / PAGE_FILE}",
        "loss plot": f"{run / PLOT_FILE}",
        "metrics": f"{run / METRICS_FILE}",
    }
    if config.train.samples is not None:
        lines["samples"] = f"{run / SAMPLES_FILE}"
    if config.train.trace_steps:
        lines["trace"] = f"{run / TRACE_FOLDER}: open its perfetto_trace.json.gz in https://ui.perfetto.dev"
    if config.train.keep_best and state.best.step:
        lines["best"] = f"step {state.best.step}, held-out loss {state.best.loss:.3f}: --step {state.best.step}"
    lines |= next_commands(config, finished=finished)
    early = f", for {state.best.since} evaluations found no less held-out loss" if step < total_steps else ""
    banner(f"done{early}" if finished else f"stopped after step {step}", lines, console)
