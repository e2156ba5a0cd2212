"""Ends training runs at random moments and resumes them: each must equal an uninterrupted run to the bit.

    python -m scripts.campaign.kills --cases 40 --seed 0 --output DIR [--kinds paged_adamw packed ...]

A case sends SIGKILL, SIGTERM or SIGINT one to three times: anywhere, after a step, inside a save, or inside a reward
function, there also SIGKILL to its process. Then it resumes the run, or starts it again if it had no checkpoint, and
compares parameters, optimizer state, data position, metrics and samples. A case fails if they differ, if the run cannot
be resumed, or if it leaves a process of rewards behind.
"""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from qlora_jax.config import read_config
from qlora_jax.config.command_line import SIGNALLED
from qlora_jax.io.run_folder.checkpoint import CHECKPOINT_FOLDER, saved_steps
from qlora_jax.training.metrics.metrics_file import METRICS_FILE
from scripts.campaign.command import Campaign, main_of
from scripts.campaign.commands import Running, run_command
from scripts.campaign.isolation import CaseRunner, Limits
from scripts.campaign.ledger import Case, Verdict
from scripts.campaign.run_results import (
    CACHE,
    CONFIG,
    DIGEST,
    SCORING,
    WORKERS,
    TinyRun,
    moved,
    run_digest,
    write_settings,
)

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOMENTS = ("anywhere", "after a step", "in a save", "in a save")
IN_REWARD, IN_ITS_PROCESS = "in a reward", "to the process of a reward"
WITH_REWARDS = ("anywhere", "after a step", "in a save", IN_REWARD, IN_ITS_PROCESS)
LEFT_SECONDS = 10.0  # until a process of rewards has ended with its run
LIMITS = Limits(wall_seconds=900.0, cases=50)
SECONDS = "seconds.txt"
COMPILED = 0.5  # the duration of a run that finds compiled programs, as a part of the first run's
# Room for five eighths of the state: 64 KiB of AdamW, 32 KiB of Lion. Only large arrays have 8-bit state.
PAGING = dict(paging="on", paging_budget="40KiB")
EVALUATED = dict(data=dict(eval_fraction=0.2), train=dict(eval_every=2, keep_best=True))
UNRANKED = dict(rank=16, dropout=0.0)  # defaults, for methods that have neither
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate"]
VARIANTS: Mapping[str, TinyRun] = {
    "adamw": TinyRun(),
    "adamw_8bit": TinyRun(sections={"optim": dict(name="adamw_8bit"), "lora": dict(rank=64)}),
    "lion": TinyRun(sections={"optim": dict(name="lion_32bit")}),
    "lion_8bit": TinyRun(sections={"optim": dict(name="lion_8bit"), "lora": dict(rank=64)}),
    "paged_adamw": TinyRun(sections={"optim": dict(name="paged_adamw_32bit", **PAGING)}),
    "paged_adamw_8bit": TinyRun(
        sections={
            "optim": dict(name="paged_adamw_8bit", paging="on", paging_budget="160KiB"),
            "lora": dict(rank=64),
        }
    ),
    "paged_lion": TinyRun(sections={"optim": dict(name="paged_lion_32bit", paging="on", paging_budget="20KiB")}),
    "buckets": TinyRun(sections={"data": dict(buckets=2)}),
    "packed": TinyRun(sections={"data": dict(packing=True)}),
    "accumulated": TinyRun(sections={"train": dict(accumulation=2), "lora": dict(dtype="bfloat16")}),
    "dora": TinyRun(sections={"lora": dict(method="dora")}),
    "ia3": TinyRun(sections={"lora": dict(method="ia3", **UNRANKED)}),
    "ln_tuning": TinyRun(sections={"lora": dict(method="ln_tuning", **UNRANKED)}),
    "houlsby": TinyRun(sections={"lora": dict(method="houlsby", dropout=0.0)}),
    "pissa": TinyRun(sections={"lora": dict(init="pissa")}),
    "loftq": TinyRun(sections={"lora": dict(init="loftq"), "optim": dict(name="paged_adamw_32bit", **PAGING)}),
    "full": TinyRun(sections={"lora": dict(method="full", **UNRANKED), "model": dict(quant_type="none")}),
    "keep_16bit": TinyRun(sections={"model": dict(keep_16bit=["v_proj", "layers.1.mlp.down_proj"])}),
    "new_tokens": TinyRun(sections={"model": dict(new_tokens=["<tool>"])}),
    "evaluated": TinyRun(sections=EVALUATED),
    "sampled": TinyRun(
        sections=EVALUATED | {"train": EVALUATED["train"] | dict(samples="prompts.txt", sample_tokens=4)}
    ),
    "dpo": TinyRun(objective="dpo", sections=EVALUATED | {"lora": dict(dropout=0.0)}),
    "grpo": TinyRun(
        objective="grpo",
        sections=EVALUATED
        | {
            "data": dict(eval_fraction=0.2, max_length=64),
            "lora": dict(dropout=0.0),
            "policy": dict(max_redraws=1),
            "rollouts": dict(num_generations=2, max_completion_length=8),
        },
    ),
    "classification": TinyRun(objective="classification", sections=EVALUATED),
    "experts": TinyRun(
        family="qwen3moe",
        sections={"lora": dict(target_parameters=EXPERTS, dropout=0.0), "router": dict(aux_loss_coef=0.01)},
    ),
    "offloaded_experts": TinyRun(
        family="gptoss", sections={"model": dict(experts="offload"), "train": dict(remat="names")}
    ),
}


@dataclasses.dataclass(frozen=True)
class KilledRun:
    """Runs of one set of settings."""

    run: TinyRun
    shared: str | None = None

    def write_sound(self, folder: Path) -> None:
        """Writes the model, the rows, and the digest of an uninterrupted run, which fills the cache of programs."""
        run = folder / "run"
        words = write_settings(moved(self.run.write(folder, run), folder, run), folder / CONFIG)
        began = time.monotonic()
        done = run_command(words, folder / "printed.txt", folder / CACHE)
        if done.status != 0:
            raise RuntimeError(f"the uninterrupted run failed:\n{done.output}")
        (folder / SECONDS).write_text(str(COMPILED * (time.monotonic() - began)))
        (folder / DIGEST).write_text(run_digest(run))
        shutil.rmtree(run)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Returns the function that runs a case."""
        expected, seconds = (sound / DIGEST).read_text(), float((sound / SECONDS).read_text())

        def run(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            folder = scratch / "case"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            return _killed_and_resumed(chance, sound, folder, expected, seconds)

        return run


def _killed_and_resumed(chance: random.Random, sound: Path, folder: Path, expected: str, seconds: float) -> Verdict:
    run, printed, cache = folder / "run", folder / "printed.txt", sound / CACHE
    config = moved(read_config(sound / CONFIG), sound, run)
    words = write_settings(config, folder / CONFIG)
    moments = WITH_REWARDS if config.objective == "grpo" else MOMENTS
    sent: list[str] = []
    status = None
    for _ in range(chance.choice((1, 1, 2, 3))):
        (folder / SCORING).unlink(missing_ok=True)
        process = Running([*words, *_resume(run)], printed, cache)
        number = chance.choice(SIGNALS)
        sent.append(_kill(number, chance.choice(moments), chance, process, run, seconds))
        done = process.wait()
        # After the end, after a signal that was noticed, and from the signal itself.
        if done.status not in (0, SIGNALLED + number, -number):
            return Verdict("lost", f"status {done.status}: {done.last_line} | {'; '.join(sent)}")
        status = done.status
    if status != 0:
        done = run_command([*words, *_resume(run)], printed, cache)
        if done.status != 0:
            return Verdict("lost", f"status {done.status}: {done.last_line} | {'; '.join(sent)}")
    if left := _left(folder / WORKERS):
        return Verdict("left", f"processes {left} | {'; '.join(sent)}")
    return Verdict("equal" if run_digest(run) == expected else "differs", f"| {'; '.join(sent)}")


def _left(workers: Path) -> list[int]:
    """Returns the processes of rewards that run on after their run."""
    pids = {*map(int, workers.read_text().split())} if workers.exists() else set[int]()
    deadline = time.monotonic() + LEFT_SECONDS
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(pid: int) -> bool:
    """Returns True if a process of rewards has this number, not one that ended and waits to be reaped."""
    try:
        return b"qlora_jax.rewards" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def _resume(run: Path) -> list[str]:
    """Returns the switch that resumes a run; removes a run without a checkpoint, as the error message says."""
    if saved_steps(run):
        return ["--resume"]
    shutil.rmtree(run, ignore_errors=True)
    return []


def _kill(number: int, moment: str, chance: random.Random, process: Running, run: Path, seconds: float) -> str:
    """Sends a signal at a moment; returns what it did."""
    if moment == "anywhere":
        deadline = time.monotonic() + chance.uniform(0.0, seconds)
        process.wait_until(lambda: time.monotonic() > deadline)
    else:
        before = _size(run / METRICS_FILE)
        process.wait_until(lambda: _size(run / METRICS_FILE) != before)
        if moment == "in a save":
            process.wait_until(lambda: _saving(run), every=0.0003)
        if moment in (IN_REWARD, IN_ITS_PROCESS):
            process.wait_until((run.parent / SCORING).exists, every=0.0003)
        time.sleep(chance.uniform(0.0, 0.2 if moment == "after a step" else 0.01))
    saving = ", while it saved" if _saving(run) else ""
    ended = process.ended()
    if moment == IN_ITS_PROCESS and not ended:
        worker = int((run.parent / WORKERS).read_text().split()[-1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        return f"SIGKILL {moment}"
    process.send(number)
    return "ended before the signal" if ended else f"{signal.Signals(number).name} {moment}{saving}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _saving(run: Path) -> bool:
    try:
        return any("tmp" in entry.name for entry in (run / CHECKPOINT_FOLDER).iterdir())
    except FileNotFoundError:
        return False


def campaign() -> Campaign:
    """Returns the campaign."""
    return Campaign("kills", {name: KilledRun(run) for name, run in VARIANTS.items()}, LIMITS)


if __name__ == "__main__":
    main_of(campaign, __doc__)
