"""Reads the tokenizer's files of a Hugging Face folder into one plain dict."""

import json
from pathlib import Path
from typing import Any

SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: names the file, and the line and column where it stops being JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}, column {error.colno}: no JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text at byte {error.start}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """The tokenizer dict of ModelSource; "missing", what to do, where the folder has no tokenizer.json."""
    config = _optional_json(folder / "tokenizer_config.json")
    special = _optional_json(folder / "special_tokens_map.json")
    stop = _optional_json(folder / "generation_config.json").get("eos_token_id")
    tokenizer: dict[str, Any] = {name: _token_text(config.get(name, special.get(name))) for name in SPECIAL_TOKENS}
    tokenizer["chat_template"] = _chat_template(folder, config)
    tokenizer["stop_token_ids"] = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    tokenizer |= {"missing": _missing(folder)} if text is None else {"tokenizer_json": text}
    tokenizer["add_bos_token"] = _adds_bos(config, read_json(path) if text is not None else {}, tokenizer["bos_token"])
    return tokenizer


def _missing(folder: Path) -> str:
    """What to do in a folder without a tokenizer.json; it may be there for its weights alone."""
    if slow := [name for name in SLOW_FILES if (folder / name).is_file()]:
        return (
            f"{folder} has no tokenizer.json, but {', '.join(slow)}: the files of a slow tokenizer. Write the fast one "
            "with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder} has no tokenizer.json: put the file there, from where the weights came"


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """A token is written as its text, or as an object that holds it."""
    return token["content"] if isinstance(token, dict) else token


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, or the template in tokenizer_config.json, or the one called "default" of several there."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {named["name"]: named["template"] for named in template}
        if "default" not in by_name:
            raise ValueError(
                f"{folder / 'tokenizer_config.json'}: chat_template holds {sorted(by_name)}, none called 'default'. "
                "Write the one to use to chat_template.jinja in the folder."
            )
        return by_name["default"]
    return template


def _adds_bos(config: dict[str, Any], tokenizer: dict[str, Any], bos: str | None) -> bool:
    """Whether plain text begins with bos: as add_bos_token says, or else as tokenizer.json's own template does."""
    if config.get("add_bos_token") is not None:
        return config["add_bos_token"]
    processor = tokenizer.get("post_processor") or {}
    templates = [step["single"] for step in processor.get("processors", [processor]) if step.get("single")]
    return bos is not None and any(first[0].get("SpecialToken", {}).get("id") == bos for first in templates)
