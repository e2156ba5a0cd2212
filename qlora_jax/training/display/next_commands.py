"""The commands that a person types after a run."""

import shlex
from pathlib import Path

from qlora_jax.config import Config
from qlora_jax.config.methods import METHODS
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.io.export.methods import head_refusal, refusal
from qlora_jax.io.peft.writer import is_gguf
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE
from qlora_jax.metadata import JsonObject
from qlora_jax.models.config import STORED
from qlora_jax.objectives.head_objective import TrainedHead, head_of

PROGRAM = "qlora-jax"


def next_commands(config: Config, base: JsonObject, *, finished: bool) -> dict[str, str]:
    """Returns commands to type next, quoted for a shell, by their purpose; none that the run's settings refuse.

    Args:
      base: config.json of the base.
    """
    run = shlex.quote(config.output)
    if not finished:
        return {"resume": f"{PROGRAM} train --config {shlex.quote(str(Path(config.output) / CONFIG_FILE))} --resume"}
    head = head_of(config.objective, (), config.head.pooling)
    found = _use(head, run)
    for form in _forms(config):
        if refusal(config.lora.method, form) is None and head_refusal(head, form, base) is None:
            with_base = " --with_base" if form == "peft" and is_gguf(config.model.path) else ""  # peft loads no GGUF
            return found | {"export": f"{PROGRAM} export --run {run} --format {form}{with_base}"}
    return found


def _forms(config: Config) -> tuple[str, ...]:
    """The formats of an export, the best first: that for the very file whose codes a LoRA was trained on, if it can."""
    tables = (*config.model.new_tokens, *config.model.new_special_tokens, *config.lora.modules_to_save)
    is_plain = (METHODS[config.lora.method].stored_as or config.lora.method) == "lora" and not tables
    is_served = config.model.quant_type == STORED and is_gguf(config.model.path)
    return ("gguf-lora", "peft", "hf") if is_plain and is_served else ("peft", "hf")


def _use(head: TrainedHead | None, run: str) -> dict[str, str]:
    if head is None:
        return {"try it": f"{PROGRAM} generate --run {run}"}
    return {
        "predict": f"{PROGRAM} predict --run {run} --rows FILE",
        "evaluate": f"{PROGRAM} evaluate --run {run} --{OBJECTIVES[head.objective].task} FILE",
    }
