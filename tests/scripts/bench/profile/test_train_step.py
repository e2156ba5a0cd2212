"""scripts/profile_train.py: which part an operation belongs to, time shared out among what runs, and both modes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels import aot
from qlora_jax.config import LoraArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import REMAT_POLICIES
from qlora_jax.models.families import model_config
from qlora_jax.training.cost import flops
from qlora_jax.training.cost.activations import saved_bytes
from tests.io.tiny_models import random_weights, tiny_config, write_folder

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/profile_train.py"

HLO = """HloModule jit_gradients, entry_computation_layout={(f32[4]{0})->f32[4]{0}}

%body.1 (arg.2: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %arg.2 = (s32[], bf16[4,8]{1,0}) parameter(0)
  %ynn_fusion.3 = bf16[4,8]{1,0} fusion(%arg.2), metadata={op_name="jit(gradients)/while/body/jvp()/frozen/dot_general"}
  %add_convert_fusion.4 = bf16[4,8]{1,0} fusion(%ynn_fusion.3), kind=kLoop, metadata={stack_frame_id=10}
  ROOT %tuple.5 = (s32[], bf16[4,8]{1,0}) tuple(%arg.2, %add_convert_fusion.4)
}

ENTRY %main.9 (x: f32[4]) -> f32[4] {
  %while.7 = (s32[], bf16[4,8]{1,0}) while(%x), body=%body.1, metadata={op_name="jit(gradients)/transpose(jvp())/while"}
  ROOT %copy.8 = f32[4]{0} copy(%x)
}
"""


@pytest.fixture
def parts(load_with_neighbours):
    return load_with_neighbours("profile_parts")


@pytest.fixture
def script(load_with_neighbours):
    return load_with_neighbours("profile_train")


def counted(remat="names"):
    lora = LoraArgs(rank=4, target_modules=["q_proj", "down_proj"])
    weights = WeightFormat(platform="cpu")
    return flops.Step(model=model_config(tiny_config()), weights=weights, lora=lora, batch=(1, 2, 16), remat=remat)


@pytest.mark.parametrize(
    ("source", "part", "direction"),
    [
        ("jit(gradients)/while/body/jvp()/while/body/frozen/dot_general", "frozen", "forward"),
        ("jit(gradients)/jvp(frozen)/dequantize/gather", "dequantize", "forward"),
        ("jit(gradients)/transpose(jvp(norm))/mul", "norm", "backward"),
        ("jit(gradients)/transpose(jvp())/checkpoint/rematted_computation/swiglu/mul", "swiglu", "recomputed"),
        ("jit(gradients)/jvp()/attention/transpose", "attention", "forward"),
        ("jit(gradients)/jvp()/frozen_something/add", "other", "forward"),
        ("", "other", "forward"),
    ],
)
def test_part_and_direction_of_a_path(parts, source, part, direction):
    assert (parts.part_of(source), parts.direction_of(source)) == (part, direction)


def test_operations_of_a_program(parts):
    found = parts.operations_of(HLO)
    product, add = found["ynn_fusion.3"], found["add_convert_fusion.4"]
    assert (product.shape, product.opcode) == ("bf16[4,8]", "fusion")
    assert product.source == "jit(gradients)/while/body/jvp()/frozen/dot_general"
    assert parts.short(product.source) == "jvp()/frozen/dot_general"
    assert found["while.7"].opcode == "while" and found["while.7"].shape == "(s32[], bf16[4,8])"
    # What XLA added says nothing of itself, but the loop that it is in does.
    assert (add.source, add.direction, found["copy.8"].direction) == ("", "backward", "forward")


@pytest.mark.parametrize(
    ("name", "source", "kind"),
    [
        ("bitcast_dynamic-update-slice_fusion.7", "jvp()/dynamic_update_slice", "writes into stacks"),
        ("add_convert_fusion", "", "adds"),
        ("wrapped_broadcast.9", "", "fills"),
        ("reduce-precision_convert_fusion.2", "", "conversions"),
        ("copy.194", "", "copies"),
        ("fusion.1", "jvp()/cos", "rest"),
    ],
)
def test_kind_of_what_is_in_no_part(parts, name, source, kind):
    assert parts.kind_of(parts.Operation(name, "f32[4]", "fusion", source)) == kind


def test_each_instant_is_shared_out_evenly(parts):
    # a alone, then a and b, then all three, then b and c; a pause, then a again.
    events = [("a", 0, 30), ("b", 10, 40), ("c", 20, 40), ("a", 50, 55), ("a", 55, 60)]
    shared = parts.shared_time(parts.Event("p", *event) for event in events)
    third = 10 / 3
    expected = {"a": 10 + 5 + third + 10, "b": 5 + third + 5, "c": third + 5}
    assert shared == pytest.approx({("p", name): time for name, time in expected.items()})
    assert sum(shared.values()) == pytest.approx(50)


def step_of(parts, scale):
    """A loop that spans a product and an addition which overlap, the update, and something of another program."""
    events = [
        ("gradients", "while.7", 0, 100),
        ("gradients", "ynn_fusion.3", 0, 40),
        ("gradients", "add_convert_fusion.4", 20, 40),
        ("gradients", "ynn_fusion.3", 60, 100),
        ("optimizer", "copy.8", 100, 110),
        ("", "copy.8", 0, 1000),
    ]
    return [parts.Event(program, name, start * scale, end * scale) for program, name, start, end in events]


def test_medians_over_steps_by_part(parts):
    programs = dict.fromkeys(("gradients", "optimizer"), parts.operations_of(HLO))
    rows = parts.measure([step_of(parts, scale) for scale in (1e6, 5e6, 2e6)], programs)
    assert [(row.operation.name, row.calls, row.thunk_ms, row.ms) for row in rows] == [
        ("ynn_fusion.3", 2, 160, 140),
        ("add_convert_fusion.4", 1, 40, 20),
        ("copy.8", 1, 20, 20),
    ]
    by_part = parts.by_part(rows)
    assert {part: dict(took.directions) for part, took in by_part.items()} == {
        "frozen": {"forward": 140},
        "other: adds": {"backward": 20},
        "optimizer": {"update": 20},
    }
    assert by_part["other: adds"].thunk_ms == 40


def test_rates_are_of_the_formulas_flop_and_rows_add_up(parts, script):
    programs = {"gradients": parts.operations_of(HLO)}
    rows = parts.measure([step_of(parts, 1e6)], programs)
    lines = script.part_rows(rows, counted(), 100.0)
    flop = flops.flops(counted())
    frozen = {"forward": flop["frozen forward"], "backward": flop["frozen backward"]}
    assert lines[0]["flop"] == frozen
    assert lines[0]["gflop_per_second"] == pytest.approx(sum(frozen.values()) / 0.070 / 1e9)
    assert (lines[-1]["part"], lines[-1]["ms"]) == ("nothing ran", 20)
    assert sum(line["ms"] for line in lines) == 100 and sum(line["share"] for line in lines) == pytest.approx(1)


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_what_the_formulas_count_has_a_place(parts, load_with_neighbours, remat):
    flop = parts.flop_by_part(flops.flops(counted(remat)))
    assert flop.keys() <= set(parts.PARTS)
    assert {direction for part in flop.values() for direction in part} <= set(parts.DIRECTIONS)
    assert ("recomputed" in flop["frozen"]) == (remat in ("full", "offload"))
    rows = load_with_neighbours("profile_card").formula_rows(counted(remat))
    kept = sum(row["bytes"] for row in rows if row["what"].startswith("kept"))
    assert kept == sum(saved_bytes(counted(remat)).values())


def profile(tmp_path, *arguments):
    """(what --json wrote, what was printed) for a model of two layers."""
    config = tiny_config()
    model, told = write_folder(tmp_path / "model", config, random_weights(config)), tmp_path / "told.json"
    command = [sys.executable, SCRIPT, "--model", model, "--seq", "32", "--json", told]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(told.read_text()), done.stdout


@pytest.mark.slow
def test_times_of_a_real_step(tmp_path):
    told, printed = profile(tmp_path, "--steps", "2", "--remat", "full")
    parts = {line["part"]: line for line in told["parts"]}
    assert {"dequantize", "frozen", "lora", "attention", "norm", "head", "optimizer"} <= parts.keys()
    assert parts["frozen"]["forward"] > 0 and parts["frozen"]["backward"] > 0 and parts["frozen"]["recomputed"] > 0
    assert parts["head"]["gflop_per_second"] > 0
    assert 0 < told["busy_ms"] <= told["thunks_ms"] * 1.001
    assert sum(line["ms"] for line in told["parts"]) == pytest.approx(told["traced_ms"]["step"])
    assert "wall clock" in printed and "frozen" in printed


@pytest.mark.slow
@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
def test_bytes_for_an_absent_card(tmp_path):
    told, printed = profile(tmp_path, "--card", "h100")
    gradients = next(row for row in told["memory"] if row["program"] == "gradients")
    weights = sum(row["bytes"] for row in told["formula"] if row["what"].startswith(("weights", "parameters", "batch")))
    assert gradients["arguments"] == weights
    assert told["fits"] and told["temporaries"] and "fits" in printed


def test_without_the_wheels_it_says_what_to_install(load_with_neighbours, monkeypatch):
    card = load_with_neighbours("profile_card")
    monkeypatch.setattr(card.aot, "problem", lambda: "packages missing: some; install them: so")
    with pytest.raises(SystemExit, match="install them: so"):
        card.bytes_on(None, None)
