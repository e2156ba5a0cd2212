"""Reads the tokenizer's files of a Hugging Face folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import FailFast, Field

from qlora_jax.data.tokenizer.validation import check_tokenizer
from qlora_jax.model_source import TokenizerData
from qlora_jax.untrusted_json import (
    MetadataError,
    check_value,
    decode_json,
    decode_text,
    read_bytes,
    read_json,
    read_text,
    shorten,
)

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
# Files that describe a tokenizer and how replies end; those of multimodal models that describe their images.
TOKENIZER_FILES = (
    *(GENERATION_CONFIG, "tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"),
    "chat_template.jinja",
)
PROCESSOR_TEMPLATE = "chat_template.json"
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    PROCESSOR_TEMPLATE,
)
SLOW_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "merges.txt", "vocab.txt")
MAX_TOKENIZER_BYTES = 64 << 20  # twice the largest published tokenizer.json

MAX_ID = (1 << 24) - 1  # largest token id in tokenizer.json

type TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]  # some files write -1 for no token


class TokenText(TypedDict):
    """A token that is written as an object."""

    content: str


type Token = str | TokenText | None


class NamedTemplate(TypedDict):
    """One of several chat templates."""

    name: str
    template: str


class TokenizerConfig(TypedDict, total=False):
    """The keys of tokenizer_config.json and special_tokens_map.json that are used."""

    bos_token: Token
    eos_token: Token
    pad_token: Token
    unk_token: Token
    add_bos_token: bool | None
    chat_template: str | list[NamedTemplate] | None


class ProcessorTemplate(TypedDict):
    """The chat template in the file that older versions of transformers wrote for a multimodal model."""

    chat_template: str


class GenerationConfig(TypedDict, total=False):
    """The key of generation_config.json that is used."""

    eos_token_id: TokenId | list[TokenId] | None


class TokenName(TypedDict):
    """The name of a special token."""

    id: str


class TemplatePiece(TypedDict, total=False):
    """A special token, or another part of a processor's template."""

    SpecialToken: TokenName


# An alias, because a member of a union must have a hash in Python 3.12, and FailFast has none.
type Pieces = Annotated[list[TemplatePiece], FailFast()]


class PostProcessor(TypedDict, total=False):
    """The tokens that tokenizer.json adds to those of a text: a template, or a list of processors."""

    single: Pieces | None
    processors: "Annotated[list[PostProcessor], FailFast()]"


class TokenizerModel(TypedDict, total=False):
    """The parts of a tokenizer's model that the tokenizers library does not check well enough."""

    vocab: object  # {token: id}; a list in some models
    continuing_subword_prefix: str | None
    end_of_word_suffix: object
    unk_token: object
    max_input_chars_per_word: object
    dropout: object
    merges: object


class AddedToken(TypedDict, total=False):
    """A token beside those of the model."""

    id: Annotated[int, Field(ge=0, le=MAX_ID)]


type AddedTokens = Annotated[list[AddedToken], FailFast()]


class TokenizerJson(TypedDict, total=False):
    """The part of tokenizer.json that is used here; the tokenizers library reads the rest."""

    model: TokenizerModel
    added_tokens: AddedTokens | None
    normalizer: object
    pre_tokenizer: object
    decoder: object
    post_processor: PostProcessor | None


def read_tokenizer(folder: Path) -> TokenizerData:
    """Reads what a folder says about its tokenizer; without a tokenizer.json, `missing` says what to do.

    Raises:
      ValueError: a file is damaged.
    """
    config = _read_if_present(folder / TOKENIZER_CONFIG, TokenizerConfig)
    special = _read_if_present(folder / "special_tokens_map.json", TokenizerConfig)
    stop = _read_if_present(folder / GENERATION_CONFIG, GenerationConfig).get("eos_token_id")
    text, parsed = _read_tokenizer_json(folder / "tokenizer.json")
    named: TokenizerConfig = {**special, **config}
    tokens = [named.get("bos_token"), named.get("eos_token"), named.get("pad_token"), named.get("unk_token")]
    bos, eos, pad, unk = map(_token_text, tokens)
    tokenizer: TokenizerData = {
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "chat_template": _chat_template(folder, config),
        "template_name": str(_template_file(folder)),
        "stop_token_ids": [] if stop is None else [stop] if isinstance(stop, int) else list(stop),
        "add_bos_token": _adds_bos(config, parsed, bos),
    }
    if text is None:
        return {**tokenizer, "missing": _missing(folder)}
    return {**tokenizer, "tokenizer_json": text, "tokenizer_name": str(folder / "tokenizer.json")}


def _missing(folder: Path) -> str:
    """Says what to do about a missing tokenizer.json; it is an error only when the tokenizer is used."""
    if slow := [name for name in SLOW_FILES if (folder / name).is_file()]:
        return (
            f"{folder}: tokenizer.json is missing (found the slow tokenizer {', '.join(slow)}). Write the fast one "
            "with transformers: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return f"{folder}: tokenizer.json is missing. Copy it from where the weights came from"


def _read_if_present[T: Mapping](path: Path, kind: type[T]) -> T:
    return read_json(path, kind) if path.is_file() else kind()


def _read_tokenizer_json(path: Path) -> tuple[str | None, TokenizerJson]:
    """(the file's text, its post-processor)"""
    if not path.is_file():
        return None, {}
    content = read_bytes(path, MAX_TOKENIZER_BYTES)  # not text, whose line ends take time
    text = decode_text(content, path)
    parsed = decode_json(text, TokenizerJson, path)
    model = parsed.get("model", {})
    _check_ids(path, model.get("vocab"))
    _check_merges(path, model)
    check_tokenizer(text, {part: parsed.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")}, model, path)
    return text, parsed


def _check_ids(path: Path, vocabulary: object) -> None:
    """Checks that no id is so large that tokenizers, which counts up to it, would take minutes."""
    ids = vocabulary.values() if isinstance(vocabulary, dict) else ()
    if {*map(type, ids)} - {int}:
        ids = [each for each in ids if isinstance(each, int)]
    largest = max(ids, default=0)
    if largest > MAX_ID:
        raise MetadataError(
            f"{path}: model.vocab: an id is too large (found {largest}, expected at most {MAX_ID}). Download the file "
            "again."
        )


def _check_merges(path: Path, model: TokenizerModel) -> None:
    """Checks that the second part of each merge begins with the prefix, which tokenizers cuts off without looking."""
    prefix = model.get("continuing_subword_prefix")
    if not prefix:
        return
    merges = check_value(model.get("merges") or [], list[object], f"{path}: model.merges")
    split = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    pairs = check_value(split, list[Annotated[list[str], Field(min_length=2, max_length=2)]], f"{path}: model.merges")
    if wrong := [pair for pair in pairs if not pair[1].startswith(prefix)]:
        raise MetadataError(
            f"{path}: model.continuing_subword_prefix: merges whose second token does not begin with it (found "
            f"{shorten(wrong[0])}, expected {shorten(prefix)}). Download the file again."
        )


def _token_text(token: Token) -> str | None:
    """The text of a token, which files write as the text itself or as an object with it."""
    return token["content"] if isinstance(token, dict) else token


def _template_file(folder: Path) -> Path:
    path = folder / "chat_template.jinja"
    return path if path.is_file() else folder / TOKENIZER_CONFIG


def _processor_template(folder: Path) -> str | None:
    path = folder / PROCESSOR_TEMPLATE
    return read_json(path, ProcessorTemplate)["chat_template"] if path.is_file() else None


def _chat_template(folder: Path, config: TokenizerConfig) -> str | None:
    """Reads chat_template.jinja, or the template in tokenizer_config.json (the one named "default" of several).

    A multimodal model may have neither, but chat_template.json.
    """
    path = _template_file(folder)
    if path.name != TOKENIZER_CONFIG:
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {named["name"]: named["template"] for named in template}
        if "default" not in by_name:
            raise MetadataError(
                f"{folder / TOKENIZER_CONFIG}: chat_template has no template 'default' (found "
                f"{shorten(sorted(by_name))}). Write the one to use to chat_template.jinja in the folder."
            )
        return by_name["default"]
    return _processor_template(folder) if template is None else template


def _adds_bos(config: TokenizerConfig, tokenizer: TokenizerJson, bos: str | None) -> bool:
    """True if plain text begins with bos, according to add_bos_token or else to tokenizer.json's post-processor."""
    if (given := config.get("add_bos_token")) is not None:
        return given
    processor = tokenizer.get("post_processor") or {}
    templates = [template for step in processor.get("processors", [processor]) if (template := step.get("single"))]
    firsts = [template[0]["SpecialToken"]["id"] for template in templates if "SpecialToken" in template[0]]
    return bos is not None and bos in firsts
