"""initial.safetensors: each damage is one error, and a file that does not fit the model names what differs."""

import json
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.config import LoraArgs
from qlora_jax.io.initial_file import FILE, InitialAdapter, read_initial, write_initial
from qlora_jax.io.loading.adapter_init import subtract_initial
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.models.families import model_config
from tests.io.tiny_models import tiny_config
from tests.marks import first_always

SPEC = LoraArgs(rank=2, init="loftq", target_modules=["up_proj"])
MODEL = model_config(tiny_config())
UP = "model.layers.mlp.up_proj"


def initial_of(rank: int = 2) -> InitialAdapter:
    rng = np.random.default_rng(0)
    (n, k), _ = MODEL.linear_shapes()["mlp.up_proj"]
    shapes = {"lora_a": (MODEL.num_layers, k, rank), "lora_b": (MODEL.num_layers, rank, n)}
    both = [{UP: {leaf: rng.normal(size=s).astype(np.float32) for leaf, s in shapes.items()}} for _ in range(2)]
    return InitialAdapter(factors=both[0], subtracted=both[1])


def values(initial: InitialAdapter | None) -> dict[str, bytes]:
    assert initial is not None
    kinds = {"factors": initial.factors, "subtracted": initial.subtracted}
    return {
        f"{kind}/{name}/{leaf}": np.asarray(array).tobytes()
        for kind, factors in kinds.items()
        for name, leaves in factors.items()
        for leaf, array in leaves.items()
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_initial(tmp_path, initial_of())
    return tmp_path


def test_what_was_written_is_read(run):
    assert values(read_initial(run, SPEC)) == values(initial_of())


def test_a_link_in_a_folder_from_elsewhere_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("text")
    for name in (FILE, f"{FILE}.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_initial(tmp_path, initial_of())
    assert (tmp_path / "precious").read_text() == "text" and not (tmp_path / FILE).is_symlink()
    assert values(read_initial(tmp_path, SPEC)) == values(initial_of())


def silent(run: Path) -> bool:
    """True if a damaged file is read without an error as something else than was written."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_initial(run, SPEC)
    except ValueError as error:
        assert str(error).startswith(f"{run / FILE}") and "Copy the file" in str(error)
        return False
    warn_without_digests.cache_clear()
    return values(found) != values(initial_of()) and not caught


@pytest.mark.parametrize(("count", "seed"), first_always([(400, 0), (20_000, 1)]))
def test_each_damage_is_one_error_or_harmless(run, count, seed):
    """Flips a bit, mostly in the header, or shortens the file."""
    file, random_, missed = run / FILE, random.Random(seed), []
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for number in range(count):
        kind = number % 8
        damaged, end = bytearray(data), header if kind < 5 else len(data)
        place, bit = random_.randrange(end), random_.randrange(8)
        damaged[place] ^= 1 << bit
        file.write_bytes(data[:place] if kind == 7 else damaged)
        if silent(run):
            missed.append((kind, place, bit))
    assert missed == []


def test_a_changed_tensor_is_named(run):
    data = bytearray((run / FILE).read_bytes())
    data[-1] ^= 1
    (run / FILE).write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)damaged, these tensors.*taken/{UP}/lora_b: other values") as caught:
        read_initial(run, SPEC)
    assert str(caught.value).count("other values") == 1


def without_digests(run: Path, tensors: dict[str, np.ndarray] | None = None) -> None:
    save_file(tensors or load_file(run / FILE), run / FILE)


def test_a_file_without_digests_opens_with_one_warning(run):
    without_digests(run)
    with pytest.warns(UserWarning, match="without digests") as caught:
        assert values(read_initial(run, SPEC)) == values(initial_of())
        read_initial(run, SPEC)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:.*without digests")
@pytest.mark.parametrize("name", ["factors", "other/name/lora_a", "factors/name/lora_c", "x"])
def test_other_names_are_one_error(run, name):
    without_digests(run, {name: np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match=f"damaged: '{name}' is not the name of an initial tensor"):
        read_initial(run, SPEC)


def test_digests_of_another_form_are_one_error(run):
    save_file(load_file(run / FILE), run / FILE, {"digests": json.dumps({"a": 1})})
    with pytest.raises(ValueError, match=r"initial\.safetensors: damaged: digests: a: found 1"):
        read_initial(run, SPEC)


def test_an_adapter_of_another_model_is_refused_with_each_difference():
    with pytest.raises(ValueError, match=rf"(?s)does not fit.*factors/{UP}: found .*lora_a.* 3\).*taken/{UP}: found"):
        subtract_initial(initial_of(rank=3), MODEL, SPEC)
    with pytest.raises(ValueError, match=rf"factors/{UP}: found None, expected"):
        subtract_initial(InitialAdapter(factors={}, subtracted={}), MODEL, SPEC)
    subtract_initial(initial_of(), MODEL, SPEC)
