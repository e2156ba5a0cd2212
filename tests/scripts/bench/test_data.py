"""The data benchmark: its table, and that it prepares the rows that a run would train on."""

import gzip
import json

from qlora_jax.config import DataArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.readers.files import read_rows
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from scripts.bench import data as bench
from tests.data.conftest import ASSETS


def test_rates_are_of_the_fastest_round_and_ratios_of_each_rounds_own():
    def one(library: float, rows: float) -> dict:
        return {"library": bench.Seconds(library, 2 * library), "rows": bench.Seconds(rows, 3 * rows)}

    # Wall-clock ratios 1.5, 1.1 and 0.5; CPU ratios are 1.5 times those.
    lines = bench.table([one(1.0, 1.5), one(2.0, 2.2), one(4.0, 2.0)], 600)
    assert lines == [
        " library:      600 rows/s",
        "    rows:      400 rows/s, +10.0% time, +65.0% CPU time",
    ]


def test_the_rows_measured_are_those_of_a_run(tmp_path):
    tokenizer = load_tokenizer(
        {
            "tokenizer_json": gzip.decompress((ASSETS / "smollm2_tokenizer.json.gz").read_bytes()).decode(),
            "chat_template": (ASSETS / "smollm2_chat_template.jinja").read_text(),
            "eos_token": "<|im_end|>",
        }
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"Is {n} odd?", "completion": "yes" * n}) + "\n" for n in range(1, 9))
    )
    rows = bench.to_packs(str(path), read_rows(path), tokenizer)
    data = DataArgs(train=str(path), max_length=bench.MAX_LENGTH, overlong="drop", packing=True)
    expected = load_dataset(data, tokenizer, seed=0, micro_batch_size=1, accumulation=16).train
    assert rows.digest == expected.digest
