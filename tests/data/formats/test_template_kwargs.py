"""The column `chat_template_kwargs`: a row's variables of the template, in every kind of row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.config.schema import DataArgs
from qlora_jax.data.branches.encoder import make_branch_encoder
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.encoder import make_encoder
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import FORMATS
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place, Problem, Row
from qlora_jax.data.row_kinds import row_use
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer, with_template_kwargs
from qlora_jax.evaluation.settings import TaskArgs
from qlora_jax.evaluation.task import TaskContext
from qlora_jax.evaluation.tasks.pairs import build
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.inference.prompts import prompter
from tests.data.loss_mask.cases import as_lists
from tests.data.loss_mask.reasoning_templates import REASONING_TEMPLATES

OFF, ON = {"enable_thinking": False}, {"enable_thinking": True}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\na"}
OTHER = {"role": "assistant", "content": "b"}
KINDS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER, USER, ANSWER]},
    "alpaca": {"instruction": "q", "output": "<think>\nr\n</think>\n\na"},
    "preference": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "unpaired-preference": {"prompt": [USER], "completion": [ANSWER], "label": True},
}
OBJECTIVES = {"preference": "dpo", "unpaired-preference": "kto"}


@pytest.fixture(scope="module")
def qwen3(smollm2_source: dict) -> Tokenizer:
    return load_tokenizer({**smollm2_source, "chat_template": REASONING_TEMPLATES["qwen3"]})


def encode(tokenizer: Tokenizer, rows: Sequence[dict[str, Any]]) -> tuple[list[EncodedRow], list[str]]:
    """The rows' ids and the problems of those that have none."""
    placed = [Row(Place(n + 1, n), row) for n, row in enumerate(rows)]
    objective = next((OBJECTIVES[kind] for kind in OBJECTIVES if {*KINDS[kind]} <= {*rows[0]}), "sft")
    row_format = detect_format("x.jsonl", placed, objective=objective)
    problems: list[Problem] = []
    fit = [row for row in placed if not (found := row_format.check(row.data)) or problems.append((row.place, found[0]))]
    use = row_use(objective)
    make = (
        make_encoder(row_format, tokenizer) if use.kind == "text" else make_branch_encoder(row_format, tokenizer, use)
    )
    _, found = make.begin(fit, problems)()(problems)
    return found, [problem for _, problem in problems]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_ids_that_the_setting_gives(qwen3: Tokenizer, kind: str):
    """Rows with different variables stand next to each other, and a row's take precedence over the setting's."""
    given = [None, OFF, json.dumps(ON), {"enable_thinking": None}, OFF, {}]
    rows = [KINDS[kind] if one is None else {**KINDS[kind], "chat_template_kwargs": one} for one in given]
    found, problems = encode(qwen3, rows)
    assert problems == []
    (on,), (off,) = (
        encode(with_template_kwargs(qwen3, one, "chat_template_kwargs"), [KINDS[kind]])[0] for one in (ON, OFF)
    )
    assert as_lists(on) != as_lists(off)
    assert [as_lists(row) for row in found] == [as_lists(one) for one in (on, off, on, on, off, on)]
    setting, _ = encode(with_template_kwargs(qwen3, OFF, "chat_template_kwargs"), rows[:3])
    assert [as_lists(row) for row in setting] == [as_lists(one) for one in (off, off, on)]


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("thinking", "chat_template_kwargs is not JSON"),
        ([1], r"chat_template_kwargs is not an object of the template's variables \(found list"),
        ("3", r"chat_template_kwargs is not an object of the template's variables \(found int"),
        (False, r"chat_template_kwargs is not an object of the template's variables \(found bool"),
        ({"enable_thinking": {"a": 1}}, "chat_template_kwargs: enable_thinking is dict, expected true, false"),
        ({"enable_thinkin": True}, "reads no variable of this name .* did you mean 'enable_thinking'"),
        ({"messages": []}, "reads no variable of this name .found 'messages'"),
    ],
)
@pytest.mark.parametrize("kind", ["messages", "preference"])
def test_other_columns_of_this_name_are_refused(qwen3: Tokenizer, kind: str, given: object, problem: str):
    found, problems = encode(qwen3, [KINDS[kind], {**KINDS[kind], "chat_template_kwargs": given}])
    assert len(found) == len(problems) == 1
    with pytest.raises(ValueError, match=problem):
        raise ValueError(problems[0])


@pytest.mark.parametrize(
    "row", [{"text": "a"}, {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "completion": "b"}]
)
def test_rows_that_no_template_writes_have_no_variables(smollm2_source: dict, row: dict[str, Any]):
    plain = load_tokenizer({**smollm2_source, "chat_template": None})
    found, problems = encode(plain, [row, {**row, "chat_template_kwargs": OFF}, {**row, "chat_template_kwargs": None}])
    assert len(found) == 2 and "chat_template_kwargs: " in problems[0] and len(problems) == 1


def test_rows_of_training_and_evaluation_have_their_variables(qwen3: Tokenizer, tmp_path: Path):
    rows, pairs = ([KINDS[kind], {**KINDS[kind], "chat_template_kwargs": OFF}] for kind in ("messages", "preference"))
    paths = {}
    for name, some in (("rows", rows), ("pairs", pairs)):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    renamed = paths["rows"].with_name("renamed.jsonl")
    renamed.write_text(paths["rows"].read_text().replace("chat_template_kwargs", "variables"))
    data = DataArgs(train=str(renamed), columns={"chat_template_kwargs": "variables"})
    trained = load_dataset(data, qwen3, seed=0, micro_batch_size=1, accumulation=1)
    expected = encode(qwen3, rows)[0]
    assert [trained.train.row(n)[0].tolist() for n in range(2)] == [row.ids.tolist() for row in expected]
    assert trained.report.train.ignored_columns == () and trained.report.train.kept == 2
    limits = dict(max_rows=None, max_positions=999)
    scored = {
        "rows": rows_task(str(paths["rows"]), qwen3, **limits).rows,
        "pairs": build(TaskArgs(pairs=str(paths["pairs"])), TaskContext(tokenizer=qwen3, max_positions=999)).sequences,
    }
    learned = {name: [qwen3.decode(ids[mask].tolist()) for ids, mask in texts] for name, texts in scored.items()}
    thought = "<think>\nr\n</think>\n\na<|im_end|>"
    assert learned["rows"] == [thought, thought, "a<|im_end|>", "a<|im_end|>"]
    assert learned["pairs"] == [thought, "<think>\n\n</think>\n\nb<|im_end|>", "\n\na<|im_end|>", "\n\nb<|im_end|>"]


def test_rows_of_equal_variables_have_equal_content():
    form = FORMATS["messages"]
    given = [OFF, json.dumps(OFF), {**OFF, "other": None}], [None, "", {}, {"enable_thinking": None}], [ON]
    found = [{form.content({**KINDS["messages"], "chat_template_kwargs": one}) for one in each} for each in given]
    assert [len(each) for each in found] == [1, 1, 1] and len(set.union(*found)) == 3
    assert found[1] == {form.content(KINDS["messages"])}


def test_a_prompt_of_generate_has_its_variables(qwen3: Tokenizer):
    asker = prompter(qwen3, raw=False, system=None)
    row = {"prompt": "q", "chat_template_kwargs": OFF}
    expected = prompter(with_template_kwargs(qwen3, OFF, "x"), raw=False, system=None).row({"prompt": "q"})
    assert asker.row(row) == expected != asker.row({"prompt": "q"})
