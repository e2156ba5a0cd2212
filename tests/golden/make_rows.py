"""Writes tests/golden/reference_rows.json: rows of each format, and the results of artidoro/qlora for them.

    .oracle/bin/python tests/golden/make_rows.py qlora.py

`qlora.py` is the file of the reference. This script extracts its mappings and its collator and runs them unchanged, on
synthetic rows, with SmolLM2's tokenizer and bos.
"""

import argparse
import ast
import copy
import dataclasses
import gzip
import json
import tempfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests/data/assets/smollm2_tokenizer.json.gz"
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<repo_name>"}
LIMITS = [(1024, 256, False), (24, 6, False), (24, 6, True), (1, 5, False), (512, 1, False)]
TAKEN = {
    "IGNORE_INDEX",
    "DataCollatorForCausalLM",
    "extract_unnatural_instructions_data",
    "ALPACA_PROMPT_DICT",
    "extract_alpaca_dataset",
    "format_dataset",
}

GUANACO = "### Human: Is 7 prime?### Assistant: Yes.\n\nIt is.### Human: And 8?### Assistant: No."
HH = "\n\nHuman: Is 7 prime?\n\nAssistant: Yes.\n\nIt is.\n\nHuman: And 8?\n\nAssistant: No."
ROWS: dict[str, list[dict[str, object]]] = {
    "alpaca": [
        {"instruction": "Add the numbers", "input": "1 and 2", "output": "3 "},
        {"instruction": "Name a prime", "input": "", "output": "  7\n"},
    ],
    "alpaca-clean": [
        {"instruction": "Sag {etwas}\tauf Deutsch", "input": "{x}\n", "output": "Grüß Gott 👍🏽, wie geht's?"}
    ],
    "chip2": [
        {"text": "<human>: Is 7 prime?\nSay why.\n<bot>: Yes.\nIt is.", "metadata": "x"},
        {"text": "<human>: \n<bot>: Hello there, how can I help you today?"},
    ],
    "self-instruct": [
        {"prompt": "Suggest a better phrase.\n\nOutput:", "completion": " I suggest a phrase that is longer than six"}
    ],
    "hh-rlhf": [{"chosen": HH, "rejected": "no"}],
    "oasst1": [{"text": GUANACO}],
    "longform": [
        {"input": "Write an essay about bread. ", "output": "Bread is a staple food.\n\nIt is made of flour."}
    ],
    "input-output": [{"input": "", "output": "No prompt, an answer"}, {"input": "Q:\n", "output": "\n\nA"}],
    "unnatural-instructions": [
        {
            "instruction": "Count.",
            "instances": [
                {"instruction_with_input": "Count. a b", "input": "a b", "constraints": "None.", "output": "2"},
                {"instruction_with_input": "Count. a", "input": "a", "constraints": "None.", "output": "1, or one"},
            ],
        }
    ],
}


class Rows:
    """The subset of datasets.Dataset that the mappings of the reference use."""

    def __init__(self, rows: list[dict[str, object]]):
        self.rows = rows

    @property
    def column_names(self) -> dict[str, list[str]]:
        """Returns every column, under the name of the split."""
        return {"train": list(dict.fromkeys(name for row in self.rows for name in row))}

    def map(self, function: Callable[[dict], dict], remove_columns: Sequence[str] = ()) -> "Rows":
        """Returns rows updated by `function`, without `remove_columns`."""
        mapped = [row | function(row) for row in self.rows]
        return Rows(mapped).remove_columns(remove_columns)

    def rename_column(self, old: str, new: str) -> "Rows":
        """Returns rows with one column renamed."""
        return Rows([{new if name == old else name: value for name, value in row.items()} for row in self.rows])

    def remove_columns(self, names: Sequence[str]) -> "Rows":
        """Returns rows without these columns."""
        return Rows([{name: value for name, value in row.items() if name not in names} for row in self.rows])


def reference(path: str) -> dict[str, Any]:
    """Returns the definitions of the reference by name."""
    found = {
        "args": SimpleNamespace(dataset=None),
        "dataclass": dataclasses.dataclass,
        **{name: getattr(typing, name) for name in ("Dict", "Sequence")},
        **{"torch": torch, "transformers": transformers, "copy": copy, "pad_sequence": pad_sequence},
    }
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        names = {getattr(node, "name", None), *(getattr(target, "id", None) for target in getattr(node, "targets", []))}
        if names & TAKEN:
            exec(compile(ast.Module([node], []), path, "exec"), found)
    return found


def pairs_of(theirs: dict[str, Any], form: str, rows: list[dict[str, object]]) -> list[dict[str, str]]:
    """Returns input and output of the reference for rows of a format."""
    if form == "unnatural-instructions":
        columns = theirs["extract_unnatural_instructions_data"]({"instances": [row["instances"] for row in rows]})
        return [{"input": i, "output": o} for i, o in zip(columns["input"], columns["output"], strict=True)]
    return theirs["format_dataset"](Rows(rows), form).rows


def collated(
    theirs: dict[str, Any],
    tokenizer: transformers.PreTrainedTokenizerFast,
    pair: dict[str, str],
    limits: tuple[int, int, bool],
) -> dict:
    """Returns ids and labels of one pair."""
    batch = theirs["DataCollatorForCausalLM"](tokenizer, *limits, predict_with_generate=False)([pair])
    return {"ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}


def main() -> None:
    """Runs the reference on every row and writes the golden file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help="qlora.py of artidoro/qlora")
    theirs = reference(parser.parse_args().reference)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(gzip.decompress(TOKENIZER.read_bytes()).decode())
        file.flush()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file.name, **SPECIAL)
    forms = {form: {"rows": rows, "pairs": pairs_of(theirs, form, rows)} for form, rows in ROWS.items()}
    for made in forms.values():
        made["tokens"] = [[collated(theirs, tokenizer, pair, each) for pair in made["pairs"]] for each in LIMITS]
    golden = {"special": SPECIAL, "limits": LIMITS, "transformers": transformers.__version__, "forms": forms}
    text = json.dumps(golden, ensure_ascii=False) + "\n"
    (ROOT / "tests/golden/reference_rows.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
