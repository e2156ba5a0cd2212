"""Perplexity of SmolLM2 on a text, against torch with transformers and bitsandbytes (fp32, 4,088 targets)."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from qlora_jax import evaluate
from qlora_jax.evaluation.tasks.text import text_task
from qlora_jax.io.hf.model_writer import write_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import open_pretrained
from tests.io.integer_folders import FORMS, rounded
from tests.io.tiny_models import write_folder

ORACLE = Path(__file__).parent.parent / "oracle/evaluate_text.py"
# The shipped weights, and their linear layers quantized again to NF4 with double quantization.
REFERENCE = {"unquantized": 19.502, "quantized": 25.406}
SHA256_OF_IDS = "9372639fe2f54b2b14a51a3d7a6e2de4f60bda4ac5101310c0701bb48d4a7251"


def test_the_tokens_are_those_of_the_reference(smollm2_gguf, local_data):
    tokenizer = open_pretrained(model=str(smollm2_gguf)).tokenizer
    text = str(local_data("wikitext2_valid.txt.gz"))
    rows = text_task(text, tokenizer, window=512, stride=None, max_tokens=4096, max_positions=8192).rows
    ids = np.concatenate([ids for ids, _ in rows])
    assert hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest() == SHA256_OF_IDS


@pytest.mark.exhaustive
@pytest.mark.slow
def test_smollm2(smollm2_gguf, local_data, tmp_path):
    words = ["--model", str(smollm2_gguf), "--text", str(local_data("wikitext2_valid.txt.gz")), "--max_tokens", "4096"]
    evaluate.main([*words, "--json", str(tmp_path / "scores.json")])
    columns = json.loads((tmp_path / "scores.json").read_text())["tasks"]["text"]["columns"]
    for column, expected in REFERENCE.items():
        assert columns[column]["perplexity"]["value"] == pytest.approx(expected, abs=0.01), column


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_codes_of_the_file_have_the_perplexity_of_its_weights(smollm2_gguf, local_data, tmp_path):
    words = ["--model", str(smollm2_gguf), "--text", str(local_data("wikitext2_valid.txt.gz")), "--max_tokens", "4096"]
    options = ["--quant_type", "stored", "--columns", "[quantized]", "--compute_dtype", "float32"]
    evaluate.main([*words, *options, "--json", str(tmp_path / "scores.json")])
    found = json.loads((tmp_path / "scores.json").read_text())["tasks"]["text"]["columns"]["quantized"]
    assert found["perplexity"]["value"] == pytest.approx(REFERENCE["unquantized"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_integers_of_a_folder_have_the_perplexity_of_their_weights(smollm2_gguf, local_data, tmp_path):
    write_in_awqs_form(smollm2_gguf, tmp_path / "awq")
    words = ["--model", str(tmp_path / "awq"), "--text", str(local_data("wikitext2_valid.txt.gz"))]
    words += ["--max_tokens", "4096", "--compute_dtype", "float32", "--json", str(tmp_path / "scores.json")]
    found = {}
    for quant_type in ("stored", "nf4"):
        evaluate.main([*words, "--quant_type", quant_type])
        columns = json.loads((tmp_path / "scores.json").read_text())["tasks"]["text"]["columns"]
        found |= {f"{quant_type} {column}": columns[column]["perplexity"]["value"] for column in columns}
    assert found["stored quantized"] == pytest.approx(found["nf4 unquantized"], rel=1e-4)
    assert found["stored quantized"] == pytest.approx(24.676, abs=0.01)
    assert found["nf4 quantized"] == pytest.approx(33.864, abs=0.01)  # rounded twice


def write_in_awqs_form(gguf: Path, folder: Path) -> None:
    """Writes a model whose linear layers are rounded to integers in groups of 64, as AWQ packs them."""
    source, form = open_model(gguf), FORMS["awq, groups of 64"]
    tensors: dict[str, np.ndarray] = {}
    for name, entry in source.tensors.items():
        if name.endswith("_proj.weight"):
            packed = form.pack(rounded(entry.read(), 64))
            tensors |= {f"{name.removesuffix('weight')}{part}": np.ascontiguousarray(packed[part]) for part in packed}
        else:
            tensors[name] = entry.read()
    write_folder(folder, {**source.config, "quantization_config": dict(form.config)}, tensors)
    write_tokenizer(folder, open_pretrained(model=str(gguf)).tokenizer, source, source.tokenizer["stop_token_ids"])


@pytest.mark.slow
def test_strided_windows_and_letters_are_what_torch_computes(smollm2_gguf, local_data, tmp_path, oracle):
    text, mmlu = local_data("wikitext2_valid.txt.gz"), local_data("qlora_zero_shot_mmlu_val.json.gz")
    with gzip.open(mmlu, "rt") as file:
        rows = [json.loads(line) for line in file][::25]
    (tmp_path / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"window": 256, "stride": 100, "max_tokens": 1000}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    words = ["--model", str(smollm2_gguf), "--text", str(text), "--letters", str(tmp_path / "mmlu.jsonl"), *options]
    evaluate.main([*words, "--columns", "[unquantized]", "--json", str(tmp_path / "scores.json")])
    told = json.loads((tmp_path / "scores.json").read_text())["tasks"]
    found = {task: told[task]["columns"]["unquantized"] for task in told}

    prompts = [row["input"] for row in rows]
    with gzip.open(text, "rt") as file:
        theirs = oracle(ORACLE, gguf=str(smollm2_gguf), text=file.read(100_000), questions=prompts, **sizes)
    assert theirs["count"] == 999
    assert found["text"]["perplexity"]["value"] == pytest.approx(float(theirs["perplexity"]), rel=1e-3)
    low, high = found["text"]["perplexity"]["interval"]
    assert low < theirs["perplexity"] < high
    right = theirs["logits"].argmax(axis=1) == np.array(["ABCD".index(row["output"]) for row in rows])
    assert found["letters"]["right by letter"]["value"] == pytest.approx(right.mean(), abs=1e-3)
    of = {
        subject: [r for r, row in zip(right, rows, strict=True) if row["subject"] == subject]
        for subject in {row["subject"] for row in rows}
    }
    name = f"mean over {len(of)} subjects"
    assert found["letters"][name]["value"] == pytest.approx(np.mean([np.mean(each) for each in of.values()]), abs=1e-3)
