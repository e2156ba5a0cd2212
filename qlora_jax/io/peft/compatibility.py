"""Programs that read PEFT's adapters, but not all that an adapter may hold: vLLM and llama.cpp.

As they say themselves; vLLM has not been run. Of vLLM: docs.vllm.ai, api/vllm/config/lora (ranks) and
api/vllm/lora/peft_helper (what it refuses, and that one alpha over one rank scales all modules). Of llama.cpp: its
convert_lora_to_gguf.py, which reads lora_alpha, each module's own rank, and tensors called lora_A and lora_B alone.
"""

from collections.abc import Mapping
from typing import Any

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
VLLM_DEFAULT_RANK = 16
MERGED = "for them merge it into a model, --format hf or gguf"


def notes_for_readers(config: Mapping[str, Any]) -> list[str]:
    """What they would make of the adapter with this adapter_config.json, where that is not what it is."""
    if not_lora := {"IA3": "(IA)^3"}.get(config["peft_type"]) or ("DoRA" if config["use_dora"] else None):
        return [f"vLLM and llama.cpp take no {not_lora}: {MERGED}"]
    notes = [note for note in (_of_ranks(config), _of_patterns(config)) if note]
    if config["alpha_pattern"]:
        notes.append(
            "llama.cpp ignores alpha_pattern, and would scale these modules otherwise: --format gguf-lora is right"
        )
    more = [*(config["modules_to_save"] or []), *config.get("trainable_token_indices", {})]
    if more:
        notes.append(f"vLLM and llama.cpp take no adapter that trains more than LoRA ({', '.join(more)}): {MERGED}")
    return notes


def _of_ranks(config: Mapping[str, Any]) -> str | None:
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    if rank <= VLLM_DEFAULT_RANK:
        return None
    enough = next((each for each in VLLM_RANKS if each >= rank), None)
    if enough is None:
        return f"vLLM takes no rank above {VLLM_RANKS[-1]}, and this has {rank}: merge it, --format hf"
    return f"vLLM takes it with --max-lora-rank {enough} or more"


def _of_patterns(config: Mapping[str, Any]) -> str | None:
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config[name]]
    if not patterns:
        return None
    return f"vLLM ignores {' and '.join(patterns)}, and would scale these modules otherwise: merge it, --format hf"
