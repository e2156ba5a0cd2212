"""Finetuning on a GGUF file's codes: llama.cpp runs the same file and a LoRA."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.tasks.text import text_task
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.open_model import open_model
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.models.partition import partition
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.parity.test_llama_cpp import NAMED, TOKENS, VOCABULARY, WITHIN, _case, _gguf_of
from tests.parity.test_peft import _logits, _write_run

LLAMA_CPP = Path(__file__).parent.parent / "oracle/llama_cpp_models.py"
TRANSFORMERS = LLAMA_CPP.with_name("gguf_row_losses.py")
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
@pytest.mark.parametrize(
    ("types", "stored"),
    [
        ("Q2_K", {"Q2_K", "Q3_K"}),
        ("Q3_K_M", {"Q3_K", "Q4_K", "Q5_K"}),
        ("IQ4_XS", {"IQ4_XS"}),
        ("IQ4_NL", {"IQ4_NL"}),
    ],
)
def test_files_of_few_bits_that_llama_cpp_made(tmp_path: Path, llama_cpp, types: str, stored: set[str]) -> None:
    """llama.cpp rounds 256 activations at a time to 8 bits for these types, where it rounds 32 for Q4_0."""
    config = FAMILIES["llama"][1] | {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512}
    config |= {"max_position_embeddings": 512}
    files: dict[str, Any] = {"tokenizer.json": byte_level(), "tokenizer_config.json": NAMED}
    folder = write_folder(tmp_path / "model", config, random_tensors(config), **files)
    dense, path = _gguf_of(folder, tmp_path / "dense.gguf"), tmp_path / "base.gguf"
    llama_cpp(LLAMA_CPP.with_name("llama_cpp_quantize.py"), files=[[str(dense), str(path), types]])
    entries = open_model(path).tensors.values()
    assert {entry.file_type for entry in entries if "_proj" in entry.name} == stored
    model, base, lora = _run_on(path, tmp_path / "run", scale=0.3)
    cases = {"alone": _case(path, rows=TOKENS.tolist()), "adapted": _case(path, lora, rows=TOKENS.tolist())}
    found = llama_cpp(LLAMA_CPP, cases=cases, new_tokens=0)
    ours = {"alone": _logits(base, TOKENS), "adapted": _logits(model, TOKENS)}
    moved = np.abs(ours["adapted"] - ours["alone"]).max()
    for name, logits in ours.items():
        off = np.abs(found[f"{name}/logits"] - logits).max()
        assert off < 2 * WITHIN["q4_0"] * np.abs(logits).max() and off < moved / 20, (name, off, moved)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_smollm2(tmp_path: Path, smollm2_gguf: Path, local_data, llama_cpp) -> None:
    """Perplexity of 2,044 tokens on a published file in Q4_1, alone and with an adapter."""
    opened = open_pretrained(model=str(smollm2_gguf))
    text = str(local_data("wikitext2_valid.txt.gz"))
    rows = text_task(text, opened.tokenizer, window=512, stride=None, max_tokens=2048, max_positions=8192).rows
    tokens = np.stack([np.asarray(ids, np.int32) for ids, _ in rows])
    model, base, lora = _run_on(smollm2_gguf, tmp_path / "run", scale=0.04)
    ours = {name: _perplexity(_logits(each, tokens), tokens) for name, each in (("alone", base), ("adapted", model))}
    assert abs(ours["adapted"] / ours["alone"] - 1) > 0.01  # the random adapter does something
    cases = {"alone": None, "adapted": lora}
    found = llama_cpp(
        LLAMA_CPP,
        cases={name: _case(smollm2_gguf, each, rows=tokens.tolist()) for name, each in cases.items()},
        new_tokens=0,
    )
    for name, expected in ours.items():
        assert _perplexity(found[f"{name}/logits"], tokens) == pytest.approx(expected, rel=0.01), name


@pytest.mark.slow
@pytest.mark.exhaustive
def test_gemma(gemma3_gguf: Path, local_data, oracle, llama_cpp) -> None:
    """Perplexity of 2,044 tokens on a published file in Q4_K_M, against transformers with its dequantized weights."""
    opened = open_pretrained(model=str(gemma3_gguf))
    text = str(local_data("wikitext2_valid.txt.gz"))
    rows = text_task(text, opened.tokenizer, window=512, stride=None, max_tokens=2048, max_positions=8192).rows
    ours = score_rows(partition(load_base(opened, weight_settings(opened, "stored", "float32"))), rows)
    tokens = np.stack([np.asarray(ids, np.int32) for ids, _ in rows])
    theirs = oracle(TRANSFORMERS, path=str(gemma3_gguf), tokens=tokens)["losses"]
    served = _case(gemma3_gguf, scored=tokens.tolist())
    of_llama_cpp = llama_cpp(LLAMA_CPP, cases={"alone": served}, new_tokens=0)["alone/losses"]
    count = tokens[:, 1:].size
    found, dequantized, in_llama_cpp = (float(np.exp(nll.sum() / count)) for nll in (ours.nll, theirs, of_llama_cpp))
    print(f"perplexity: ours {found:.4f}, transformers {dequantized:.4f}, llama.cpp {in_llama_cpp:.4f}")
    assert int(ours.tokens.sum()) == count == 2044
    assert found == pytest.approx(dequantized, rel=1e-4)
    assert in_llama_cpp == pytest.approx(found, rel=0.01)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_file_of_several_types(gemma3_gguf: Path) -> None:
    """Q4_K_M in Q5_0, Q8_0, Q4_K and Q6_K, against its dequantized weights, whose logits equal transformers'."""
    opened = open_pretrained(model=str(gemma3_gguf))
    row = np.array([opened.tokenizer.encode("def mean(values): return sum(values) / len(values)")], np.int32)
    stored = _logits(load_base(opened, weight_settings(opened, "stored", "float32")), row)
    dense = _logits(load_base(opened, weight_settings(opened, "none", "float32")), row)
    assert np.abs(stored - dense).max() < 1e-4 * np.abs(dense).max()
