"""Collectives read from the text of compiled programs: hand-written ones of every form, and real ones."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.aot.collectives import Total, read_collectives, received, totals

LAYERS, CARDS = 4, 8
LOOPS = """HloModule jit_step, is_scheduled=true, num_partitions=8

%adder (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%scatter (p: f32[64,16]) -> f32[8,16] {
  %p = f32[64,16]{1,0} parameter(0)
  ROOT %reduce-scatter.9 = f32[8,16]{1,0} reduce-scatter(%p), replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%adder
}

%inner (arg: (s32[], f32[2])) -> (s32[], f32[2]) {
  ROOT %all-reduce.3 = f32[2]{0} all-reduce(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%adder
}

%layer (arg: (s32[], u8[4,8,16])) -> (s32[], u8[4,8,16]) {
  %all-gather-start.2 = ((u8[8,16]{1,0}, f32[4]{0}), (u8[64,16]{1,0}, f32[32]{0})) all-gather-start(%codes, %nested), \
replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(step)/while/body/gather"}
  %all-gather-done.2 = (u8[64,16]{1,0}, f32[32]{0}) all-gather-done(%all-gather-start.2)
  %async-start = ((f32[64,16]{1,0}), f32[8,16]{1,0}) async-start(%grad), calls=%scatter
  %async-done = f32[8,16]{1,0} async-done(%async-start), calls=%scatter
  %while.5 = (s32[], f32[2]{0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

ENTRY %main (codes: u8[4,8,16]) -> f32[] {
  %while.1 = (s32[], u8[4,8,16]{2,1,0}) while(%t), condition=%c, body=%layer, \
backend_config={"known_trip_count":{"n":"4"},"known_init_step":{"init":"0","step":"1"}}
  %all-reduce-start.1 = (f32[3]{0}, bf16[5]{0}) all-reduce-start(%a, %b), replica_groups=[1,8]<=[8], to_apply=%adder
  %all-reduce-start.2 = ((s32[]), s32[]) all-reduce-start(%c), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, \
to_apply=%adder, output_to_operand_aliasing={{1}: (0, {})}
  ROOT %out = f32[] custom-call(), custom_call_target="all-gather(not one)"
}
"""


def test_loops_are_multiplied_and_an_operation_in_two_halves_counts_once():
    assert totals(read_collectives(LOOPS)) == {
        ("all-gather", "u8"): Total(times=4, nbytes=4 * 1024, received=4 * 896, largest=1024),
        ("all-gather", "f32"): Total(times=4, nbytes=4 * 128, received=4 * 112, largest=32),
        ("reduce-scatter", "f32"): Total(times=4, nbytes=4 * 4096, received=4 * 3584, largest=1024),
        ("all-reduce", "f32"): Total(times=13, nbytes=12 * 8 + 12, received=12 * 8 + 21, largest=3),
        ("all-reduce", "bf16"): Total(times=1, nbytes=10, received=18, largest=5),
        ("all-reduce", "s32"): Total(times=1, nbytes=4, received=6, largest=1),
    }


def test_each_names_its_instruction_its_scope_and_its_group():
    gather, *_ = read_collectives(LOOPS)
    assert (gather.instruction, gather.op_name) == ("all-gather-start.2", "jit(step)/while/body/gather")
    assert [one.group for one in read_collectives(LOOPS)] == [8, 8, 8, 2, 8, 8, 4]
    assert not gather.rematerialized
    (again, *_) = read_collectives(LOOPS.replace("all-gather-start.2", "all-gather-start.2.remat"))
    assert again.rematerialized


BRANCHES = """HloModule jit_head, num_partitions=4

%some (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %all-gather.1 = bf16[8,8]{1,0} all-gather(bf16[2,8]{1,0} %x), replica_groups={}, dimensions={0}
}

%none (x: bf16[2,8]) -> bf16[8,8] {
  ROOT %zero = bf16[8,8]{1,0} broadcast(%c)
}

ENTRY %main (x: bf16[2,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(bf16[2,8]{1,0} %x), replica_groups={}, dimensions={0}
  %cp = (u32[4]{0}, u32[4]{0}, u32[], u32[]) collective-permute-start(%i), source_target_pairs={{0,1},{1,0}}
  %cpd = u32[4]{0} collective-permute-done(%cp)
  ROOT %either = bf16[8,8]{1,0} conditional(%p, %x, %x), branch_computations={%none, %some}
}
"""


def test_a_branch_may_run_less_often():
    always, permuted, some = read_collectives(BRANCHES)
    assert (always.conditional, some.conditional) == (False, True)
    assert always.times == some.times == 1 and always.group == 4
    assert (permuted.operation, permuted.dtype, permuted.elements) == ("collective-permute", "u32", 4)
    assert totals([always, some])["all-gather", "bf16"].nbytes == 2 * 128


def test_a_loop_of_unknown_length_is_said():
    unknown = LOOPS.replace('"known_trip_count":{"n":"4"},', "")
    assert {one.times for one in read_collectives(unknown)} == {None, 1}
    with pytest.raises(ValueError, match=r"does not know how often these collectives run.*all-gather-start\.2"):
        totals(read_collectives(unknown))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150), ("collective-permute", 100)],
)
def test_a_ring_passes_on_everything_but_a_devices_own_part(operation, expected):
    assert received(operation, 100, 4) == expected


def test_a_program_for_absent_cards(compile_for):
    """A scan that gathers a layer of codes, adds floats, and hands their sum out in parts."""
    mesh = AbstractMesh((1, CARDS), ("data", "fsdp"), (AxisType.Auto,) * 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "fsdp"), P()), out_specs=P("fsdp"), check_vma=False)
    def step(codes, x):
        def layer(total, own):
            whole = jax.lax.all_gather(own, "fsdp", tiled=True)
            return total + whole.astype(jnp.float32) * jax.lax.psum(total[0, 0], "fsdp"), None

        total, _ = jax.lax.scan(layer, x, codes)
        return jax.lax.psum_scatter(total, "fsdp", tiled=True)

    codes = jax.ShapeDtypeStruct((LAYERS, 4096, 64), jnp.uint8, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = totals(compile_for("h100", step, codes, x).collectives)
    size = 4096 * 64
    assert found["all-gather", "u8"] == Total(LAYERS, LAYERS * size, LAYERS * size * 7 // 8, size)
    assert found["reduce-scatter", "f32"] == Total(1, 4 * size, 4 * size * 7 // 8, size)
    assert found["all-reduce", "f32"].times == LAYERS
    assert found.keys() == {("all-gather", "u8"), ("reduce-scatter", "f32"), ("all-reduce", "f32")}
