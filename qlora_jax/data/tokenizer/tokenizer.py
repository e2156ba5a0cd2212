"""The tokenizer: wraps the `tokenizers` library, built from the plain dict that a model reader returns."""

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from qlora_jax.config.fields import TEMPLATE_CHOICES, TemplateValue
from qlora_jax.data.tokenizer.byte_lengths import (
    ByteLengths,
    byte_lengths,
    is_byte_level,
    make_round_trips,
    make_token_bytes,
)
from qlora_jax.data.tokenizer.chat_template import Rendering, read_template, render, start_process, start_rendering
from qlora_jax.data.tokenizer.gguf_tokenizer import tokenizer_from_gguf
from qlora_jax.data.tokenizer.render_batches import check_variables
from qlora_jax.data.tokenizer.template_pipe import STRFTIME_NOW, Message

_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """Encodes text to ids, decodes ids to text, and renders messages to text.

    It adds no special tokens: chat templates and row formats do.

    Fields:
      backend: the `tokenizers.Tokenizer`, without truncation, padding or post-processing.
      exported: the text of tokenizer.json, with post-processing.
      chat_template: jinja source, or None for a base model.
      template_name: the file that the template is from, for messages.
      chat_template_kwargs: variables that every rendering gives the template, such as `enable_thinking`.
      template_date: the date that the template writes with strftime_now; None for today.
      name: the file that it is from, for messages.
      special_tokens: those of `bos_token`, `eos_token`, `pad_token` and `unk_token` that exist, by name.
      add_bos_token: True if plain text, without a chat template, starts with bos.
      new_ids: ids of tokens that were added to the model's own.
      rows: rows of the model's embedding, those of new tokens included; None without a model.
      refused: special tokens that were removed because they have no row. A text that spells one raises an error.
    """

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    exported: str = dataclasses.field(repr=False)
    chat_template: str | None
    special_tokens: Mapping[str, str]
    add_bos_token: bool
    new_ids: tuple[int, ...] = ()
    template_name: str = ""
    rows: int | None = None
    refused: tuple[str, ...] = ()
    chat_template_kwargs: Mapping[str, TemplateValue] = dataclasses.field(default_factory=dict)
    template_date: datetime.date | None = None
    name: str = "tokenizer.json"

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens around it."""
        self.check_text(text)
        return _named(self.name, self.backend.encode, text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without special tokens around it."""
        return [encoding.ids for encoding in self.encode_spans(texts)]

    def encode_spans(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns encodings with `ids` and `offsets`. Token i covers `text[start_i:end_i]`, with its spaces.

        Tokens that share one character all cover the whole character.
        """
        self._check_texts(texts)
        return _named(self.name, self.backend.encode_batch, list(texts), add_special_tokens=False)

    def encode_fast(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Returns encodings with `ids` but without `offsets`, in five sixths of the time."""
        self._check_texts(texts)
        return _named(self.name, self.backend.encode_batch_fast, list(texts), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Returns the text of `ids`, including special tokens unless they are skipped."""
        return _named(self.name, self.backend.decode, list(ids), skip_special_tokens=skip_special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
    ) -> str:
        """Renders `messages` and `tools` with the chat template; raises ValueError without a template."""
        rendering = Rendering(messages, add_generation_prompt, tools)
        return render(self._template(), rendering, self._variables, self.template_name)

    def prepare_rendering(self) -> None:
        """Starts the process that renders, which takes a tenth of a second, and does not wait for it."""
        if self.chat_template is not None:
            start_process()

    def start_rendering(self, groups: Sequence[Sequence[Rendering]]) -> Callable[[], list[list[str | ValueError]]]:
        """Starts to render groups of conversations; see chat_template.start_rendering."""
        return start_rendering(self._template(), groups, self._variables, self.template_name)

    @property
    def _variables(self) -> Mapping[str, object]:
        date = {} if self.template_date is None else {STRFTIME_NOW: self.template_date}
        return {**self.special_tokens, **self.chat_template_kwargs, **date}

    @property
    def writes_date(self) -> bool:
        """True if the chat template may write the date."""
        return STRFTIME_NOW in (self.chat_template or "")

    def _template(self) -> str:
        if self.chat_template is None:
            raise ValueError(f"this tokenizer has no chat template. Set data.chat_template to {TEMPLATE_CHOICES}.")
        return self.chat_template

    def check_text(self, text: str) -> None:
        """Raises ValueError if the text spells a token that the model's embedding has no row for."""
        if self.refused and (found := [token for token in self.refused if token in text]):
            raise ValueError(
                f"a text spells {', '.join(map(repr, found))}, a special token without a row in the model's embedding. "
                "Remove it from the text, or list it in model.new_special_tokens, which trains a row for it."
            )

    def _check_texts(self, texts: Sequence[str]) -> None:
        if self.refused:
            for text in texts:
                self.check_text(text)

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_id(self) -> int | None:
        """Id of the begin-of-sequence token."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-sequence token."""
        return self._id("eos_token")

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token. Often the same as eos, so masks never depend on it."""
        return self._id("pad_token")

    @property
    def unk_id(self) -> int | None:
        """Id of the unknown token."""
        return self._id("unk_token")

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def added_ids(self) -> frozenset[int]:
        """Ids of added tokens, which are found in a text before BPE splits it."""
        return frozenset(self.backend.get_added_tokens_decoder())

    @functools.cached_property
    def special_text(self) -> re.Pattern[str]:
        """Matches the text of any special token, longest first."""
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        special |= set(self.special_tokens.values())
        longest_first = sorted(special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @functools.cached_property
    def round_trips(self) -> Callable[[str], bool]:
        """Function of a text; True only if its ids decode to the same text (see byte_lengths.py)."""
        return make_round_trips(self.backend)

    @functools.cached_property
    def byte_lengths(self) -> ByteLengths | None:
        """Bytes that each id stands for in a text that round-trips, or None if unknown (see byte_lengths.py)."""
        return byte_lengths(self.backend)

    @functools.cached_property
    def token_bytes(self) -> Callable[[int], bytes]:
        """Function of an id: the bytes of text that it stands for (see byte_lengths.py)."""
        return make_token_bytes(self.backend)

    @functools.cached_property
    def is_byte_level(self) -> bool:
        """True if the joined ids of two texts decode to the joined texts."""
        return is_byte_level(self.backend)

    def to_json(self) -> str:
        """Returns the text of tokenizer.json."""
        return self.exported


def load_tokenizer(source: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer of a model source, from the text of tokenizer.json or from GGUF metadata.

    Args:
      source: `chat_template`, `bos_token`, `eos_token`, `pad_token`, `unk_token` (each a str or None),
        `add_bos_token`, and either `tokenizer_json` (text) or `gguf` (see `tokenizer_from_gguf`). `missing` may give
        the error message if the source has neither, and `tokenizer_name` and `template_name` the files, for messages.

    Raises:
      ValueError: the source has neither, the text is not a tokenizer, or a named token is not in the vocabulary.
    """
    special_tokens = {name: source[name] for name in _NAMED if source.get(name) is not None}
    bos = special_tokens.get("bos_token") if source.get("add_bos_token") else None
    name = source.get("tokenizer_name", "tokenizer.json")
    if "tokenizer_json" in source:
        backend = _named(name, _from_json, source["tokenizer_json"], name)
    else:
        if "missing" in source:
            raise ValueError(source["missing"])
        if "gguf" not in source:
            raise ValueError(f"tokenizer source: found {sorted(source)}, expected 'tokenizer_json' or 'gguf' in it")
        backend = tokenizer_from_gguf(source["gguf"], bos)
    unknown = [f"{name} {token!r}" for name, token in special_tokens.items() if not _contains(backend, token)]
    if unknown:
        raise ValueError(
            f"tokenizer: special tokens that are not in its vocabulary: {', '.join(unknown)}. Correct its files."
        )
    backend.no_truncation()
    backend.no_padding()
    exported = backend.to_str()
    # A post-processor may remove spaces from the offsets, which masks are made of.
    backend.post_processor = None
    return Tokenizer(
        backend=backend,
        exported=exported,
        chat_template=source.get("chat_template"),
        template_name=source.get("template_name", ""),
        name=name,
        special_tokens=special_tokens,
        add_bos_token=bool(source.get("add_bos_token", False)),
    )


def _contains(backend: tokenizers.Tokenizer, token: str) -> bool:
    try:
        return backend.token_to_id(token) is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def with_new_tokens(tokenizer: Tokenizer, plain: Sequence[str], special: Sequence[str]) -> Tokenizer:
    """Returns the tokenizer with new tokens at its end, which are found anywhere in a text.

    Args:
      plain: tokens that are text.
      special: control tokens, with ids after those of `plain`. transformers can skip them when it decodes.

    Raises:
      ValueError: some tokens are in the vocabulary already.
    """
    tokens = [*plain, *special]
    if not tokens:
        return tokenizer
    if known := [token for token in tokens if tokenizer.backend.token_to_id(token) is not None]:
        raise ValueError(f"new tokens: already in the vocabulary: {', '.join(map(repr, known))}. Remove them.")
    added = [tokenizers.AddedToken(token, normalized=False, special=token in special) for token in tokens]
    backend = tokenizers.Tokenizer.from_str(tokenizer.exported)
    backend.add_tokens(added)
    exported = backend.to_str()
    backend.post_processor = None
    ids = tuple(backend.token_to_id(token) for token in tokens)
    rows = None if tokenizer.rows is None else max(tokenizer.rows, backend.get_vocab_size(with_added_tokens=True))
    return dataclasses.replace(tokenizer, backend=backend, exported=exported, new_ids=ids, rows=rows)


def with_chat_template(tokenizer: Tokenizer, path: str | Path) -> Tokenizer:
    """Returns the tokenizer with the jinja template of the file `path`, or with one of `chat_template.TOKENS`."""
    template = read_template(path, tokenizer.backend.token_to_id, tokenizer.special_tokens.get("eos_token"))
    return dataclasses.replace(tokenizer, chat_template=template, template_name=str(path))


def with_template_kwargs(tokenizer: Tokenizer, variables: Mapping[str, TemplateValue], key: str) -> Tokenizer:
    """Returns the tokenizer with variables that every rendering gives its chat template.

    Args:
      key: the setting that they are from, for messages.

    Raises:
      ValueError: the template reads no variable of a name; the message lists all such names.
    """
    if variables:
        if tokenizer.chat_template is None:
            raise ValueError(f"{key}: this model has no chat template. Remove {key}, or set a chat template")
        check_variables(tokenizer.chat_template, {*variables}, key)
    return dataclasses.replace(tokenizer, chat_template_kwargs=dict(variables))


def with_template_date(tokenizer: Tokenizer, date: str | None) -> Tokenizer:
    """Returns the tokenizer with the date that its chat template writes, today's if none is given.

    Args:
      date: as 2026-11-28, the setting data.template_date.

    Raises:
      ValueError: a date is given, and the template does not write it.
    """
    if tokenizer.writes_date:
        day = datetime.date.today() if date is None else datetime.date.fromisoformat(date)
        return dataclasses.replace(tokenizer, template_date=day)
    if date is not None:
        raise ValueError(
            f"data.template_date: the chat template does not write the date (found {date}, expected a template with "
            f"{STRFTIME_NOW}). Remove data.template_date"
        )
    return tokenizer


def _named[**Arguments, Result](
    name: str, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result:
    """Calls the tokenizers library; a panic of it, which is not an Exception, becomes a ValueError that names the file.

    A backtracking regular expression ends in a panic after ten million steps.
    """
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{name}: the tokenizers library fails with this file ({error}). Use the tokenizer of another source."
        ) from None


def _from_json(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for text that it can't parse
        raise ValueError(
            f"{name} can't be read by tokenizers {tokenizers.__version__} ({error}). Update tokenizers, or use "
            "another file."
        ) from error
