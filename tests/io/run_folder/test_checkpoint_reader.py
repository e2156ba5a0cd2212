"""Damage to a checkpoint: every flipped bit, missing or shortened file is reported, or changes nothing that is read."""

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, to_dict, write_config
from qlora_jax.io.run_folder import checkpoint
from qlora_jax.io.run_folder.checkpoint import CONFIG_FILE, CheckpointError, Checkpoints, open_run
from qlora_jax.io.run_folder.checkpoint_reader import (
    LORA,
    OPTIMIZER,
    DamagedCheckpoint,
    Digests,
    read_arrays,
    read_state,
)
from tests.marks import first_always

CONFIG = Config(model=ModelArgs(path="model"), data=DataArgs(train="rows.jsonl"), output="run")
STEP = 7
Tree = dict[str, dict[str, jax.Array]]


def lora_of(seed: int) -> Tree:
    """Adapters of two projections, and one that is all zeros, for which orbax stores few bytes."""
    rng = np.random.default_rng(seed)
    shapes = {"lora_a": (2, 64, 8), "lora_b": (2, 8, 96)}  # more than 1 kB, below which orbax has checksums
    names = ("model.layers.mlp.up_proj", "model.layers.self_attn.q_proj")
    random_ = {n: {leaf: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for leaf, s in shapes.items()} for n in names}
    return {**random_, "model.layers.mlp.down_proj": {leaf: jnp.zeros(s) for leaf, s in shapes.items()}}


def state_of(step: int) -> dict[str, object]:
    return {
        "step": step,
        "position": {"epoch": 0, "window": 0, "index": 5},
        "window_order": [0],
        "best": {"loss": 1.5, "step": 3, "since": 1},
        "fingerprint": "ab" * 32,
        "data_fingerprint": "cd" * 32,
        "config": to_dict(CONFIG),
        "versions": {"jax": jax.__version__},
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder with a checkpoint, whose tests leave it as it was."""
    folder = tmp_path_factory.mktemp("saved")
    write_config(CONFIG, folder / CONFIG_FILE)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.save(STEP, lora_of(0), optax.adam(1e-3).init(lora_of(1)), state_of(STEP))
    return folder


def read(run: Path) -> dict[str, bytes]:
    """Reads every part as --resume does; returns the bytes of all arrays, and of the state."""
    lora = lora_of(0)
    with Checkpoints(run, keep=1) as checkpoints:
        restored = checkpoints.restore(lora, optax.adam(1e-3).init(lora))
    arrays = jax.tree_util.tree_leaves_with_path((restored.lora, restored.optimizer_state))
    values = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in arrays}
    return values | {"state": json.dumps(restored.state, sort_keys=True).encode()}


@pytest.fixture(scope="module")
def intact(run: Path) -> dict[str, bytes]:
    return read(run)


def files_of(run: Path) -> list[Path]:
    return sorted(path for path in (run / f"checkpoints/{STEP}").rglob("*") if path.is_file())


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Yields (file, bit): half of them in each file in turn, half in proportion to the files' sizes."""
    random_, files = random.Random(seed), files_of(run)
    sizes = [file.stat().st_size for file in files]
    for number in range(count):
        file = files[number // 2 % len(files)] if number % 2 else random_.choices(files, sizes)[0]
        yield file, random_.randrange(8 * file.stat().st_size)


def silent(run: Path, intact: dict[str, bytes]) -> bool:
    """True if a damaged checkpoint is read without an error as something else than was saved."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read(run)
    except CheckpointError as error:
        assert f"step {STEP}" in str(error) and "\n\n" not in str(error)
        return False
    return found != intact and not caught


@pytest.mark.parametrize(("count", "seed"), first_always([(75, 0), (4000, 1)]))
def test_each_flipped_bit_is_noticed_or_harmless(run, intact, count, seed):
    missed = []
    for file, bit in flips(run, count, seed):
        data = file.read_bytes()
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        if silent(run, intact):
            missed.append(f"{file.relative_to(run)}, bit {bit}")
        file.write_bytes(data)
    assert missed == []
    assert read(run) == intact


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [Path.unlink, shorten, empty])
def test_each_missing_or_shortened_file_is_noticed_or_harmless(run, intact, damage: Callable[[Path], None]):
    missed = []
    for file in files_of(run):
        data = file.read_bytes()
        damage(file)
        if silent(run, intact):
            missed.append(str(file.relative_to(run)))
        file.write_bytes(data)
    assert missed == []


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def checkpoint_of(run: Path) -> Path:
    return run / f"checkpoints/{STEP}"


def digests_of(run: Path) -> Digests:
    _, digests = read_state(checkpoint_of(run))
    assert digests is not None
    return digests


def edit_state(run: Path, change: Callable[[dict], object]) -> None:
    path = checkpoint_of(run) / "state/metadata"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def zero_arrays(run: Path, part: str) -> None:
    """Zeroes 64 bytes in the middle of a part's largest file, where values are."""
    file = max((checkpoint_of(run) / part).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    file.write_bytes(data)


def test_changed_arrays_are_named(copy):
    digests = digests_of(copy)
    digests[LORA]["model.layers.mlp.up_proj/lora_a"]["xxh3_128"] = "0" * 32
    with pytest.raises(DamagedCheckpoint) as caught:
        read_arrays(checkpoint_of(copy), LORA, lora_of(1), digests[LORA])
    assert str(caught.value) == (
        f"{checkpoint_of(copy) / LORA}: the checkpoint of step 7 is damaged: these arrays are not as they were saved:\n"
        "    model.layers.mlp.up_proj/lora_a: other values than were saved"
    )


CHANGES = {
    "position": lambda state: state["position"].update(index=6),
    "shape": lambda state: state["digests"]["lora"]["model.layers.mlp.up_proj/lora_a"].update(shape=[2, 64, 9]),
    "array": lambda state: state["digests"]["optimizer"].popitem(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_state_is_noticed(copy, change):
    edit_state(copy, change)
    with pytest.raises(DamagedCheckpoint, match=r"state/metadata: .*its values are not those that were saved"):
        read_state(checkpoint_of(copy))


def test_a_renamed_checkpoint_is_noticed(copy):
    renamed = checkpoint_of(copy).rename(copy / "checkpoints/9")
    with pytest.raises(DamagedCheckpoint, match="step 9 is damaged: it is the state of step 7"):
        read_state(renamed)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{", "not JSON"), ("[" * 100_000, "nested too deeply"), ('{"step": "7"}', "step: found '7'"), ("", "not JSON")],
)
def test_a_state_of_another_form_is_one_error(copy, text, problem):
    (checkpoint_of(copy) / "state/metadata").write_text(text)
    with pytest.raises(DamagedCheckpoint, match=problem):
        read_state(checkpoint_of(copy))


def test_a_file_that_is_a_pipe_is_refused_and_does_not_block(copy):
    file = checkpoint_of(copy) / LORA / "_METADATA"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DamagedCheckpoint, match=r"_METADATA: .* not a regular file"):
        read_arrays(checkpoint_of(copy), LORA, None, None)


def test_arrays_of_another_type_are_not_called_damaged(run):
    digests = digests_of(run)
    like = {**lora_of(0), "model.layers.mlp.down_proj": {"lora_a": jnp.zeros(3)}}
    with pytest.raises(
        CheckpointError, match=r"(?s)lora: has other arrays.*down_proj/lora_a: found .*\[2, 64, 8\]"
    ) as e:
        read_arrays(checkpoint_of(run), LORA, like, digests[LORA])
    assert not isinstance(e.value, DamagedCheckpoint) and "down_proj/lora_b" in str(e.value)


def test_links_to_files_are_followed_and_broken_ones_are_damage(copy, intact):
    file = checkpoint_of(copy) / LORA / "_METADATA"
    file.symlink_to(file.rename(copy / "elsewhere"))
    assert read(copy) == intact
    (copy / "elsewhere").unlink()
    with pytest.raises(DamagedCheckpoint, match=r"_METADATA: .* a link to a file that does not exist"):
        read_arrays(checkpoint_of(copy), LORA, None, None)


READ_WITHOUT_DESCRIPTORS = """
import contextlib, os, resource, sys
from pathlib import Path
from qlora_jax.io.run_folder.checkpoint_reader import LORA, CheckpointError, DamagedCheckpoint, read_arrays, read_state

checkpoint = Path(sys.argv[1])
digests = read_state(checkpoint)[1][LORA]
read_arrays(checkpoint, LORA, None, digests)  # starts every thread that opens files
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with contextlib.suppress(OSError):
    while True:
        os.open(os.devnull, os.O_RDONLY)
try:
    read_arrays(checkpoint, LORA, None, digests)
except CheckpointError as error:
    print(isinstance(error, DamagedCheckpoint), error, flush=True)
os._exit(0)
"""


def test_a_checkpoint_is_not_called_damaged_because_of_the_machine(run):
    """In a separate process: without descriptors orbax leaves coroutines, which fail in whichever test follows."""
    command = [sys.executable, "-c", READ_WITHOUT_DESCRIPTORS, str(checkpoint_of(run))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.match(r"False .*lora: cannot be read: .*Too many open", found.stdout), found.stdout + found.stderr


@pytest.mark.parametrize("part", [LORA, OPTIMIZER])
def test_a_missing_part_is_named(copy, part):
    shutil.rmtree(checkpoint_of(copy) / part)
    with pytest.raises(DamagedCheckpoint, match=rf"{STEP}/{part}: the checkpoint of step 7 is damaged: missing"):
        read_arrays(checkpoint_of(copy), part, None, None)


def test_a_checkpoint_without_digests_opens_with_one_warning(copy, intact):
    edit_state(copy, lambda state: state.pop("digests"))
    with pytest.warns(UserWarning) as caught:
        assert read(copy) == intact
        assert open_run(copy).step == STEP
    assert [str(warning.message).partition(":")[0] for warning in caught] == [str(copy)]


def test_a_run_opens_with_the_values_that_were_saved(run):
    opened = open_run(run)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()) and a.dtype == b.dtype, opened.lora, lora_of(0)))


def with_two_steps(run: Path) -> Path:
    with Checkpoints(run, keep=2) as checkpoints:
        checkpoints.save(STEP + 1, lora_of(2), {"mu": np.zeros(3)}, state_of(STEP + 1))
    return run


def test_a_damaged_adapter_is_an_error_that_names_a_sound_step(copy):
    shutil.copytree(
        checkpoint_of(with_two_steps(copy)) / LORA, checkpoint_of(copy).with_name("8") / LORA, dirs_exist_ok=True
    )
    with pytest.raises(CheckpointError, match=r"(?s)8/lora: the checkpoint of step 8 is damaged.*Give step 7 to use"):
        open_run(copy)
    assert open_run(copy, STEP).step == STEP


@pytest.mark.parametrize("step", [None, 8])
def test_a_checkpoint_that_is_removed_while_it_is_read_is_not_called_damaged(copy, monkeypatch, step):
    def read_removed(folder: Path, *arguments: object) -> object:
        if folder.name == "8":  # a training run removes it
            shutil.rmtree(folder)
        return read_arrays(folder, *arguments)  # pyright: ignore[reportArgumentType]

    with_two_steps(copy)
    monkeypatch.setattr(checkpoint, "read_arrays", read_removed)
    if step is None:
        assert open_run(copy).step == STEP
    else:
        with pytest.raises(ValueError, match=r"the checkpoint of step 8 was removed while .* \(found steps: \[7\]\)"):
            open_run(copy, step)


def test_without_a_sound_step_the_error_says_so(copy):
    zero_arrays(copy, LORA)
    with pytest.raises(CheckpointError, match=r"(?s)step 7 is damaged.*No other checkpoint of the run is sound"):
        open_run(copy)


def test_damage_to_the_optimizer_does_not_concern_the_adapter(copy):
    shutil.rmtree(checkpoint_of(copy) / OPTIMIZER)
    assert open_run(copy).step == STEP


def test_a_configuration_of_other_settings_is_refused_with_each_of_them(copy):
    changed = dataclasses.replace(
        CONFIG,
        lora=LoraArgs(rank=8, alpha=1.0),
        model=ModelArgs(path="elsewhere"),
        output="elsewhere",
    )
    write_config(changed, copy / CONFIG_FILE)
    with pytest.raises(
        ValueError, match=r"(?s)config\.yaml: .*lora\.rank: found 8, expected .*lora\.alpha: found 1\.0"
    ) as e:
        open_run(copy)
    assert "model.path" not in str(e.value)
