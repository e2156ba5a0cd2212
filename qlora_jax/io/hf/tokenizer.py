"""Reads the tokenizer's files of a Hugging Face folder."""

import json
from pathlib import Path

from qlora_jax.io.model_source import JsonObject, TokenizerData

SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_json(path: Path) -> JsonObject:
    """Reads the JSON object in a file.

    Raises:
      ValueError: names the file, and the line and column where the JSON is invalid.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tokenizer(folder: Path) -> TokenizerData:
    """Reads what a folder says about its tokenizer; without a tokenizer.json, `missing` says what to do.

    Raises:
      ValueError: a file is damaged.
    """
    config = _optional_json(folder / "tokenizer_config.json")
    special = _optional_json(folder / "special_tokens_map.json")
    stop = _optional_json(folder / "generation_config.json").get("eos_token_id")
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    bos, eos, pad, unk = (_token_text(config.get(name, special.get(name))) for name in SPECIAL_TOKENS)
    tokenizer: TokenizerData = {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "chat_template": _chat_template(folder, config),
        "stop_token_ids": [] if stop is None else [stop] if isinstance(stop, int) else list(stop),
        "add_bos_token": _adds_bos(config, read_json(path) if text is not None else {}, bos),
    }
    return {**tokenizer, "missing": _missing(folder)} if text is None else {**tokenizer, "tokenizer_json": text}


def _missing(folder: Path) -> str:
    """Says what to do about a missing tokenizer.json; it is an error only when the tokenizer is used."""
    if slow := [name for name in SLOW_FILES if (folder / name).is_file()]:
        return (
            f"{folder}: tokenizer.json is missing (found the slow tokenizer {', '.join(slow)}). Write the fast one "
            "with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder}: tokenizer.json is missing. Copy it from where the weights came from"


def _optional_json(path: Path) -> JsonObject:
    return read_json(path) if path.is_file() else {}


def _token_text(token: str | JsonObject | None) -> str | None:
    """The text of a token, which files write as the text itself or as an object with it."""
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: JsonObject) -> str | None:
    """Reads chat_template.jinja, or the template in tokenizer_config.json (the one named "default" of several)."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {named["name"]: named["template"] for named in template}
        if "default" not in by_name:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template has no template 'default' (found "
                f"{sorted(by_name)}). Write the one to use to chat_template.jinja in the folder."
            )
        return by_name["default"]
    return template


def _adds_bos(config: JsonObject, tokenizer: JsonObject, bos: str | None) -> bool:
    """True if plain text begins with bos, according to add_bos_token or else to tokenizer.json's post-processor."""
    if config.get("add_bos_token") is not None:
        return config["add_bos_token"]
    processor = tokenizer.get("post_processor") or {}
    templates = [step["single"] for step in processor.get("processors", [processor]) if step.get("single")]
    return bos is not None and any(first[0].get("SpecialToken", {}).get("id") == bos for first in templates)
