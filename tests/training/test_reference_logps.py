"""Reference log-probabilities are computed once, stored in pieces, and given to the rows that they belong to."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.io.run_folder.start_parameters import NO_CHANGE
from qlora_jax.training import reference_logps
from qlora_jax.training.reference_logps import (
    ReferencePass,
    reference_folder,
    reference_key,
)
from tests.inference.tiny import byte_tokenizer, tiny_parts


def write(path, count, letter):
    rows = [
        {"prompt": f"{letter}{n}", "chosen": "c" * (n % 7 + 1), "rejected": "r" * (n % 5 + 2)} for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def dataset_of(folder, **changes):
    data = DataArgs(
        train={write(folder / "a.jsonl", 30, "a"): 0.5, write(folder / "b.jsonl", 11, "b"): 2.0},
        eval=write(folder / "held.jsonl", 9, "h"),
        max_length=32,
        **changes,
    )
    return load_dataset(data, byte_tokenizer(), objective="dpo", seed=0, micro_batch_size=4, accumulation=1)


def sums_of(batch):
    """A number for each sequence that depends on its ids, [B, S]."""
    targets_BT, sequences_BT, slots = batch["targets"], batch["sequences"], batch["present"].shape[-1]
    weighed = targets_BT * (batch["weights"] > 0)
    return np.stack([(weighed * (sequences_BT == slot)).sum(axis=-1) for slot in range(slots)], axis=-1)


class Model:
    """Stands for the model; counts its batches."""

    def __init__(self, stop_after=10**9):
        self.batches, self.stop_after = 0, stop_after

    def __call__(self, parts, arrays):
        self.batches += 1
        return jnp.asarray(sums_of(arrays), jnp.float32)

    def go_on(self, done):
        if self.batches == self.stop_after:
            raise KeyboardInterrupt


def pass_of(model, folder, key="key"):
    return ReferencePass(parts=tiny_parts(), logps_of_batch=model, key=key, folder=folder, rows=8, go_on=model.go_on)


def batches_of(dataset):
    """The arrays of two epochs of training batches."""
    training = dataset.train_batches()
    return [next(training).arrays() for _ in range(2 * dataset.steps_per_epoch)]


@pytest.mark.parametrize("changes", [{}, {"packing": True}, {"window": 16}], ids=["plain", "packed", "windows"])
def test_every_batch_has_the_values_of_its_sequences(tmp_path, changes):
    cache = {"cache": str(tmp_path / "cache")} if "window" in changes else {}
    dataset = pass_of(Model(), tmp_path / "kept").run(plain := dataset_of(tmp_path, **changes, **cache))
    assert dataset.fingerprint == plain.fingerprint
    for batch in batches_of(dataset):
        np.testing.assert_array_equal(batch["reference"], sums_of(batch) * batch["present"])


def test_values_are_read_again_and_stale_or_damaged_ones_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_logps, "PIECE_ROWS", 16)
    first, again, other = Model(), Model(), Model()
    folder, dataset = tmp_path / "kept", dataset_of(tmp_path)
    expected = batches_of(pass_of(first, folder).run(dataset))
    found = batches_of(pass_of(again, folder).run(dataset))
    assert first.batches == 6 and again.batches == 0  # 41 training rows; none of the 9 held-out ones
    for one, two in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one["reference"], two["reference"])
    pass_of(other, tmp_path / "others", "another model").run(dataset)
    pass_of(again, tmp_path / "others", "key").run(dataset)
    assert other.batches == again.batches == 6
    damaged = Model()
    file = sorted(folder.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.warns(UserWarning, match="damaged .*computed again"):
        pass_of(damaged, folder).run(dataset)
    again = Model()
    pass_of(again, folder).run(dataset)
    assert damaged.batches == 2 and again.batches == 0


def test_an_interrupted_pass_continues_after_its_last_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_logps, "PIECE_ROWS", 16)
    interrupted, resumed = Model(stop_after=5), Model()
    with pytest.raises(KeyboardInterrupt):
        pass_of(interrupted, tmp_path / "kept").run(dataset_of(tmp_path))
    pass_of(resumed, tmp_path / "kept").run(dataset_of(tmp_path))
    assert resumed.batches == 6 - 4  # two pieces of two batches were stored


def lora_of(config, **changes):
    return dataclasses.replace(config, lora=LoraArgs(**changes))


def test_the_key_has_all_that_values_depend_on(tmp_path, monkeypatch):
    config = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output=str(tmp_path))
    scaled = lora_of(config, alpha=2 * config.lora.alpha)
    off, trained = NO_CHANGE, "trained"
    assert reference_key(config, "f", off, "float32") == reference_key(scaled, "f", off, "float32")
    given = [(config, "f", off, "float32"), (config, "g", off, "float32"), (config, "f", off, "bfloat16")]
    changes = [{}, {"alpha": 2 * config.lora.alpha}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}]
    given += [(lora_of(config, **change), "f", trained, "float32") for change in changes]
    keys = {reference_key(*one) for one in given}
    assert len(keys) == len(given)
    assert reference_key(lora_of(config, start="elsewhere"), "f", trained, "float32") in keys
    monkeypatch.setattr(reference_logps, "code_digest", lambda: "another version")
    assert reference_key(*given[0]) not in keys
    assert reference_folder(config) == tmp_path / "reference"
    cached = dataclasses.replace(config, data=DataArgs(train="t", cache=str(tmp_path / "cache")))
    assert reference_folder(cached) == tmp_path / "cache" / "reference"
