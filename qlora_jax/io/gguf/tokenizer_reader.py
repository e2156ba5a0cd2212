"""Reads the tokenizer from GGUF metadata."""

from pathlib import Path

from qlora_jax.io.gguf.header import Metadata
from qlora_jax.model_source import GgufVocabulary, TokenizerData

PREFIX = "tokenizer.ggml."
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "padding_token_id", "unknown_token_id")
NO_TOKEN = 2**32 - 1  # -1 as an unsigned id
STOP_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# If a file has no add_bos_token, llama.cpp derives it from the kind of vocabulary.
MODELS_WITH_BOS = {"llama"}
PRES_WITH_BOS = {"llama3", "llama-v3", "llama-bpe"}
# Architectures whose vocabulary is ordered by merges; their scores are not used.
ORDERED = {"gemma", "gemma2", "gemma3"}


def tokenizer_from_metadata(path: Path, metadata: Metadata) -> TokenizerData:
    """Reads the special tokens, the chat template and the vocabulary.

    Raises:
      ValueError: the vocabulary is missing, or a special token's id is outside it.
    """
    keys = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    missing = [f"{PREFIX}{key}" for key in ("model", "tokens") if key not in keys]
    if missing:
        raise ValueError(f"{path}: the tokenizer is missing ({', '.join(missing)}). Get a GGUF file with its tokenizer")
    tokens = keys["tokens"]
    ids = {key: keys[key] for key in (*SPECIAL_IDS, *STOP_IDS) if keys.get(key, NO_TOKEN) != NO_TOKEN}
    outside = [f"{PREFIX}{key} = {number}" for key, number in ids.items() if not 0 <= number < len(tokens)]
    if outside:
        raise ValueError(f"{path}: corrupt: ids outside the vocabulary of {len(tokens)} tokens: {', '.join(outside)}")
    bos, eos, pad, unk = (tokens[ids[key]] if key in ids else None for key in SPECIAL_IDS)
    with_bos = keys["model"] in MODELS_WITH_BOS or keys.get("pre") in PRES_WITH_BOS
    return {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "chat_template": metadata.get("tokenizer.chat_template"),
        "template_name": f"{path}: tokenizer.chat_template",
        "add_bos_token": keys.get("add_bos_token", with_bos),
        "stop_token_ids": [ids[key] for key in STOP_IDS if key in ids],
        "gguf": _vocabulary(keys, ordered=metadata["general.architecture"] in ORDERED),
    }


def _vocabulary(keys: Metadata, *, ordered: bool) -> GgufVocabulary:
    return {
        "model": keys["model"],
        "pre": keys.get("pre", "default"),
        "tokens": keys["tokens"],
        "token_type": keys.get("token_type", []),
        "merges": keys.get("merges", []),
        "scores": [] if ordered else keys.get("scores", []),
        "add_space_prefix": keys.get("add_space_prefix", keys["model"] in MODELS_WITH_BOS),
    }
