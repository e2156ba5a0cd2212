"""Row formats: detection, the texts that rows become, and the words of each error."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qlora_jax.data.encoder import check_rows, encode_rows
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.formats.registry import ALPACA_NO_INPUT, ALPACA_WITH_INPUT, FORMATS
from qlora_jax.data.holdout import content_hash
from qlora_jax.data.loss_mask.reference import EncodedRow
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer

MESSAGES = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
ALPACA = {"instruction": "Add", "input": "1 and 2", "output": "3"}
COMPLETION = {"prompt": "Q:", "completion": " A"}
TEXT = {"text": "Once upon"}
UNNATURAL = {"instruction_with_input": "q", "input": "", "constraints": "None.", "output": "a"}


def rows_of(*data: dict[str, Any]) -> list[Row]:
    return [Row(Place(number + 1, number), columns) for number, columns in enumerate(data)]


def encode_one(tokenizer: Tokenizer, row: dict[str, Any]) -> EncodedRow:
    rows = rows_of(row)
    row_format = detect_format("x.jsonl", rows)
    check_rows("x.jsonl", rows, row_format)
    return encode_rows("x.jsonl", rows, row_format, tokenizer)[0]


def parts(tokenizer: Tokenizer, row: EncodedRow) -> tuple[str, str]:
    """(text without loss, text with loss)."""
    return tuple(tokenizer.decode(row.ids[mask].tolist()) for mask in (~row.supervised, row.supervised))


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([MESSAGES], "messages"),
        ([ALPACA], "alpaca"),
        ([{"instruction": "a", "output": "b"}], "alpaca"),
        ([{**ALPACA, "text": "all of it"}], "alpaca"),
        ([COMPLETION], "completion"),
        ([{**MESSAGES, "prompt": "p"}], "messages"),
        ([{"id": 1, "text": "t"}, {"text": "u", "source": "web"}], "text"),
        ([{"input": "q", "output": "a", "subject": "s"}], "input-output"),
        ([{"inputs": "q", "targets": "a"}], "flan"),
        ([{"instruction": "i", "instances": [{"input": "", "output": "a"}]}], "seed-tasks"),
        ([{"instruction": "i", "instances": [UNNATURAL]}], "unnatural-instructions"),
        ([{"instruction": "i", "instances": []}], "unnatural-instructions"),
        ([{"instances": [UNNATURAL], "reformulations": [UNNATURAL]}], "unnatural-instructions-full"),
        (
            [{"instances": [UNNATURAL]}, {"instances": [UNNATURAL], "reformulations": None}],
            "unnatural-instructions-full",
        ),
        ([{"id": "x", "conversations": [{"from": "human", "value": "q"}]}], "sharegpt"),
    ],
)
def test_forms_are_told_by_their_columns(rows: list[dict[str, Any]], name: str):
    assert detect_format("x.jsonl", rows_of(*rows)).name == name
    assert detect_format("x.jsonl", rows_of(*rows), name).name == name


def test_a_named_form_wins_over_the_first_that_fits():
    assert detect_format("x.jsonl", rows_of({**ALPACA, "text": "all of it"}), "text").name == "text"


@pytest.mark.parametrize(
    ("columns", "nearest"),
    [
        (["question", "answer"], "Nearest: completion. Set --data.columns '{prompt: question, completion: answer}'."),
        (["subject", "inputs", "output"], "Nearest: input-output. Set --data.columns '{input: inputs}'."),
        (
            ["Instruction", "Output"],
            "Nearest: alpaca. Set --data.columns '{instruction: Instruction, output: Output}'.",
        ),
        (["instruction", "response"], "Nearest: alpaca. Set --data.columns '{output: response}'."),
        (  # databricks-dolly: without its context, the model would learn answers from nowhere
            ["instruction", "context", "response", "category"],
            "Nearest: alpaca. Set --data.columns '{output: response, input: context}'.",
        ),
        (["instruction", "input", "response"], "Nearest: alpaca. Set --data.columns '{output: response}'."),
        (["dialogue"], "Nearest: messages. Set --data.columns '{messages: dialogue}'."),
        (
            ["instruction", "examples"],
            "Nearest: alpaca. Set --data.columns '{output: COLUMN}', where COLUMN is a column of the file.",
        ),
        (["promt", "completion"], "Nearest: completion. Set --data.columns '{prompt: promt}'."),
        (
            ["phrase", "mark"],
            "None of the columns resembles one of these. Name your columns, for example with --data.columns "
            "'{prompt: COLUMN, completion: COLUMN}'.",
        ),
    ],
)
def test_unknown_forms_are_told_with_columns_forms_and_the_nearest(columns: list[str], nearest: str):
    with pytest.raises(ValueError, match=r"x\.jsonl: the rows have no known format") as error:
        detect_format("x.jsonl", rows_of(dict.fromkeys(columns, "v")))
    told = str(error.value)
    assert f"Columns found: {', '.join(map(repr, columns))}." in told and told.endswith(nearest)
    assert all(row_format.name in told for row_format in FORMATS.values() if row_format.kind == "text")


def test_a_file_that_is_one_object_is_told_with_how_to_write_its_rows():
    whole = {"version": "1", "my data": [{"prompt": "a"}]}
    with pytest.raises(
        ValueError, match=r"If the rows are its list 'my data', .*: jq -c '\.\[\"my data\"\]\[\]' FILE\."
    ):
        detect_format("x.json", rows_of(whole))
    with pytest.raises(ValueError, match="no known format") as error:
        detect_format("x.json", rows_of(whole, whole))
    assert "jq" not in str(error.value)


def test_a_wrong_name_is_told_with_the_form_that_fits():
    with pytest.raises(ValueError, match=r"do not have the format 'alpaca'(.|\n)*Nearest: completion: fits as it is"):
        detect_format("x.jsonl", rows_of(COMPLETION), "alpaca")


def test_the_format_that_is_named_is_the_nearest_if_it_fits():
    with pytest.raises(
        ValueError, match=r"Nearest: alpaca\. Set --data\.columns '{instruction: task, output: answer}'"
    ):
        detect_format("x.jsonl", rows_of({"task": "a", "answer": "b", "text": "c"}), "alpaca")


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("alpaca", {"instruction": "a"}, "no column 'output'; found 'instruction'"),
        ("alpaca", {"instruction": " ", "output": ""}, "instruction is empty; output is empty"),
        ("alpaca", {**ALPACA, "input": ["x"]}, "input is list, expected text"),
        ("completion", {"prompt": "", "completion": None}, "completion is null, expected text"),
        ("text", {"text": "a\ud83d"}, r"text contains half of a surrogate pair \(\\ud83d\)"),
        ("messages", {"messages": "hello"}, "messages is not a list of objects"),
        ("messages", {"messages": []}, "no message has the role 'assistant'"),
        ("messages", {"messages": [turn("system", "a"), turn("user", "b")]}, r"found the roles \['system', 'user'\]"),
        (
            "messages",
            {"messages": [turn("human", "a"), turn("Assistant", "b"), turn("usr", "c"), turn("x", "d")]},
            "message 0: unknown role 'human'; known are system, .*, observation; did you mean 'user'[?]; "
            "message 1: unknown role 'Assistant'.*did you mean 'assistant'[?]; "
            "message 2: unknown role 'usr'.*did you mean 'user'[?]; "
            "message 3: unknown role 'x'; known are .*, observation$",
        ),
        (
            "messages",
            {"messages": [{"from": "human", "value": "b"}]},
            "message 0 needs 'role' and 'content', found 'from'",
        ),
        ("messages", {"messages": [turn("assistant", "")]}, r"content of message 0 \(assistant\) is empty"),
        ("messages", {"messages": [turn("assistant", None)]}, r"message 0 \(assistant\) is null, expected text"),
    ],
)
def test_rows_that_can_not_teach_are_all_told(name: str, row: dict[str, Any], told: str):
    good = {"messages": MESSAGES, "alpaca": ALPACA, "completion": COMPLETION, "text": TEXT}[name]
    with pytest.raises(ValueError, match=rf"2 of 3 rows can't be used:\n  x\.jsonl:2, 3: .*{told}"):
        check_rows("x.jsonl", rows_of(good, row, row), FORMATS[name])


def test_roles_of_published_data_are_known():
    for role in ("system", "developer", "user", "tool", "function", "ipython", "observation"):
        assert FORMATS["messages"].check({"messages": [turn(role, "a"), turn("assistant", "b")]}) == []


def test_questions_and_answers_go_through_the_chat_template(tokenizer: Tokenizer):
    for row, question, answer in (
        (MESSAGES, "Q", "A"),
        (ALPACA, "Add\n\n1 and 2", "3"),
        ({**ALPACA, "input": ""}, "Add", "3"),
        ({"instruction": "Add", "output": "3"}, "Add", "3"),
        (COMPLETION, "Q:", " A"),
    ):
        encoded = encode_one(tokenizer, row)
        assert encoded.ids.tolist() == tokenizer.encode(
            tokenizer.render([turn("user", question), turn("assistant", answer)])
        )
        assert parts(tokenizer, encoded)[1] == answer + "<|im_end|>"


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (ALPACA, ALPACA_WITH_INPUT.format(instruction="Add", input="1 and 2"), "3"),
        ({**ALPACA, "input": ""}, ALPACA_NO_INPUT.format(instruction="Add"), "3"),
        ({**ALPACA, "input": None}, ALPACA_NO_INPUT.format(instruction="Add"), "3"),
        (COMPLETION, "Q:", " A"),
        (TEXT, "", "Once upon"),
    ],
)
def test_without_a_template_answers_end_with_eos(plain_tokenizer: Tokenizer, row: dict, prompt: str, answer: str):
    encoded = encode_one(plain_tokenizer, row)
    expected = plain_tokenizer.encode(prompt) + plain_tokenizer.encode(answer) + [plain_tokenizer.eos_id]
    assert encoded.ids.tolist() == expected
    assert parts(plain_tokenizer, encoded) == (prompt, answer + "<|im_end|>")


def test_texts_of_the_reference_alpaca_format():
    assert ALPACA_WITH_INPUT.format(instruction="I", input="C") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nI\n\n### Input:\nC\n\n### Response: "
    )
    assert ALPACA_NO_INPUT.format(instruction="I") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nI\n\n### Response: "
    )


def test_plain_text_starts_with_bos_only_where_the_tokenizer_asks(smollm2_source: dict):
    tokenizer = load_tokenizer({**smollm2_source, "bos_token": "<|endoftext|>", "add_bos_token": True})
    text = encode_one(tokenizer, TEXT)
    assert text.ids.tolist() == [0, *tokenizer.encode("Once upon"), 2]
    assert text.supervised.tolist() == [False, *[True] * (len(text.ids) - 1)]
    # A chat template writes its own bos.
    assert 0 not in encode_one(tokenizer, MESSAGES).ids


def test_what_a_form_needs_of_the_tokenizer_is_told(smollm2_source: dict, plain_tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="format 'messages' need a chat template"):
        encode_one(plain_tokenizer, MESSAGES)
    nameless = load_tokenizer({"tokenizer_json": smollm2_source["tokenizer_json"]})
    with pytest.raises(ValueError, match="has no eos_token"):
        encode_one(nameless, TEXT)


def test_rows_that_the_template_refuses_are_all_told(smollm2_source: dict, templates: dict):
    tokenizer = load_tokenizer({**smollm2_source, "chat_template": templates["mistral"]})
    with_system = {"messages": [turn("system", "s"), *MESSAGES["messages"]]}
    rows = rows_of(with_system, MESSAGES, with_system)
    with pytest.raises(ValueError, match=r"2 of 3 rows(.|\n)*x\.jsonl:1, 3: .*only user and assistant"):
        encode_rows("x.jsonl", rows, FORMATS["messages"], tokenizer)


def test_half_a_character_in_a_role_or_a_tool_is_told(tokenizer: Tokenizer, templates: dict):
    half = {"messages": [turn("\ud83d", "Q"), *MESSAGES["messages"]]}
    rows = rows_of(MESSAGES, half, {"messages": [turn("Ünd", "Q"), *MESSAGES["messages"]]})
    with pytest.raises(ValueError, match=r"1 of 3 rows(.|\n)*x\.jsonl:2: a role or a tool contains \\ud83d, half of"):
        encode_rows("x.jsonl", rows, FORMATS["messages"], tokenizer)
    assert content_hash(FORMATS["messages"], half) != content_hash(FORMATS["messages"], MESSAGES)


def test_real_data_of_other_tools(local_data: Callable, tokenizer: Tokenizer, plain_tokenizer: Tokenizer):
    from qlora_jax.data.readers.files import read_rows

    path = str(local_data("alpaca_en_demo.json.gz"))
    rows = read_rows(path)
    row_format = detect_format(path, rows)
    check_rows(path, rows, row_format)
    assert (len(rows), row_format.name) == (999, "alpaca")
    for chosen in (tokenizer, plain_tokenizer):
        for row, encoded in zip(rows[:50], encode_rows(path, rows[:50], row_format, chosen), strict=True):
            assert parts(chosen, encoded)[1] == row.data["output"] + "<|im_end|>"
            assert not encoded.lossy and np.all(np.diff(np.flatnonzero(encoded.supervised)) == 1)
