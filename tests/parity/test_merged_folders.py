"""Folders of runs that trained with codes of compressed-tensors: transformers reads the weights of training."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.export import main
from qlora_jax.io.open_model import open_model
from tests.io.export.test_merged_codes import SIZES
from tests.parity.test_llama_cpp import _folder
from tests.parity.test_peft import _write_run

ORACLE = Path(__file__).parent.parent / "oracle/compressed_tensors_weights.py"
NAMES = ("int4", "mxfp4", "nvfp4")


@pytest.mark.slow
def test_transformers_reads_the_weights_of_training(tmp_path: Path, oracle) -> None:
    folders = {}
    for name in NAMES:
        place = tmp_path / name
        place.mkdir()
        _write_run(place / "run", _folder(place, "llama", **SIZES), LoraArgs(merge_into=name))
        main(["--run", str(place / "run"), "--format", "hf", "--output", str(place / "out")])
        folders[name] = str(place / "out")
    theirs = oracle(ORACLE, cases=folders)
    for name, folder in folders.items():
        ours = open_model(folder).tensors
        coded = [each for each, entry in ours.items() if entry.file_type not in ("F32", "BF16")]
        assert len(coded) == 14
        for each, entry in ours.items():
            weight = entry.read()
            if each in coded:  # compressed-tensors rounds the product of code and scale to bfloat16
                weight = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(weight, theirs[f"{name}/{each}"], err_msg=f"{name}: {each}")
