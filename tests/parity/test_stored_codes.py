"""Finetuning on a GGUF file's codes: the base equals transformers', llama.cpp runs the same file and a LoRA."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.parity.test_llama_cpp import NAMED, TOKENS, VOCABULARY, WITHIN, _case
from tests.parity.test_peft import _logits, _write_run

LLAMA_CPP = Path(__file__).parent.parent / "oracle/llama_cpp_models.py"
TRANSFORMERS = Path(__file__).parent.parent / "oracle/gguf_logits.py"
LORA = LoraArgs(rank=4, alpha=8.0, target_modules="all-linear")


def _perplexity(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Returns the perplexity of each row's tokens after the first."""
    shifted = (logits - logits.max(-1, keepdims=True))[:, :-1].astype(np.float64)
    log_p = np.take_along_axis(shifted, tokens[:, 1:, None], -1)[..., 0] - np.log(np.exp(shifted).sum(-1))
    return float(np.exp(-log_p.mean()))


def _run_on(path: Path, run: Path, scale: float) -> tuple[Any, Any, Path]:
    """Writes a run on a file's codes, with random adapters; returns (its model, its base, its exported LoRA)."""
    model, base = _write_run(run, path, LORA, scale=scale, quant_type="stored")
    main(["--run", str(run), "--format", "gguf-lora"])
    return model, base, run / "gguf-lora/adapter.gguf"


@pytest.mark.slow
def test_the_same_file_and_a_lora_in_llama_cpp(tmp_path: Path, llama_cpp) -> None:
    """The adapter moves llama.cpp's logits as it moves ours; llama.cpp rounds activations to 8 bits."""
    config = FAMILIES["llama"][1] | {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
    files = {"tokenizer.json": byte_level(), "tokenizer_config.json": NAMED}
    tensors, path = random_tensors(config), tmp_path / "base.gguf"
    opened = open_pretrained(model=str(write_folder(tmp_path / "model", config, tensors, 1, **files)))
    write_gguf(path, export_spec(opened).spec, list(tensors), iter(tensors.values()), "q4_0")
    types = {entry.file_type for entry in open_model(path).tensors.values() if "_proj" in entry.name}
    assert types == {"Q4_0"}
    model, base, lora = _run_on(path, tmp_path / "run", scale=0.3)
    cases = {"alone": _case(path, rows=TOKENS.tolist()), "adapted": _case(path, lora, rows=TOKENS.tolist())}
    found = llama_cpp(LLAMA_CPP, cases=cases, new_tokens=0)
    ours = {"alone": _logits(base, TOKENS), "adapted": _logits(model, TOKENS)}
    moved = np.abs(ours["adapted"] - ours["alone"]).max()
    for name, logits in ours.items():
        off = np.abs(found[f"{name}/logits"] - logits).max()
        assert off < WITHIN["q4_0"] * np.abs(logits).max() and off < moved / 5, (name, off, moved)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["smollm2_gguf", "gemma3_gguf"])
def test_a_published_file(name: str, tmp_path: Path, request, local_data, oracle, llama_cpp) -> None:
    """Q4_1, and Q4_K_M whose layers are in Q5_0, Q8_0, Q4_K and Q6_K: perplexity before and with an adapter."""
    path = request.getfixturevalue(name)
    opened = open_pretrained(model=str(path))
    with gzip.open(local_data("wikitext2_valid.txt.gz"), "rt") as file:
        ids = opened.tokenizer.encode(file.read(20_000))
    tokens = np.array(ids[:512], np.int32).reshape(2, 256)
    base = load_base(opened, weight_settings(opened, "stored", "float32"))
    logits = _logits(base, tokens)
    expected = oracle(TRANSFORMERS, path=str(path), tokens=tokens)["logits"]
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert _perplexity(logits, tokens) == pytest.approx(_perplexity(expected, tokens), rel=1e-4)
    twice = _logits(load_base(opened, weight_settings(opened, "nf4", "float32")), tokens)
    assert _perplexity(twice, tokens) > 1.05 * _perplexity(logits, tokens)

    model, _, lora = _run_on(path, tmp_path / "run", scale=0.06)
    rows = tokens.tolist()
    cases = {"alone": _case(path, rows=rows), "adapted": _case(path, lora, rows=rows)}
    found = llama_cpp(LLAMA_CPP, cases=cases, new_tokens=0)
    adapted = _perplexity(_logits(model, tokens), tokens)
    assert adapted > 1.05 * _perplexity(logits, tokens)  # the random adapter does something
    assert _perplexity(found["alone/logits"], tokens) == pytest.approx(_perplexity(logits, tokens), rel=0.01)
    assert _perplexity(found["adapted/logits"], tokens) == pytest.approx(adapted, rel=0.01)
