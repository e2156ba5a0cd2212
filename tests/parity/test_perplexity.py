"""Perplexity of SmolLM2 on a text, against torch with transformers and bitsandbytes (fp32, 4,088 targets)."""

import hashlib
import json

import numpy as np
import pytest

from qlora_jax import evaluate, runtime
from qlora_jax.inference.task_files import text_task
from qlora_jax.io.opened import open_base_or_run

# The shipped weights, and their linear layers quantized again to NF4 with double quantization.
REFERENCE = {"unquantized": 19.502, "quantized": 25.406}
SHA256_OF_IDS = "9372639fe2f54b2b14a51a3d7a6e2de4f60bda4ac5101310c0701bb48d4a7251"


def test_the_tokens_are_those_of_the_reference(smollm2_gguf, local_data):
    tokenizer = open_base_or_run(str(smollm2_gguf), None).tokenizer
    text = str(local_data("wikitext2_valid.txt.gz"))
    rows = text_task(text, tokenizer, window=512, max_tokens=4096, max_positions=8192).rows
    ids = np.concatenate([ids for ids, _ in rows])
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == SHA256_OF_IDS


@pytest.mark.slow
def test_smollm2(smollm2_gguf, local_data, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "start", lambda: None)
    words = ["--model", str(smollm2_gguf), "--text", str(local_data("wikitext2_valid.txt.gz")), "--max_tokens", "4096"]
    evaluate.main([*words, "--json", str(tmp_path / "scores.json")])
    columns = json.loads((tmp_path / "scores.json").read_text())["tasks"]["text"]["columns"]
    for column, expected in REFERENCE.items():
        assert columns[column]["perplexity"]["value"] == pytest.approx(expected, abs=0.01), column
