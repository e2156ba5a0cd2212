"""Refuses export formats that cannot hold a finetuning method or a sequence head, with the reason."""

from qlora_jax.config.methods import METHODS
from qlora_jax.config.objectives import OBJECTIVES
from qlora_jax.models.families.multimodal import WRAPPERS
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject

GGUF_FORMS = ("gguf-lora", "gguf")
PREDICT = "Use the run itself: qlora-jax predict --run RUN"
# Model types for which transformers 5.24 has no class for sequence classification.
NO_CLASSIFIER = {"cohere2", "glm4_moe", "granite", "olmoe", *WRAPPERS} - {"gemma3"}


def refusal(method: str, form: str) -> str | None:
    """Returns why a format cannot hold a method, and what to do; None if it can."""
    refused = METHODS[method].refused_exports
    if form not in refused:
        return None
    reason, fix = refused[form]
    return f"--format {form}: it cannot hold lora.method={method}, because {reason}. {fix}"


def check_method(method: str, form: str) -> None:
    """Checks that a format can hold a method.

    Raises:
      ValueError: it cannot.
    """
    if problem := refusal(method, form):
        raise ValueError(problem)


def head_refusal(head: TrainedHead | None, form: str, base: JsonObject) -> str | None:
    """Returns why a format cannot hold a run's sequence head, and what to do; None if it can.

    Args:
      base: config.json of the base.
    """
    if head is None or (OBJECTIVES[head.objective].pooled and form not in GGUF_FORMS):
        return None
    if form in GGUF_FORMS:
        return (
            f"--format {form}: llama.cpp's files cannot hold the head of a run with objective={head.objective}. Use "
            "--format peft or hf, for transformers"
        )
    if head.pooling == "mean":
        return (
            f"--format {form}: transformers classifies by the hidden state of the last token (found "
            f"head.pooling=mean). {PREDICT}"
        )
    if base.get("model_type") in NO_CLASSIFIER:
        return (
            f"--format {form}: transformers has no class for sequence classification of this family (found model_type="
            f"{base['model_type']}). {PREDICT}"
        )
    return None


def check_head(head: TrainedHead | None, form: str, base: JsonObject) -> None:
    """Checks that a format can hold a run's sequence head.

    Args:
      base: config.json of the base.

    Raises:
      ValueError: it cannot.
    """
    if problem := head_refusal(head, form, base):
        raise ValueError(problem)
