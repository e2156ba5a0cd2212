"""Gathers that products hide, read from hand-written schedules."""

import pytest

from pallas_kernels.aot.overlap import Share, hidden_share, read_gathers

SCHEDULE = """HloModule jit_step, is_scheduled=true, num_partitions=2

%forward (arg: (s32[])) -> (s32[]) {
  %all-gather-start = (u8[512]{0}, u8[1024]{0}) all-gather-start(%a), replica_groups=[1,2]<=[2], \
metadata={op_name="jit(step)/jvp/while/body"}
  %kernel.1 = bf16[8] custom-call(%x), custom_call_target="mosaic_gpu_v2"
  %all-gather-done = u8[1024]{0} all-gather-done(%all-gather-start)
  %all-gather.7 = u8[512]{0} all-gather(%b), replica_groups=[1,2]<=[2], metadata={op_name="jit(step)/jvp/while/body"}
  %kernel.2 = bf16[8] custom-call(%x), custom_call_target="mosaic_gpu_v2"
}

%gemm_fusion_dot (x: bf16[8]) -> bf16[8] {
  ROOT %dot.1 = bf16[8] dot(%x, %x)
}

%fused (x: f32[8]) -> f32[8] {
  ROOT %negate = f32[8] negate(%x)
}

%backward (arg: (s32[])) -> (s32[]) {
  %all-gather-start.2 = (u8[512]{0}, u8[1024]{0}) all-gather-start(%a), replica_groups=[1,2]<=[2], \
metadata={op_name="jit(step)/transpose(jvp)/while/body"}
  %norm = f32[8] fusion(%x), kind=kLoop, calls=%fused
  %all-gather-done.2 = u8[1024]{0} all-gather-done(%all-gather-start.2)
  %all-gather-start.3 = (f32[4]{0}, f32[8]{0}) all-gather-start(%c), replica_groups=[1,2]<=[2]
  %all-gather-start.4 = (u8[128]{0}, u8[256]{0}) all-gather-start(%d), replica_groups=[1,2]<=[2], \
metadata={op_name="jit(step)/transpose(jvp)/while/body"}
  %product = bf16[8] fusion(%x), kind=kCustom, calls=%gemm_fusion_dot
}

ENTRY %main () -> s32[] {
  %while.1 = (s32[]) while(%t), condition=%c, body=%forward, backend_config={"known_trip_count":{"n":"3"}}
  %while.2 = (s32[]) while(%t), condition=%c, body=%backward, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_a_gather_is_hidden_if_a_product_starts_before_it_ends():
    gathers = read_gathers(SCHEDULE)
    assert [(gather.nbytes, gather.products, gather.backward) for gather in gathers] == [
        (3 * 1024, 1, False),
        (3 * 512, 0, False),  # its end follows at once
        (3 * 1024, 0, True),
        (3 * 256, 1, True),  # it ends in the next iteration
    ]


@pytest.mark.parametrize(("backward", "share"), [(False, Share(3072, 4608)), (True, Share(768, 3840))])
def test_shares_are_of_bytes(backward, share):
    assert hidden_share(read_gathers(SCHEDULE), backward=backward) == share
    assert share.percent == 100 * share.hidden / share.nbytes
