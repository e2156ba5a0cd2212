"""Reads and writes head.json, the meaning of a sequence head's outputs; and finds the padding token of such a model."""

import dataclasses
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from qlora_jax.atomic_files import write_text
from qlora_jax.config.objectives import OBJECTIVES, objectives_with
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.io.digests import json_digest
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.models.families.multimodal import text_config
from qlora_jax.nn.sequence_head import Pooling
from qlora_jax.objectives.head_objective import TrainedHead
from qlora_jax.untrusted_json import JsonObject, read_json, shorten

HEAD_FILE = "head.json"
COPY_IT = "Copy the file from where the head was trained, or from a backup"


class HeadRecord(TypedDict):
    """The contents of head.json; see `TrainedHead`. The digest is of the other values; earlier versions wrote none."""

    objective: str
    labels: list[str]
    pooling: Pooling
    text_columns: NotRequired[list[list[str]]]
    digest: NotRequired[str]


def check_same_head(place: str, found: TrainedHead | None, expected: TrainedHead | None) -> None:
    """Checks that training may continue with the sequence head of a model or run; a run adds one to a model without.

    Args:
      place: the model or file that has the head `found`.

    Raises:
      ValueError: it is another head than the run's; the message has both.
    """
    if found is None or found.fits(expected):
        return
    raise ValueError(
        f"{place}: its sequence head is not that of this run (found {found}; expected {expected or 'none'}). Use the "
        "objective, head.pooling and labels (head.labels, or those of the data) that trained it"
    )


def write_head(folder: Path, head: TrainedHead) -> None:
    """Writes head.json into an existing folder, unless the meaning of the outputs is unknown."""
    if head.described:
        values = {"objective": head.objective, "labels": [*head.labels], "pooling": head.pooling}
        if head.text_columns:
            values["text_columns"] = [[*columns] for columns in head.text_columns]
        record = {**values, "digest": json_digest(values)}
        write_text(folder / HEAD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def read_head(folder: Path) -> TrainedHead | None:
    """Reads head.json; None if the folder has none.

    Raises:
      ValueError: it is damaged, or labels are missing or repeated.
    """
    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    found = read_json(path, HeadRecord)
    values = {name: value for name, value in found.items() if name != "digest"}
    if "digest" not in found:
        warn_without_digests(folder)
    elif found["digest"] != json_digest(values):
        raise ValueError(f"{path}: damaged (its values are not those that were written). {COPY_IT}")
    if found["objective"] not in (heads := objectives_with("head")):
        raise ValueError(
            f"{path}: objective: found {shorten(found['objective'])}, expected one of {', '.join(heads)}. {COPY_IT}"
        )
    head = TrainedHead(
        objective=found["objective"],
        labels=tuple(found["labels"]),
        pooling=found["pooling"],
        text_columns=tuple(map(tuple, found.get("text_columns", []))),
    )
    if len(set(head.labels)) < len(head.labels) or bool(head.labels) != OBJECTIVES[head.objective].labels:
        raise ValueError(
            f"{path}: labels: found {list(head.labels)} with objective={head.objective}, expected unique names for "
            f"{' and '.join(objectives_with('labels'))}, and none for others. {COPY_IT}"
        )
    return head


def read_run_head(run: Path, objective: str) -> TrainedHead | None:
    """Reads the head.json of a run; None if its objective has no head.

    Raises:
      ValueError: the file is damaged, or missing.
    """
    head = read_head(run)
    if head is None and OBJECTIVES[objective].head:
        raise ValueError(
            f"{run / HEAD_FILE}: missing, but objective={objective} trains the head that it describes. {COPY_IT}"
        )
    return head


# Chooses the padding token of exported sequence heads.
#
# transformers pools the rightmost token of a text whose id is not `pad_token_id`, even in a batch of one text. Many
# bases name the token that ends a text as padding, so their texts would be pooled at the token before it.


class Padding(NamedTuple):
    """A padding token; both fields are None if no token is safe. transformers then pools texts one at a time."""

    id: int | None
    token: str | None


def head_padding(tokenizer: Tokenizer, config: JsonObject, stop: Collection[int]) -> Padding:
    """Returns a special token that ends no text: the base's own padding token, if it is one.

    Args:
      config: config.json of the base.
      stop: ids that end a reply.
    """
    config = {**text_config(config), **config}
    ends = {*stop, tokenizer.eos_id, tokenizer.unk_id, *_ids(config, "eos_token_id")}
    special = {
        index: token.content
        for index, token in sorted(tokenizer.backend.get_added_tokens_decoder().items())
        if token.special and index not in tokenizer.new_ids and (tokenizer.rows is None or index < tokenizer.rows)
    }
    for index in _candidates(config, tokenizer, special):
        token = special.get(index) or tokenizer.backend.id_to_token(index)
        if token is not None and index not in ends:
            return Padding(index, token)
    return Padding(None, None)


def padded_tokenizer(tokenizer: Tokenizer, padding: Padding) -> Tokenizer:
    """Returns the tokenizer with this padding token, so that transformers pads texts with the token it ignores."""
    if padding.token is None:
        return tokenizer
    return dataclasses.replace(tokenizer, special_tokens={**tokenizer.special_tokens, "pad_token": padding.token})


def _candidates(config: JsonObject, tokenizer: Tokenizer, special: dict[int, str]) -> Iterator[int]:
    """Yields ids, the best first. Those that a chat template spells are left out, because a turn may end in them."""
    named = {index for index in (tokenizer.pad_id, *_ids(config, "pad_token_id")) if index is not None}
    template = tokenizer.chat_template or ""
    yield from sorted(named)
    free = [index for index, token in special.items() if token not in template and index != tokenizer.bos_id]
    yield from sorted(free, key=lambda index: "pad" not in special[index].lower())
    if tokenizer.bos_id is not None:
        yield tokenizer.bos_id  # it begins a text


def _ids(config: JsonObject, name: str) -> list[int]:
    found = config.get(name)
    return [index for index in (found if isinstance(found, list) else [found]) if isinstance(index, int)]
