"""Exporters return their result and print nothing."""

from pathlib import Path

import pytest

from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.export.result import ExportResult
from qlora_jax.io.pretrained import open_finetuned
from qlora_jax.model_source import ModelSource
from tests.inference.small_run import write_run


def test_exporters_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    opened, loaded = open_finetuned(write_run(tmp_path)), []
    adapter = export_peft(opened, tmp_path / "peft")
    merged = export_merged(opened, tmp_path / "hf", "hf", dtype="float32", progress=lambda *done: loaded.append(done))
    assert capfd.readouterr() == ("", "")
    assert adapter.path == tmp_path / "peft" and adapter.difference is None
    assert str(adapter).splitlines()[0] == f"adapter of run, step 7: {tmp_path / 'peft'}"
    assert merged.difference is not None and merged.difference.is_small
    done, total, _ = loaded[-1]
    assert done == total > 0


def test_layers_that_are_left_out_are_named_with_their_bytes(tmp_path: Path) -> None:
    drafts = {"model.layers.46.eh_proj.weight": 1024, "model.layers.46.mlp.gate.weight": 1024}
    source = ModelSource(path=tmp_path, config={}, tokenizer={}, tensors={}, drafts=drafts)
    result = ExportResult(path=tmp_path, lines=("written",))
    line = "layers that predict further tokens are left out: model.layers.46 (2 tensors, 2.00 KiB)"
    assert str(result.with_other_parts(source, "hf")).splitlines() == ["written", line]
    assert result.with_other_parts(ModelSource(path=tmp_path, config={}, tokenizer={}, tensors={}), "hf") == result
