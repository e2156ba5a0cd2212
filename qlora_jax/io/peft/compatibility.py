"""Notes for users of vLLM and llama.cpp, which read PEFT's adapters but not all of their features.

The limits come from the programs' documentation; vLLM was not run. vLLM: docs.vllm.ai, api/vllm/config/lora (ranks) and
api/vllm/lora/peft_helper (unsupported features; one alpha over one rank scales all modules). llama.cpp:
convert_lora_to_gguf.py, which reads lora_alpha, a rank per module, and only tensors named lora_A and lora_B.
"""

from qlora_jax.config.methods import METHODS, method_with_peft_type
from qlora_jax.metadata import JsonObject

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # possible values of --max-lora-rank
VLLM_DEFAULT_RANK = 16
MERGED = "merge it into a model for them: --format hf or gguf"
WITHOUT_GGUF = "merge it into a model for vLLM: --format hf"
HEAD_TASKS = ("SEQ_CLS", "FEATURE_EXTRACTION")  # llama.cpp's files cannot hold their heads


def notes_for_readers(config: JsonObject) -> list[str]:
    """Lists how vLLM and llama.cpp would compute something else than the adapter with this adapter_config.json."""
    merged = WITHOUT_GGUF if config.get("task_type") in HEAD_TASKS else MERGED
    name = "dora" if config.get("use_dora") else method_with_peft_type(config["peft_type"])
    if name not in (None, "lora"):
        return [f"vLLM and llama.cpp cannot read {METHODS[name].title}: {merged}"]
    notes = [note for note in (_rank_note(config), _pattern_note(config)) if note]
    if config["alpha_pattern"]:
        notes.append(
            "llama.cpp ignores alpha_pattern, and would scale these modules differently: use --format gguf-lora"
        )
    if config.get("target_parameters"):
        notes.append(
            "the adapter is on parameters of experts (target_parameters): transformers 5 with peft 0.21 loads it, "
            "llama.cpp's converter cannot: use --format gguf-lora"
        )
    more = [*(config["modules_to_save"] or []), *config.get("trainable_token_indices", {})]
    if more:
        notes.append(
            f"vLLM and llama.cpp cannot read an adapter that trains more than LoRA ({', '.join(more)}): {merged}"
        )
    return notes


def _rank_note(config: JsonObject) -> str | None:
    rank = max(config["r"], *config["rank_pattern"].values(), 0)
    if rank <= VLLM_DEFAULT_RANK:
        return None
    enough = next((each for each in VLLM_RANKS if each >= rank), None)
    if enough is None:
        return f"vLLM supports ranks up to {VLLM_RANKS[-1]}, and this adapter has {rank}: merge it, --format hf"
    return f"vLLM requires --max-lora-rank {enough} or more"


def _pattern_note(config: JsonObject) -> str | None:
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config[name]]
    if not patterns:
        return None
    return f"vLLM ignores {' and '.join(patterns)}, and would scale these modules differently: merge it, --format hf"
