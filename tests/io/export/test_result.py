"""Exporters return their result and print nothing."""

from pathlib import Path

import pytest

from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.pretrained import open_finetuned
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
