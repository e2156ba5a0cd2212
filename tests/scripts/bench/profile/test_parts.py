"""Parts and directions of operations, and time shared among overlapping operations."""

import pytest

from scripts.bench.profile import parts
from tests.scripts.bench.profile.example_program import HLO, step_of


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
def test_part_and_direction_of_a_path(source, part, direction):
    assert (parts.part_of(source), parts.direction_of(source)) == (part, direction)


def test_operations_of_a_program():
    found = parts.operations_of(HLO)
    product, add = found["ynn_fusion.3"], found["add_convert_fusion.4"]
    assert (product.shape, product.opcode) == ("bf16[4,8]", "fusion")
    assert product.source == "jit(gradients)/while/body/jvp()/frozen/dot_general"
    assert parts.short(product.source) == "jvp()/frozen/dot_general"
    assert found["while.7"].opcode == "while" and found["while.7"].shape == "(s32[], bf16[4,8])"
    # An operation added by XLA has no source, but its loop has.
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
def test_kind_of_what_is_in_no_part(name, source, kind):
    assert parts.kind_of(parts.Operation(name, "f32[4]", "fusion", source)) == kind


def test_each_instant_is_shared_out_evenly():
    # a alone, then a and b, then all three, then b and c; a pause, then a again.
    events = [("a", 0, 30), ("b", 10, 40), ("c", 20, 40), ("a", 50, 55), ("a", 55, 60)]
    shared = parts.shared_time(parts.Event("p", *event) for event in events)
    third = 10 / 3
    expected = {"a": 10 + 5 + third + 10, "b": 5 + third + 5, "c": third + 5}
    assert shared == pytest.approx({("p", name): time for name, time in expected.items()})
    assert sum(shared.values()) == pytest.approx(50)


def test_medians_over_steps_by_part():
    programs = dict.fromkeys(("gradients", "optimizer"), parts.operations_of(HLO))
    rows = parts.measure([step_of(scale) for scale in (1e6, 5e6, 2e6)], programs)
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
