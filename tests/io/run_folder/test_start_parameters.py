"""The parameters that a run starts with are identified by their effect, and read as they were written."""

import ml_dtypes
import numpy as np
import pytest

from qlora_jax.io.run_folder.start_parameters import FILE, NO_CHANGE, read_start, start_digest, write_start

ZERO, ONE = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "leaves",
    [
        {"lora_a": ONE, "lora_b": ZERO},
        {"lambda_d": ONE, "lambda_b": ZERO},
        {"down": ONE, "down_bias": ONE, "up": ZERO, "up_bias": ZERO},
    ],
)
def test_adapters_without_an_effect_have_one_digest(leaves):
    assert start_digest({"q": leaves}) == start_digest({"v": leaves, "q": leaves}) == NO_CHANGE
    for name, values in leaves.items():
        if not values.any():
            assert start_digest({"q": leaves | {name: ONE}}) != NO_CHANGE


def test_digests_differ_by_name_values_and_the_magnitude_of_dora():
    trained = {"lora_a": ONE, "lora_b": ONE}
    dora = {"lora_a": ONE, "lora_b": ZERO, "magnitude": ONE}  # its product rounds
    trees = [{"q": trained}, {"v": trained}, {"q": trained | {"lora_a": 2 * ONE}}, {"q": dora}, {}]
    assert len({start_digest(tree) for tree in trees}) == len(trees)
    assert start_digest({"q": dora}) == start_digest({"q": dora | {"lora_a": 2 * ONE}})


def test_parameters_are_read_as_they_were_written(tmp_path):
    assert read_start(tmp_path) is None
    lora = {"model.layers.q": {"lora_a": ONE, "lora_b": ONE.astype(ml_dtypes.bfloat16)}, "score": {"weight": 2 * ONE}}
    write_start(tmp_path, lora)
    found = read_start(tmp_path)
    assert found is not None and start_digest(found) == start_digest(lora)
    assert found["model.layers.q"]["lora_b"].dtype == ml_dtypes.bfloat16
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="damaged"):
        read_start(tmp_path)
