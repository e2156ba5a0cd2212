"""Pairs, labelled answers, classes and embeddings as ids: those of TRL, of inference, and of each text alone."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.data.branch_tree import branch_ends
from qlora_jax.data.branches.encoder import WrittenRow, encode_written, make_branch_encoder
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.loss_mask.reference import EncodedRow, loss_mask
from qlora_jax.data.loss_mask.turns import turn_marks
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.row_kinds import row_use
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_new_tokens
from tests.data.conftest import sentencepiece_tokenizer
from tests.data.formats.test_tool_calls import HERMES, WEATHER, called, conversation
from tests.data.loss_mask.reasoning_templates import REASONING_TEMPLATES

ORACLE = Path(__file__).parents[2] / "oracle/trl_datasets.py"


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
        encoder = make_branch_encoder(row_format, tokenizer, row_use(objective), labels)
        found += encoder.begin(place, problems)()(problems)[1]
    assert problems == []
    return found


def texts_of(row: EncodedRow) -> list[tuple[list[int], list[bool]]]:
    """The ids and the mask of each text, of which a branch is the end."""
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
CALL = {"role": "assistant", "tool_calls": [called({"city": "Ulm"})]}
WITH_TOOLS = [
    {"prompt": [USER], "chosen": [CALL], "rejected": [BAD], "tools": json.dumps([WEATHER])},
    {"prompt": conversation({"city": "Ulm"})[:3], "chosen": [GOOD], "rejected": [BAD], "tools": json.dumps([WEATHER])},
]
STYLED = """{% if style %}{{ '<|im_start|>system\n' + style + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def with_styles(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "chat_template_kwargs": {"style": f"style {n}"}} for n, row in enumerate(rows)]


CASES: dict[bool, list[tuple[str, list[dict[str, Any]]]]] = {
    True: [
        ("dpo", EXPLICIT),
        ("dpo", IMPLICIT),
        ("cpo", CONVERSATIONS),
        ("orpo", CONVERSATIONS),
        ("reward", IMPLICIT),
        ("kto", unpaired(EXPLICIT)),
    ],
    False: [
        ("dpo", STRINGS[:5]),
        ("dpo", STRINGS[5:]),
        ("cpo", STRINGS),
        ("orpo", STRINGS),
        ("reward", STRINGS[:5]),
        ("kto", unpaired(STRINGS[:5])),
    ],
}


Case = tuple[str, Tokenizer, str, list[dict[str, Any]]]  # the tokenizer and its name, the trainer, and rows
SAME_ROWS = {"cpo": ("cpo", "simpo"), "orpo": ("orpo",)}  # objectives by the trainer of trl.experimental that they have


@pytest.fixture(scope="module")
def of_trl(
    oracle: Callable,
    smollm2_source: dict[str, Any],
    templates: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[Case, list[dict[str, Any]]]]:
    """Cases, and what TRL makes of their rows."""
    folder, every = (
        tmp_path_factory.mktemp("tokenizers"),
        {**templates, "plain": None, "hermes": HERMES, "styled": STYLED},
    )
    tokenizers = {name: load_tokenizer({**smollm2_source, "chat_template": text}) for name, text in every.items()}
    for prefix in ("never", "first", "every"):
        tokenizers[prefix] = with_bos(sentencepiece_tokenizer(prefix))
        tokenizers[f"{prefix}, plain"] = dataclasses.replace(tokenizers[prefix], chat_template=None)
    cases: list[Case] = []
    sent: list[dict[str, Any]] = []
    for name, one in tokenizers.items():
        path = folder / name
        path.write_text(one.to_json())
        for trainer, rows in CASES[one.chat_template is not None]:
            few_trainers = ("dpo",) if name == "hermes" else ("dpo", "cpo")  # TRL's CPO does not read tools
            if trainer not in few_trainers and name not in ("smollm2", "plain", "every"):
                continue
            own_rows = {"hermes": [[row] for row in WITH_TOOLS], "styled": [with_styles(rows)]}
            for few in own_rows.get(name, [rows]):
                cases.append((name, one, trainer, few))
                common = {"tokenizer": str(path), "special_tokens": dict(one.special_tokens), "trainer": trainer}
                sent.append({**common, "template": one.chat_template, "rows": few})
    return [*zip(cases, json.loads(str(oracle(ORACLE, cases=sent)["results"])), strict=True)]


@pytest.mark.slow
def test_ids_and_masks_equal_those_of_trl(of_trl: list[tuple[Case, list[dict[str, Any]]]]):
    for (_, one, trainer, rows), theirs in of_trl:
        if trainer in SAME_ROWS:
            continue
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


@pytest.mark.slow
def test_ids_and_masks_of_orpo_cpo_and_simpo_equal_those_of_trl(of_trl: list[tuple[Case, list[dict[str, Any]]]]):
    """Equal but for the three differences that docs/preferences.md explains, each of which occurs."""
    differences = set()
    for (name, one, trainer, rows), theirs in of_trl:
        for objective in SAME_ROWS.get(trainer, ()):
            for row, ours, their in zip(rows, encoded(one, rows, objective), theirs, strict=True):
                expected, starts, found = zip(*(trl_answer(one, their, answer) for answer in ANSWERS), strict=True)
                first = max(min(starts), 1)
                masks = [[at >= first for at in range(len(ids))] for ids in expected]
                assert texts_of(ours) == [*zip(expected, masks, strict=True)], (name, objective, row)
                differences |= {*itertools.chain(*found), *(("start",) if max(starts) > first else ())}
    assert differences == {"bos", "eos", "start"}


ANSWERS = ("chosen", "rejected")


def trl_answer(tokenizer: Tokenizer, their: dict[str, Any], name: str) -> tuple[list[int], int, set[str]]:
    """The ids of trl.experimental and the start of the answer, without what it adds, and the names of that.

    It adds bos although the tokenizer does not ask for it and the template does not write it. It adds eos to text that
    does not end with it, although the template ends the turn before.
    """
    ids, labels = their[f"{name}_input_ids"], their[f"{name}_labels"]
    start = labels.index(next(id for id in labels if id != -100))
    assert labels == [-100] * start + ids[start:]
    differences: set[str] = set()
    chat = tokenizer.chat_template is not None
    first = tokenizer.encode(tokenizer.render([USER]))[0] if chat else tokenizer.bos_id * tokenizer.add_bos_token
    if ids[0] == tokenizer.bos_id != first:
        ids, start, differences = ids[1:], start - 1, {"bos"}
    if not chat:
        return ids, start, differences
    (end,) = tokenizer.encode(turn_marks(tokenizer).end)[-1:]
    answered = tokenizer.decode(ids[start:-1]).rstrip()
    if ids[-1] == tokenizer.eos_id and answered.endswith(tokenizer.decode([end])):
        return through_end(tokenizer, ids[:-1]), start, {*differences, "eos"}
    return through_end(tokenizer, ids), start, differences


HARD_TEXTS = [
    "",
    " ",
    "a",
    "<|im_end|>",
    " <|im_end|> b",
    "<|im_",
    "end|>",
    "漢字",
    "\n\n",
    "x<|im_start|>y",
    "</s> z",
    "<s>",
]


@pytest.mark.parametrize("name", ["smollm2", "never", "first", "every"])
def test_each_text_has_the_ids_of_the_text_alone(tokenizer: Tokenizer, name: str):
    one = tokenizer if name == "smollm2" else sentencepiece_tokenizer(name)
    end = one.special_tokens["eos_token"]
    rows = [
        WrittenRow(a + end + b, (a + end + b + c, a + end + b + b, a + end + c), False)
        for a in HARD_TEXTS
        for b in HARD_TEXTS[:6]
        for c in HARD_TEXTS
    ]
    for row, found in zip(rows, encode_written(one, rows), strict=True):
        alone = one.encode_batch([row.prompt or "", *row.texts])
        assert [found.prompt, *found.texts] == alone, row


def test_another_token_may_overlap_the_last_special_token_of_a_prompt(tokenizer: Tokenizer):
    one = with_new_tokens(tokenizer, ["a<|im"], [])
    (found,) = encode_written(one, [WrittenRow("b a<|im_end|>", ("b a<|im_end|>)", "b a<|im_end|>="), False)])
    assert one.special_text.search("a<|im_end|>") and one.encode("a<|im_end|>")[0] == one.new_ids[0]
    assert [found.prompt, *found.texts] == one.encode_batch(["b a<|im_end|>", "b a<|im_end|>)", "b a<|im_end|>="])


def test_a_prompt_is_encoded_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    given: list[str] = []
    whole = Tokenizer.encode_fast
    monkeypatch.setattr(Tokenizer, "encode_fast", lambda self, texts: (given.extend(texts), whole(self, texts))[1])
    encoded(tokenizer, [{"prompt": "long " * 50, "chosen": "a", "rejected": "b"}])
    assert sum("long" in text for text in given) == 1


def test_the_prompt_is_that_of_inference(tokenizer: Tokenizer):
    (row,) = encoded(tokenizer, [{"prompt": "Q", "chosen": "yes", "rejected": "no"}])
    prompt = tokenizer.encode(tokenizer.render([turn("user", "Q")], add_generation_prompt=True))
    for (ids, mask), answer in zip(texts_of(row), ("yes<|im_end|>", "no<|im_end|>"), strict=True):
        assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))
        assert tokenizer.decode(ids[len(prompt) :]) == answer
    assert row.source == len(prompt) and not row.cut
    assert len(row.ids) == len(prompt) - 1 + sum(1 + count for count in (2, 2))


def test_a_token_across_the_end_of_the_prompt_belongs_to_the_answers(plain_tokenizer: Tokenizer):
    (row,) = encoded(plain_tokenizer, [STRINGS[2]])
    shared = plain_tokenizer.encode("Say")
    assert row.cut and row.source == len(shared) == row.branches[0].depth + 1
    for (ids, mask), answer in zip(texts_of(row), ("hi there", "no"), strict=True):
        assert ids == plain_tokenizer.encode(f"Say hi{answer}<|im_end|>")
        assert mask == [False] + [True] * (len(ids) - 1)


def test_classes_and_embeddings_end_with_a_filler(tokenizer: Tokenizer, plain_tokenizer: Tokenizer):
    labels = ("no", "yes")
    rows = [{"premise": "a b", "hypothesis": "c", "label": "yes"}, {"messages": [USER], "label": "no"}]
    pair, chat = encoded(tokenizer, rows, "classification", labels)
    assert pair.ids.tolist() == [*tokenizer.encode("a b\nc"), tokenizer.eos_id] and not pair.branches
    assert chat.ids.tolist() == [*tokenizer.encode(tokenizer.render([USER])), tokenizer.eos_id]
    assert [row.values["labels"] for row in (pair, chat)] == [[1.0], [0.0]]
    (row,) = encoded(plain_tokenizer, [{"anchor": "a b", "positive": "c", "negative": "d e f"}], "embedding")
    found = [(ids[:-1], mask) for ids, mask in texts_of(row)]
    expected = [plain_tokenizer.encode(text) for text in ("a b", "c", "d e f")]
    assert found == [(ids, [False] * len(ids) + [True]) for ids in expected]
    assert [branch.depth for branch in row.branches] == [0, 0, 0]


def test_bos_comes_first_once():
    one = dataclasses.replace(sentencepiece_tokenizer("never"), chat_template=None, add_bos_token=True)
    for text in ("a", "<s>a"):
        (row,) = encoded(one, [{"text": text, "label": 1}], "classification", ("0", "1"))
        assert row.ids.tolist() == [one.bos_id, *one.encode("a"), one.eos_id]


@pytest.mark.parametrize(
    ("template", "row", "problem"),
    [
        ("drops", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "drops or rewrites a part of an answer"),
        ("none", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "needs a chat template, and this model has"),
        ("no end", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "expected a special token"),
        ("mistral", {"prompt": [turn("system", "s"), USER], "chosen": [GOOD], "rejected": [BAD]}, "only user and"),
    ],
)
def test_rows_that_a_template_does_not_write(
    tokenizer: Tokenizer, templates: dict[str, str], template: str, row: dict[str, Any], problem: str | None
):
    extra = {
        "none": None,
        "no end": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
        "drops": templates["smollm2"].replace("message['content']", "message['content'] | replace('F', '')"),
    }
    one = dataclasses.replace(tokenizer, chat_template=(templates | extra)[template])
    rows, problems = [Row(Place(7, 6), row)], []
    row_format = detect_format("x.jsonl", rows, objective="dpo")
    _, found = make_branch_encoder(row_format, one, row_use("dpo")).begin(rows, problems)()(problems)
    ((place, told),) = problems
    assert place.line == 7 and problem in told and not found


def test_reasoning_that_the_template_drops_is_counted(tokenizer: Tokenizer, templates: dict[str, str]):
    reads = templates["smollm2"].replace("message['content']", "(message.reasoning_content or '') + message['content']")
    thought = {**GOOD, "reasoning_content": "two and two"}
    rows = [{"prompt": [USER], "chosen": [thought], "rejected": [BAD]}]
    rows += [{"prompt": [USER], "chosen": [BAD], "rejected": [turn("assistant", "<think>hm</think>\n\nfour")]}]
    unseen = [row.unseen_reasoning for row in encoded(tokenizer, rows)]
    seen = [row.unseen_reasoning for row in encoded(dataclasses.replace(tokenizer, chat_template=reads), rows)]
    assert (unseen, seen) == ([True, False], [False, False])


THOUGHT = turn("assistant", "<think>\nhm\n</think>\n\nfour")
ASKED_AGAIN = [turn("user", "Hi"), turn("assistant", "<think>\nso\n</think>\n\nHello"), USER]
THINKING_OFF = {"enable_thinking": False}


@pytest.mark.parametrize("kwargs", [{}, THINKING_OFF], ids=["thinking", "off"])
@pytest.mark.parametrize("name", REASONING_TEMPLATES)
def test_answers_are_learned_behind_the_prompt_of_inference_as_in_sft(tokenizer: Tokenizer, name: str, kwargs: dict):
    one = dataclasses.replace(tokenizer, chat_template=REASONING_TEMPLATES[name], chat_template_kwargs=kwargs)
    for prompt in ([USER], ASKED_AGAIN):
        asked = one.encode(one.render(prompt, add_generation_prompt=True))
        (row,) = encoded(one, [{"prompt": prompt, "chosen": [THOUGHT], "rejected": [BAD]}])
        for (ids, mask), answer in zip(texts_of(row), (THOUGHT, BAD), strict=True):
            sft = loss_mask(one, [*prompt, answer], learn="last")
            assert one.decode(ids) == one.decode(sft.ids[: int(np.flatnonzero(sft.supervised)[-1]) + 1].tolist())
            if row.cut:  # a token crosses the end of the prompt, so it belongs to the answers
                assert (name, kwargs) == ("qwen3", THINKING_OFF)
                continue
            assert ids[: len(asked)] == asked and mask == [False] * len(asked) + [True] * (len(ids) - len(asked))
            assert ids == sft.ids.tolist()[: len(ids)] and not sft.supervised[len(ids) :].any()
        assert row.unseen_reasoning == ("hm" not in one.decode(texts_of(row)[0][0]))


def test_a_tools_text_inside_an_answer_may_be_written_as_json(tokenizer: Tokenizer):
    as_json = "{{ m.content | tojson if m.role == 'tool' else m.content }}"
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + as_json + "<|im_end|>\n{% endfor %}"
    one = dataclasses.replace(
        tokenizer,
        chat_template=template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    answer = [turn("assistant", "Let me see"), turn("tool", 'the "sum" is 4'), GOOD]
    (row,) = encoded(one, [{"prompt": [USER], "chosen": answer, "rejected": [BAD]}])
    assert '\\"sum\\"' in one.decode(texts_of(row)[0][0])
