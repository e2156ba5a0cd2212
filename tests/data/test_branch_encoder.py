"""Pairs, labelled answers, classes and embeddings as ids: those of TRL, of inference, and of each text alone."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.data.branch_encoder import make_branch_encoder
from qlora_jax.data.branches import branch_ends
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.loss_mask.spans import turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.row_kinds import ROW_USES
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from tests.data.conftest import sentencepiece_tokenizer

ORACLE = Path(__file__).parents[1] / "oracle/trl_datasets.py"


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "What is 2 + 2?"), turn("assistant", " Four.\nSure"), turn("assistant", "five, I think")
HISTORY = [turn("user", "Hi"), turn("assistant", "Hello! 漢字"), USER]
CONVERSATIONS: list[dict[str, Any]] = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": HISTORY, "chosen": [BAD], "rejected": [GOOD]},
    {"prompt": [USER], "chosen": [GOOD, turn("user", "No."), BAD], "rejected": [BAD]},
    {"chosen": [*HISTORY, GOOD], "rejected": [*HISTORY, BAD]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
]
STRINGS: list[dict[str, Any]] = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, or so"},
    {"prompt": "The sky is ", "chosen": "blue.", "rejected": "green"},  # a token crosses the prompt's end
    {"prompt": "Say hi", "chosen": "hi there", "rejected": "no"},  # it does so in one of the texts
    {"prompt": "", "chosen": "a long one", "rejected": "b long one"},
    {"prompt": "Q: 漢字", "chosen": "é\n\n", "rejected": "\u0301"},
    {"chosen": "Q: one\nA: yes it is", "rejected": "Q: one\nA: yes not"},
    {"chosen": "Q: one\nA: yes", "rejected": "Q: one\nA: yes, yes"},
]


def encoded(
    tokenizer: Tokenizer, rows: Sequence[dict[str, Any]], objective: str = "dpo", labels: Sequence[str] = ()
) -> list[EncodedRow]:
    """The rows, each in the format that it has alone."""
    found: list[EncodedRow] = []
    problems: list[Problem] = []
    for row in rows:
        place = [Row(Place(1, 0), row)]
        row_format = detect_format("x.jsonl", place, objective=objective)
        assert row_format.check(row) == []
        encoder = make_branch_encoder(row_format, tokenizer, ROW_USES[objective], labels)
        found += encoder.begin(place, problems)()(problems)[1]
    assert problems == []
    return found


def texts_of(row: EncodedRow) -> list[tuple[list[int], list[bool]]]:
    """The ids and the mask of each text: what its branch continues, and the branch."""
    if not row.branches:
        return [(row.ids.tolist(), row.supervised.tolist())]
    spans = zip(row.branches, branch_ends(row.branches, len(row.ids)), strict=True)
    kept = [np.r_[: branch.depth, branch.begin : end] for branch, end in spans]
    return [(row.ids[index].tolist(), row.supervised[index].tolist()) for index in kept]


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a post-processor that writes bos, as Llama's has."""
    whole = json.loads(tokenizer.to_json())
    bos = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<s>": {"id": "<s>", "ids": [tokenizer.bos_id], "tokens": ["<s>"]}}
    whole["post_processor"] = {"type": "TemplateProcessing", "single": bos, "pair": bos, "special_tokens": ids}
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": tokenizer.chat_template}
    return load_tokenizer({"tokenizer_json": json.dumps(whole), "add_bos_token": True, **named})


def through_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """TRL's ids without those behind the end of the last turn, which generation never writes."""
    if tokenizer.chat_template is None:
        return ids
    (end,) = tokenizer.encode(turn_marks(tokenizer).end)[-1:]
    return ids[: len(ids) - ids[::-1].index(end)]


def unpaired(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0} for n, row in enumerate(rows)]


# (trainer, rows) with and without a chat template. TRL has no form for a prompt of text and answers of messages.
EXPLICIT, IMPLICIT = CONVERSATIONS[:3], CONVERSATIONS[3:]
CASES: dict[bool, list[tuple[str, list[dict[str, Any]]]]] = {
    True: [
        ("dpo", EXPLICIT),
        ("dpo", IMPLICIT),
        ("reward", IMPLICIT),
        ("kto", unpaired(EXPLICIT)),
    ],
    False: [
        ("dpo", STRINGS[:5]),
        ("dpo", STRINGS[5:]),
        ("reward", STRINGS[:5]),
        ("kto", unpaired(STRINGS[:5])),
    ],
}


@pytest.mark.slow
def test_ids_and_masks_equal_those_of_trl(
    oracle: Callable, tokenizer: Tokenizer, smollm2_source: dict[str, Any], templates: dict[str, str], tmp_path: Path
):
    tokenizers = {name: load_tokenizer({**smollm2_source, "chat_template": text}) for name, text in templates.items()}
    tokenizers |= {"plain": load_tokenizer({**smollm2_source, "chat_template": None})}
    for prefix in ("never", "first", "every"):
        tokenizers[prefix] = with_bos(sentencepiece_tokenizer(prefix))
        tokenizers[f"{prefix}, plain"] = dataclasses.replace(tokenizers[prefix], chat_template=None)
    cases: list[tuple[Tokenizer, str, list[dict[str, Any]]]] = []
    sent: list[dict[str, Any]] = []
    for name, one in tokenizers.items():
        path, named = tmp_path / name, dict(one.special_tokens)
        path.write_text(one.to_json())
        for trainer, rows in CASES[one.chat_template is not None]:
            if trainer != "dpo" and name not in ("smollm2", "plain", "every"):
                continue
            cases.append((one, trainer, rows))
            common = {"tokenizer": str(path), "special_tokens": named, "template": one.chat_template}
            sent.append({**common, "trainer": trainer, "rows": rows})
    results = json.loads(str(oracle(ORACLE, cases=sent)["results"]))
    for (one, trainer, rows), theirs in zip(cases, results, strict=True):
        for row, ours, their in zip(rows, encoded(one, rows, trainer), theirs, strict=True):
            prompt = their.get("prompt_ids", [])
            names = ["completion_ids"] if trainer == "kto" else ["chosen_ids", "rejected_ids"]
            for (ids, mask), name in zip(texts_of(ours), names, strict=True):
                if trainer == "reward":
                    assert (ids[:-1], mask) == (their[name], [False] * len(their[name]) + [True]), (row, name)
                    continue
                expected = through_end(one, prompt + their[name])
                learned = [at >= max(len(prompt), 1) for at in range(len(expected))]
                assert (ids, mask) == (expected, learned), (row, name)
