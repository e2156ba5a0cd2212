"""Trains one run: checks, data report, memory plan, steps, checkpoints and report page."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from qlora_jax.config import Config, to_dict, write_config
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.config.rewards import check_rewards_given
from qlora_jax.config.rollouts import check_tools_given
from qlora_jax.config.schema import MeshSize
from qlora_jax.data.formats.turn_fields import Tools
from qlora_jax.hosts.group import Group
from qlora_jax.hosts.watchdog import Watchdog, stop_on_signals
from qlora_jax.io.head_file import HEAD_FILE, check_same_head, read_run_head, write_head
from qlora_jax.io.initial_file import read_initial, write_initial
from qlora_jax.io.loading.base_fingerprint import same_form
from qlora_jax.io.loading.progress import loading
from qlora_jax.io.run_folder.checkpoint import (
    CHECKPOINT_FOLDER,
    CONFIG_FILE,
    Checkpoints,
    LockedCheckpoints,
    newest_state,
    saved_fingerprint,
    saved_steps,
)
from qlora_jax.io.run_folder.run_lock import LOCK_FILE, RunLock, lock_run
from qlora_jax.models.partition import Lora
from qlora_jax.rewards.functions import RewardFunctions
from qlora_jax.rollouts.episodes import open_endpoint
from qlora_jax.training.device_mesh import local_devices
from qlora_jax.training.display.banner import next_commands, rate_rows, resume_banner, start_banner
from qlora_jax.training.display.run_display import Display, print_banner
from qlora_jax.training.loop import initial_state, run_steps, save
from qlora_jax.training.metrics.memory_watch import watch_peak
from qlora_jax.training.metrics.metrics_file import (
    JSON_FILE,
    METRICS_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
    Record,
    read_metrics,
)
from qlora_jax.training.metrics.trackers import Log, trackers
from qlora_jax.training.plan.records import RunPlan
from qlora_jax.training.plan.run_plan import PlannedRun, plan_before_weights
from qlora_jax.training.plan.text import explain_out_of_memory, nearest_fix
from qlora_jax.training.prepare_teacher import FOLDER as PREDICTIONS
from qlora_jax.training.prepare_teacher import prepare_teacher
from qlora_jax.training.profiler import traced_steps
from qlora_jax.training.reference_logps import ReferenceStopped, record_start, with_initial, with_reference
from qlora_jax.training.report.page import write_json, write_report
from qlora_jax.training.report.plot import loss_label, plot_loss
from qlora_jax.training.report.report_json import RunReport, report_rows
from qlora_jax.training.reporters import Listener, file_reporter
from qlora_jax.training.resume import TrainState, restore, settings_to_resume
from qlora_jax.training.run_spec import PreparedModel, RunInputs, RunSpec
from qlora_jax.training.session import Session, headed_parts, load_base, make_manager, make_session, prepare
from qlora_jax.training.several_processes import (
    SilentReporter,
    connect_devices,
    lock_together,
    stop_together,
    without_place,
)
from qlora_jax.training.time_limit import finishes_within
from qlora_jax.verifiers.process import allow, is_address

OVERSIZED = "oversized"  # the flag that starts a run although it does not fit
PLOT_FILE, TRACE_FOLDER = "loss.png", "trace"
REPORT_SECONDS = 5.0  # for the plot and the report of a run that a signal stopped


@contextlib.contextmanager
def lock_output(
    run: Path, *, resume: bool, allowed: Collection[Path] = (), warn: Callable[[str], object]
) -> Iterator[RunLock]:
    """Locks the output folder, and checks that it can hold a new run, or holds a run to resume.

    Args:
      allowed: files that a new run's folder may contain.
      warn: called with a message if the filesystem does not support locks.

    Raises:
      ValueError: another process trains in the folder; the folder holds a run and `resume` is false, or the reverse;
        or it holds other files.
    """
    _check_is_run_folder(run, allowed)  # first, because the lock is a file in it
    with lock_run(run, warn) as lock:
        saved = bool(saved_steps(run))
        if not saved and (run / METRICS_FILE).exists():
            raise ValueError(
                f"{run}: the run in it ended before its first checkpoint (train.save_every) and cannot be resumed. "
                "Delete the folder or give another output, and start without --resume"
            )
        if resume and not saved:
            raise ValueError(f"{run}: has no checkpoint to resume. Start without --resume")
        if saved and not resume:
            raise ValueError(f"{run}: contains a run. Resume it with --resume, or give another output")
        yield lock


def _check_is_run_folder(run: Path, allowed: Collection[Path]) -> None:
    known = {PAGE_FILE, JSON_FILE, LOCK_FILE, PREDICTIONS, *(path.name for path in allowed)}
    if not run.exists() or (run / CONFIG_FILE).exists() or saved_steps(run):
        return
    if not run.is_dir() or not {entry.name for entry in run.iterdir()} <= known:
        raise ValueError(f"{run}: exists and is not a run folder. Give another output")


def dry_run(
    config: Config,
    run: Path,
    *,
    resume: bool,
    oversized: bool,
    console: Console,
    group: Group | None = None,
    accept_changed_reward: bool = False,
) -> None:
    """Prints the data report and memory plan, and writes them to report.html and report.json in the folder `run`.

    Args:
      group: the processes of the run; only the first writes. None for one process.

    Raises:
      ValueError: bad input, as in `train`; the run does not fit, after the files are written.
    """
    group = group or Group()
    first = lock_output(run, resume=resume, warn=_warning(console))
    with lock_together(group, first, config, run):
        config = _settings(config, run, accept_changed_reward) if resume else config
        with _reward_functions(config) as rewards:
            how = {"group": group, "tools": _schemas(rewards), "check": functools.partial(_check_columns, rewards)}
            planned = plan_before_weights(config, console, full=True, **how)
        if group.is_first:
            page, steps = write_report(_report_of(planned, run, None), run), planned.run.total_steps
            rows = {"steps": f"{steps:,}", **rate_rows(planned.run.config, steps), "report": f"{page}"}
            print_banner("dry run", rows, console)
        _refuse_oversized(planned, oversized)


def _settings(config: Config, run: Path, accept_changed_reward: bool) -> Config:
    return settings_to_resume(config, newest_state(run), accept_changed_reward=accept_changed_reward)


@contextlib.contextmanager
def _reward_functions(config: Config) -> Iterator[RewardFunctions | None]:
    """Starts the processes of the run's reward functions, if it has any, and ends them.

    Raises:
      ValueError: no function is given, or one cannot be imported or called.
    """
    if not OBJECTIVES[config.objective].policy:
        yield None
        return
    check_rewards_given(config.rewards, config.reward, f"objective={config.objective}", config.environment)
    check_tools_given(config.rollouts, config.tool, config.environment)
    if config.environment is not None and is_address(config.environment):
        allow(config.environment)
        open_endpoint()
    code = config.reward, config.tool, config.environment, config.rollouts.tool_timeout
    with RewardFunctions(config.rewards, *code) as functions:
        yield functions


def _schemas(functions: RewardFunctions | None) -> Tools:
    return () if functions is None or functions.tools is None else functions.tools.schemas


def _check_columns(rewards: RewardFunctions | None, inputs: RunInputs) -> None:
    """Raises ValueError for reward functions that need a column which the rows do not have."""
    if rewards is None or inputs.rollouts is None:
        return
    for rows in filter(None, (inputs.rollouts.prompts, inputs.rollouts.held_out)):
        rewards.check_columns(rows.names)


def _refuse_oversized(planned: PlannedRun, allowed: bool) -> None:
    """Raises ValueError with the nearest change that fits if the run does not fit and is not allowed to start."""
    if not (planned.plan.fits or allowed):
        lines = [f"memory plan: {nearest_fix(planned.plan)}", *_refused_lines(planned.refused)]
        raise ValueError("\n  ".join([*lines, f"--{OVERSIZED} starts it anyway"]))


def _refused_lines(refused: Mapping[MeshSize, Sequence[str]]) -> list[str]:
    """Describes the first mesh that was not tried."""
    return [f"mesh ({size}) was not tried. {problem}" for size, problems in refused.items() for problem in problems][:1]


def _warning(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


def _report_of(planned: PlannedRun, run: Path, peak: int | None) -> RunReport:
    dataset = planned.run.inputs.dataset
    records, samples = (_records(run / name) for name in (METRICS_FILE, SAMPLES_FILE))
    return RunReport(
        config=planned.run.config,
        data=dataset.report,
        rows=report_rows(dataset),
        plan=planned.plan,
        peak=peak,
        records=records,
        samples=samples,
    )


def _records(path: Path) -> list[Record]:
    return read_metrics(path) if path.exists() else []


def train(
    config: Config,
    run: Path,
    *,
    resume: bool,
    oversized: bool,
    console: Console,
    watchdog: Watchdog | None = None,
    accept_changed_reward: bool = False,
) -> "Trained":
    """Trains in the folder `run`.

    Args:
      oversized: start even if the memory plan says that the run does not fit.
      watchdog: of the processes of the run; None for one process.
      accept_changed_reward: a resumed run may have other files of reward functions.

    Raises:
      ValueError: bad input, a run that does not fit the device, or a loss that is not finite.
      OSError: a file cannot be read or written.
    """
    watchdog = watchdog or Watchdog(Group())
    first = lock_output(run, resume=resume, warn=_warning(console))
    with lock_together(watchdog.group, first, config, run) as lock:
        how = {"resume": resume, "oversized": oversized, "console": console, "watchdog": watchdog}
        return run_training(config, lock, **how, accept_changed_reward=accept_changed_reward)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a run after `step` optimizer steps; `signal` is the number of one that stopped it early, or 0.

    `rounded` is False if all steps came before those with rounded weights (`lora.merge_from`).
    """

    lora: Lora
    step: int
    finished: bool
    signal: int
    rounded: bool


def run_training(
    config: Config,
    lock: RunLock,
    *,
    resume: bool,
    oversized: bool,
    console: Console,
    model: PreparedModel | None = None,
    watchdog: Watchdog | None = None,
    listener: Listener | None = None,
    accept_changed_reward: bool = False,
) -> Trained:
    """Trains like `train`, and returns the trained parameters.

    Args:
      lock: of the run's folder.
      model: a base with an adapter in memory; None to load the base and add an adapter, as `config` says. Its LoRA
        parameters are donated to the first step.
      watchdog: watches the processes of the run; only the first writes records and reports. None for one process.
      listener: receives the records.
    """
    run, watchdog = lock.folder, watchdog or Watchdog(Group())
    is_first, resumed = watchdog.group.is_first, run if resume else None
    config = _settings(config, run, accept_changed_reward) if resume else config
    with contextlib.ExitStack() as stack:
        rewards = stack.enter_context(_reward_functions(config))
        how = {"tools": _schemas(rewards), "check": functools.partial(_check_columns, rewards)}
        planned = plan_before_weights(config, console, full=not resume, model=model, group=watchdog.group, **how)
        if resume:
            check_same_head(f"{run / HEAD_FILE}", read_run_head(run, config.objective), planned.run.inputs.head)
        _refuse_oversized(planned, oversized)
        with console.status("compiling the programs of all lengths"):
            planned.compile_all_lengths(resume=resume)
        config = without_place(planned.run.config)
        planned = planned._replace(run=dataclasses.replace(planned.run, config=config))
        peak = watch_peak(local_devices(planned.run.mesh))
        connect_devices(watchdog.group, planned.run.mesh, config.hosts.stuck_after)
        teacher = prepare_teacher(planned.run, console)  # before the weights, because it may be larger than the model
        session = with_initial(_session(planned.run, resumed, model, console), resumed)
        session = dataclasses.replace(session, rewards=rewards, teacher=teacher)
        with LockedCheckpoints(lock, config.train.keep) as checkpoints:
            state = _first_state(session, checkpoints, run, resume=resume, console=console, writes=is_first)
            if is_first and not resume:
                write_json(_report_of(planned, run, None), run)
            if model is not None and not resume:
                record_start(session, run)
            # Closed after the report is written, because a tracker may upload for a long time.
            logs = stack.enter_context(
                trackers(config.train.track if is_first else (), run, to_dict(config), state.step)
            )
            state, signal = _train_on(
                session, state, checkpoints, planned.plan, logs, run, console, watchdog, listener or Listener()
            )
        lock.check()
        trained = _result(session, state, signal)
        if is_first:
            reported = _write_reports(planned, run, peak, limited=not trained.finished)
            _print_end(session.run, state, finished=trained.finished, reported=reported, console=console)
    return trained


def _result(session: Session, state: TrainState, signal: int) -> Trained:
    at_end = state.step >= session.run.total_steps or state.best.should_stop(session.run.config.train.patience)
    finished = at_end and not state.evaluation_due
    rounded = session.run.config.lora.merge_from == 0 or state.step > session.run.first_rounded
    ended_by = 0 if finished else signal
    return Trained(lora=state.lora, step=state.step, finished=finished, signal=ended_by, rounded=rounded)


def _first_state(
    session: Session, checkpoints: Checkpoints, run: Path, *, resume: bool, console: Console, writes: bool
) -> TrainState:
    """Returns the state of a new or resumed run, and writes its settings if `writes`."""
    state = restore(session, checkpoints) if resume else initial_state(session)
    if writes:
        write_config(session.run.config, run / CONFIG_FILE)
    if writes and session.run.inputs.head is not None and not resume:
        write_head(run, session.run.inputs.head)
    if writes and session.initial is not None and not resume:
        write_initial(run, session.initial)
    print_banner(*(resume_banner(session, state.step, state.best) if resume else start_banner(session)), console)
    return state


def _train_on(
    session: Session,
    state: TrainState,
    checkpoints: Checkpoints,
    plan: RunPlan,
    logs: Sequence[Log],
    run: Path,
    console: Console,
    watchdog: Watchdog,
    listener: Listener,
) -> tuple[TrainState, int]:
    """Trains to the end of the run, or until a signal; returns the state, which is saved, and the signal or 0."""
    settings, is_first = session.run.config.train, watchdog.group.is_first
    display = Display(session.run.total_steps, state.step, settings.log_every, console)
    with (
        file_reporter(state, display, logs, run, listener)
        if is_first
        else contextlib.nullcontext(SilentReporter()) as reporter,
        display,
        stop_on_signals(display.message) as asked,
        explain_out_of_memory(plan),
        traced_steps(run / TRACE_FOLDER, settings.trace_steps if is_first else 0) as before_step,
    ):
        stop = stop_together(watchdog, asked, session.run.mesh)
        watchdog.group.barrier("the first step", session.run.config.hosts.stuck_after)
        with watchdog.limited(session.run.config.hosts.stuck_after):
            try:
                session = with_reference(
                    session,
                    state,
                    watchdog.group,
                    lambda: stop() > 0,
                    progress=reporter.evaluation_progress,
                    message=display.message if is_first else reporter.evaluation_progress,
                )
            except ReferenceStopped:
                if state.step == 0:  # a run can be resumed from a checkpoint alone
                    save(session, state, checkpoints, reporter)
            else:
                state = run_steps(
                    session, state, checkpoints, reporter, lambda: listener.stops or stop() > 0, before_step
                )
            return state, stop()


def _write_reports(planned: PlannedRun, run: Path, peak: Callable[[], int | None], *, limited: bool) -> bool:
    """Writes the loss plot and the report; returns False if they were skipped because they took too long.

    Args:
      limited: a signal stopped the run, so that a scheduler may soon kill the process.
    """

    def write() -> None:
        config = planned.run.config
        title, label = f"{run.name}: {Path(config.model.path).name}", loss_label(config.objective)
        plot_loss(_records(run / METRICS_FILE), run / PLOT_FILE, title, label)
        write_report(_report_of(planned, run, peak()), run)

    if limited:
        return finishes_within(REPORT_SECONDS, write)
    write()
    return True


def _session(run: RunSpec, resumed: Path | None, model: PreparedModel | None, console: Console) -> Session:
    """Returns the session of a new run, or of the run in the folder `resumed`."""
    initial = None if resumed is None else read_initial(resumed, run.config.lora)
    saved = None if resumed is None else saved_fingerprint(resumed)
    if model is None:
        with loading(console) as progress:
            return prepare(run, progress, initial, saved)
    state_manager = make_manager(run)
    fingerprint = model.fingerprint
    if saved is not None and not same_form(saved, fingerprint):
        with loading(console) as progress:  # once more, because the form of earlier versions takes all bytes
            loaded, _ = load_base(run, progress, model.initial, saved)
        fingerprint = loaded.fingerprint
    found = {"fingerprint": fingerprint, "initial": model.initial}
    return make_session(run, headed_parts(run, model.parts), state_manager, **found)


def _print_end(of: RunSpec, state: TrainState, *, finished: bool, reported: bool, console: Console) -> None:
    config = of.config
    run, step = Path(config.output), state.step
    reports = {"report": f"{run / PAGE_FILE}", "loss plot": f"{run / PLOT_FILE}"}
    if not reported:
        reports = {"report": f"skipped, because it took more than {REPORT_SECONDS:g} s; the resumed run writes it"}
    lines = {
        "checkpoint": f"{run / CHECKPOINT_FOLDER / str(step)}",
        **reports,
        "metrics": f"{run / METRICS_FILE}",
    }
    if config.train.samples is not None:
        lines["samples"] = f"{run / SAMPLES_FILE}"
    if config.train.trace_steps:
        lines["trace"] = f"{run / TRACE_FOLDER}: open its perfetto_trace.json.gz in https://ui.perfetto.dev"
    if config.train.keep_best and state.best.step:
        lines["best"] = f"step {state.best.step}, held-out loss {state.best.loss:.3f}: --step {state.best.step}"
    lines |= next_commands(config, of.inputs.source.config, finished=finished)
    early = f", after {state.best.since} evaluations without a lower held-out loss" if step < of.total_steps else ""
    print_banner(f"done{early}" if finished else f"stopped after step {step}", lines, console)
