"""Runs of a tiny model for campaigns, and the digest of all that a run must give: arrays, state, records, samples."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from qlora_jax.config import Config, write_config
from qlora_jax.config.schema import ObjectiveName
from qlora_jax.inference.result_cache import digest
from qlora_jax.io.run_folder.checkpoint import CHECKPOINT_FOLDER, saved_steps
from qlora_jax.training.metrics.metrics_file import METRICS_FILE, SAMPLES_FILE
from qlora_jax.training.resume import RESUME_KEYS
from qlora_jax.untrusted_json import JsonObject
from scripts.campaign.isolation import FORK
from tests.e2e.project import project
from tests.e2e.run_records import comparable_records
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder

STEPS = 8
DIGEST, CONFIG, CACHE = "digest.txt", "config.yaml", "cache"
MODEL, ROWS, PROMPTS = "model", "rows.jsonl", "prompts.txt"
REWARDS, SCORING, WORKERS = "rewards.py", "scoring.txt", "workers.txt"
REWARD = f'''
import os
import time
from pathlib import Path

HERE = Path(__file__).parent


def scored(completions, **columns):
    """Returns rewards that differ, and says for a while in a file that it runs, and in which process."""
    with (HERE / "{WORKERS}").open("a") as file:
        file.write(f"{{os.getpid()}}\\n")
    (HERE / "{SCORING}").touch()
    time.sleep(0.03)
    (HERE / "{SCORING}").unlink(missing_ok=True)
    return [float(sum(map(ord, one)) % 3) for one in completions]
'''
PLACES = ("config", "versions")  # keys of a checkpoint's state that name paths and libraries


TRAIN = dict(steps=STEPS, micro_batch_size=2, accumulation=1, save_every=1, eval_every=0)
DATA = dict(eval_fraction=0.0, buckets=1)  # a bucket is a program, which each process traces
SEPARATE = ("preference", "head", "router", "policy", "rollouts")  # sections that `project` does not take


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyRun:
    """A run of a tiny model.

    Attributes:
      sections: settings that differ from TRAIN, DATA and those of `project`, by section.
      objective: loss of the run, which determines its rows.
      family: a family of tests/io/gguf_families.py; None for a Llama.
    """

    sections: Mapping[str, JsonObject] = dataclasses.field(default_factory=dict)
    objective: ObjectiveName = "sft"
    family: str | None = None

    def write(self, folder: Path, output: Path) -> Config:
        """Writes model, rows and prompts into `folder`; returns the settings of a run."""
        sections = {name: dict(values) for name, values in self.sections.items()}
        sections["train"], sections["data"] = TRAIN | sections.get("train", {}), DATA | sections.get("data", {})
        separate = {name: sections.pop(name) for name in SEPARATE if name in sections}
        config = project(folder, layers=2, base=None, **sections)
        changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in separate.items()}
        (folder / PROMPTS).write_text("say sun\nsay moon\n")
        if self.objective in ROWS_OF:
            rows = map(ROWS_OF[self.objective], range(24))
            (folder / ROWS).write_text("".join(json.dumps(row) + "\n" for row in rows))
        if self.family is not None:
            _write_family(folder / MODEL, self.family)
        return dataclasses.replace(config, objective=self.objective, output=str(output), **changed)


def _pair(number: int) -> dict[str, object]:
    word = WORDS[number % 3]
    return {"prompt": f"say {word} {number}", "chosen": "yes", "rejected": f"no {word} at all"}


def _labelled(number: int) -> dict[str, object]:
    return {"text": f"{number * 7 % 10} the {WORDS[number % 3]}", "label": WORDS[number % 3]}


def _prompt(number: int) -> dict[str, object]:
    return {"prompt": f"say {WORDS[number % 3]} {number}"}


WORDS = ("sun", "moon", "rain")
ROWS_OF: Mapping[ObjectiveName, Callable[[int], dict[str, object]]] = {
    "dpo": _pair,
    "classification": _labelled,
    "grpo": _prompt,
}


def _write_family(model: Path, family: str) -> None:
    """Writes another family's config and weights over those of `project`; the tokenizer stays."""
    _, config = FAMILIES[family]
    config = config | dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
    write_folder(model, config | dict(pad_token_id=257), random_tensors(config))


def moved(config: Config, folder: Path, output: Path) -> Config:
    """Returns the settings with the files that `TinyRun.write` wrote into another folder."""
    samples = None if config.train.samples is None else str(folder / PROMPTS)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(folder / MODEL)),
        data=dataclasses.replace(config.data, train=str(folder / ROWS)),
        train=dataclasses.replace(config.train, samples=samples),
        output=str(output),
    )


def write_settings(config: Config, path: Path) -> list[str]:
    """Writes the settings of a run, and its reward beside them; returns the words of the command that trains it."""
    write_config(config, path)
    if config.objective != "grpo":
        return ["train", "--config", str(path)]
    rewards = path.with_name(REWARDS)
    rewards.write_text(REWARD)
    return ["train", "--config", str(path), "--reward", f"{rewards}:scored"]


def run_digest(run: Path, *, records: bool = True) -> str:
    """Returns a digest of a run's newest checkpoint and of its records and samples, without times and places."""
    return forked(lambda: _run_digest(run, records), "unreadable")


def forked[T](function: Callable[[], T], otherwise: T) -> T:
    """Returns the result of a function that starts a jax backend, from a forked process; `otherwise` if that fails."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return otherwise
    finally:
        process.join()


def _run_digest(run: Path, records: bool) -> str:
    step = saved_steps(run)[-1]
    folder = (run / CHECKPOINT_FOLDER / str(step)).absolute()
    checkpointer = ocp.StandardCheckpointer()
    arrays = jax.tree.leaves([checkpointer.restore(folder / item) for item in ("lora", "optimizer")])
    state = json.loads((folder / "state" / "metadata").read_text())
    kept = {key: state[key] for key in RESUME_KEYS if key not in PLACES}
    files = [run / name for name in (METRICS_FILE, SAMPLES_FILE) if records and (run / name).exists()]
    return digest([step, sorted(kept.items()), *map(comparable_records, files), *map(np.asarray, arrays)])
