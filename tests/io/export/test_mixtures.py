"""llama.cpp's mixtures: the quantizer's failures, the cost on held-out rows, and the suggested dtype."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.api.export import write_export
from qlora_jax.config import DataArgs, read_config, write_config
from qlora_jax.config.exports import ExportOptions
from qlora_jax.export import main
from qlora_jax.io.export.gguf_metadata import export_spec
from qlora_jax.io.export.held_out_cost import LADDER, HeldOutCost, TrainedScores, suggest_dtype
from qlora_jax.io.gguf import llama_quantizer
from qlora_jax.io.gguf.header import parse_header
from qlora_jax.io.gguf.llama_quantizer import quantize_file, types_note
from qlora_jax.io.gguf.writer import write_gguf
from qlora_jax.io.pretrained import open_finetuned, open_pretrained
from qlora_jax.measures.metrics import RowScores
from tests.e2e.project import write_rows
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.io.tiny_tokenizers import byte_level
from tests.parity.test_peft import LORAS, _write_run

ORACLE = Path(__file__).parent.parent.parent / "oracle/llama_cpp_quantize.py"
ROWS = 12
NO_PROGRESS = lambda *_: None  # noqa: E731


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with held-out rows; its adapter is random."""
    config = tiny_config(vocab_size=460, max_position_embeddings=512, tie_word_embeddings=True)
    special = json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    files: dict[str, Any] = {"tokenizer.json": byte_level(), "tokenizer_config.json": special}
    model = write_folder(tmp_path / "model", config, random_weights(config), **files)
    run, rows = tmp_path / "run", write_rows(tmp_path / "held_out.jsonl", ROWS)
    _write_run(run, model, LORAS["all"])
    settings = read_config(run / "config.yaml")
    (run / "config.yaml").unlink()
    write_config(dataclasses.replace(settings, data=DataArgs(train="x", eval=str(rows))), run / "config.yaml")
    return run


def _scores(nll: float) -> RowScores:
    """Rows of 10 tokens, a little apart, so that intervals have a width."""
    rows = np.linspace(0.99, 1.01, 40)
    return RowScores(nll=10 * nll * rows, tokens=np.full(40, 10), exact=np.zeros(40, bool), begins=np.zeros(40, bool))


def test_the_cost_is_a_paired_difference() -> None:
    """Losses 3 (base), 1 (trained), 1.1 (file): the file costs 0.1, and the adapter changes the loss by -2."""
    cost = HeldOutCost.of("q6_k", TrainedScores(_scores(1.0), _scores(3.0)), _scores(1.1))
    assert cost.cost.difference == pytest.approx(0.1) and cost.effect.difference == pytest.approx(-2)
    assert cost.perplexities == pytest.approx((np.exp(3.0), np.exp(1.0), np.exp(1.1)))
    low, high = cost.cost.interval or (0, 0)
    assert 0.099 < low < 0.1 < high < 0.101
    assert cost.is_small
    assert not cost.of("q6_k", TrainedScores(_scores(1.0), _scores(1.9)), _scores(1.1)).is_small


@pytest.mark.parametrize(
    ("losses", "line", "tried"),
    [
        ({"q4_k_s": 1.1}, "q4_k_s costs less than a tenth", []),
        ({"q4_k_s": 1.4, "q4_k_m": 1.3, "q5_k_m": 1.1}, "--dtype q5_k_m (+0.1000 [", ["q4_k_m", "q5_k_m"]),
        (dict.fromkeys(LADDER, 1.4), "use --dtype float16", ["q4_k_m", "q5_k_m", "q6_k", "q8_0"]),
    ],
)
def test_the_smallest_dtype_that_costs_little_is_suggested(
    tmp_path: Path, losses: dict[str, float], line: str, tried: list[str]
) -> None:
    done = []

    def quantize(target: Path, dtype: str) -> None:
        done.append(dtype)
        target.write_text(dtype)

    trained = TrainedScores(_scores(1.0), _scores(3.0))
    found = HeldOutCost.of("q4_k_s", trained, _scores(losses["q4_k_s"]))
    score_file = lambda path: _scores(losses[path.read_text()])  # noqa: E731
    assert line in suggest_dtype(found, tmp_path, trained, quantize, score_file)
    assert done == tried and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_printed_perplexity_is_that_of_evaluate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--run", str(run), "--format", "gguf", "--dtype", "q8_0"])
    shown = capsys.readouterr().out
    rows = str(run.parent / "held_out.jsonl")
    models = {
        "base": q.load(str(run.parent / "model"), quant_type="nf4", compute_dtype="float32"),
        "trained": q.load(str(run), compute_dtype="float32"),
        "this file": q.load(str(run / "gguf/model-q8_0.gguf"), quant_type="none", compute_dtype="float32"),
    }
    assert f"held-out perplexity on {ROWS} rows" in shown
    for name, (model, tokenizer) in models.items():
        metrics = q.evaluate_model(model, tokenizer, rows=rows).tasks["rows"].metrics["model"]
        (found,) = re.findall(rf"{name} ([\d.e+]+)", shown.split("held-out perplexity")[1])
        assert float(found) == pytest.approx(metrics["perplexity"].value, rel=1e-3), name


def test_a_missing_package_is_an_error_and_missing_rows_are_a_note_and_python_prints_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_export(open_finetuned(run), run / "silent", "gguf", ExportOptions(dtype="q8_0"))
    assert capsys.readouterr() == ("", "")
    (run.parent / "held_out.jsonl").unlink()
    main(["--run", str(run), "--format", "gguf", "--dtype", "q8_0", "--output", str(run / "q8_0")])
    assert (
        "the cost in held-out perplexity was not measured: the held-out rows cannot be read" in capsys.readouterr().out
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"dtype: q4_k_m requires .* pip install \"qlora-jax\[gguf-quantize\]\""):
        main(["--run", str(run), "--format", "gguf", "--dtype", "q4_k_m"])
    assert not (run / "gguf").exists()


@pytest.mark.slow
def test_mixtures_of_a_run(run: Path, quantizer: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows of 64 and 128 weights get larger types in place of those with blocks of 256, and a line says so."""
    main(["--run", str(run), "--format", "gguf", "--dtype", "q5_k_m"])
    shown = capfd.readouterr()
    assert {path.name for path in (run / "gguf").iterdir()} == {"model-q5_k_m.gguf", "Modelfile"}
    assert "quantizing: 100% of" in shown.err and "by q5_k_m" in shown.out and "not whole blocks of 256" in shown.out
    assert "measuring importance: 100% of 12 rows" in shown.err
    assert "the quantizer weighted errors by the mean square of each input on the held-out rows" in shown.out
    kinds = {info.type.name for info in parse_header(run / "gguf/model-q5_k_m.gguf").tensors}
    assert kinds == {"F32", "Q5_1", "Q8_0"}


@pytest.fixture
def source(run: Path) -> Path:
    main(["--run", str(run), "--format", "gguf"])
    return run / "gguf/model-float16.gguf"


def test_a_full_disk_and_a_failure_are_one_error_each(
    source: Path, small_disk: Path, quantizer: None, monkeypatch: pytest.MonkeyPatch, llama_cpp
) -> None:
    """A small buffer changes no bit of the file, and the command leaves nothing on a disk that holds one file only."""
    monkeypatch.setattr(llama_quantizer, "BUFFER_BYTES", 1 << 12)
    target, theirs = source.with_name("ours.gguf"), source.with_name("theirs.gguf")
    quantize_file(source, target, "q6_k", NO_PROGRESS)
    llama_cpp(ORACLE, files=[(str(source), str(theirs), "Q6_K")])
    assert target.read_bytes() == theirs.read_bytes()
    assert types_note(target, "q6_k").startswith(f"q6_k: {target.stat().st_size / 1e6:,.0f} MB, 8.5 bits per weight")
    with pytest.raises(OSError, match=r"cannot be written: No space left on device .*Free space on this disk") as error:
        main(
            ["--run", str(source.parents[1]), "--format", "gguf", "--dtype", "q4_k_m", "--output", f"{small_disk}/out"]
        )
    assert error.value.filename == f"{small_disk}/out/model-q4_k_m.gguf" and not list(small_disk.iterdir())
    (small_disk / "other").write_bytes(bytes(200 << 10))
    with pytest.raises(OSError, match=r"cannot be written: No space left on device .*Free space on this disk") as error:
        quantize_file(source, small_disk / "model.gguf", "q6_k", NO_PROGRESS)
    assert error.value.filename == str(small_disk / "model.gguf")
    with pytest.raises(ValueError, match=r"dtype: llama.cpp cannot quantize the model to q4_k_m \(.*requantizing from"):
        quantize_file(target, theirs, "q4_k_m", NO_PROGRESS)


def test_importance_moves_errors_to_other_columns(source: Path, quantizer: None) -> None:
    """Errors of a layer fall as it weights them; tensors without importance, or in Q8_0, keep all bits."""
    rng = np.random.default_rng(0)
    matrices = {info.name: info for info in parse_header(source).tensors if len(info.shape) == 2}
    given = {name: info for name, info in matrices.items() if name.startswith("blk.0.")}
    importance = {name: rng.lognormal(sigma=3.0, size=info.shape[1]).astype(np.float32) for name, info in given.items()}
    plain, weighted = source.with_name("plain.gguf"), source.with_name("weighted.gguf")
    quantize_file(source, plain, "q4_k_m", NO_PROGRESS)
    quantize_file(source, weighted, "q4_k_m", NO_PROGRESS, importance)
    assert {path.name for path in source.parent.iterdir()} == {source.name, plain.name, weighted.name, "Modelfile"}
    exact, before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (source, plain, weighted)
    )
    moved = {name for name in given if before[name].tensor_type.name != "Q8_0"}
    assert len(moved) > 3
    for name in matrices:
        if name not in moved:
            assert np.array_equal(before[name].data, after[name].data), name
            continue
        rounded = [gguf.dequantize(each[name].data, each[name].tensor_type) for each in (before, after)]
        errors = [np.sum(np.square(one - exact[name].data.astype(np.float32)) * importance[name]) for one in rounded]
        assert errors[1] < 0.8 * errors[0], (name, errors)
    with pytest.raises(ValueError, match=r"dtype: llama.cpp cannot quantize the model .*imatrix size 3"):
        quantize_file(source, plain, "q4_k_m", NO_PROGRESS, {"blk.0.attn_q.weight": np.ones(3, np.float32)})


def test_rows_that_are_not_whole_blocks_get_larger_types(tmp_path: Path, quantizer: None) -> None:
    """Rows of 64 fill blocks of 32 but not of 256, and rows of 72 neither."""
    config = tiny_config(vocab_size=460, intermediate_size=72, tie_word_embeddings=True)
    files: dict[str, Any] = {"tokenizer.json": byte_level(), "tokenizer_config.json": '{"bos_token": "<|im_start|>"}'}
    opened = open_pretrained(model=str(write_folder(tmp_path / "model", config, random_weights(config), **files)))
    spec, path = export_spec(opened).spec, tmp_path / "model.gguf"
    write_gguf(path, spec, list(spec.tensors), (opened.source.tensors[name].read() for name in spec.tensors), "float16")
    for dtype, kind, odd in (("q4_k_m", "q5_0", "15 of them .* blocks of 256"), ("iq4_nl", "iq4_nl", "2 .* of 32")):
        target = tmp_path / f"{dtype}.gguf"
        quantize_file(path, target, dtype, NO_PROGRESS)
        assert re.search(rf"matrices: 1\d {kind}, .*2 f16.*; {odd}, and got a larger type$", types_note(target, dtype))
