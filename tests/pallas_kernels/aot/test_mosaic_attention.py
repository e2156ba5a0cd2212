"""The machine code of the attention kernels: registers, spills, shared memory, products, and what bounds them."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import causal_attention
from pallas_kernels.attention.bounds import BLOCKS
from pallas_kernels.attention.branching import Spans
from pallas_kernels.gpu_specs import CARDS
from tests.marks import some_in_ci

Abstract = jax.ShapeDtypeStruct
BF16, F16 = jnp.bfloat16, jnp.float16
EIGHT = ("a100", "h100", "rtx5090", "a6000", "rtx3090", "rtx4090", "l40s", "b200")
LENGTH, HEADS, KV_HEADS = 1024, 8, 2
# FLOP of mma.sync with f32 sums, per cycle and SM.
TENSOR_FLOPS = {"a100": 2048, "a6000": 1024, "l40s": 1024, "rtx3090": 512, "rtx4090": 512, "rtx5090": 512}
FEATURES = {
    "plain": {},
    "packed": {"texts": "segments_BT"},
    "packed, window": {"texts": "segments_BT", "window": 300},
    "all": {"texts": "spans", "window": 300, "softcap": 30.0},
}


@functools.cache
def compile_attention(compile_for, card, head_dim, dtype, features):
    """Compiles a forward and backward pass with sinks; returns its kernels by name."""
    how = dict(FEATURES[features])
    texts = how.pop("texts", None)
    q, k = (Abstract((1, LENGTH, heads, head_dim), dtype) for heads in (HEADS, KV_HEADS))

    def step(q, k, v, d_out, sinks_N, *ids):
        given = {"spans": Spans(*ids)} if texts == "spans" else {"segments_BT": ids[0]} if texts else {}
        attention = functools.partial(causal_attention, scale=head_dim**-0.5, **how, **given)
        value, vjp = jax.vjp(lambda q, k, v, sinks_N: attention(q, k, v, sinks_N=sinks_N), q, k, v, sinks_N)
        return value, vjp(d_out)

    compiled = compile_for(card, step, q, k, k, q, Abstract((HEADS,), dtype), *[Abstract((1, LENGTH), jnp.int32)] * 3)
    assert not compiled.exceeding_shared_memory
    found = {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in compiled.kernels}
    return {name: kernel for name, kernel in found.items() if name.startswith("attention_")}


def blocks(card, head_dim, features):
    """Returns {kernel: (block, products)}."""
    of = BLOCKS["wgmma" if card == "h100" else "mma"]
    forward, dq, dkv, _ = of(head_dim, capped="softcap" in FEATURES[features])
    split = {"dk": (dkv, 3), "dv": (dkv, 2)} if head_dim == 256 else {"dk_dv": (dkv, 4)}
    found = {"forward": (forward, 2), "dq": (dq, 3)} | split
    return {f"attention_{name}": one for name, one in found.items()}


def multiplications(loop):
    return sum(count for opcode, count in loop.opcodes.items() if "MMA" in opcode)


CASES = [
    *((card, 128, BF16, features) for card in EIGHT for features in ("packed", "plain", "packed, window", "all")),
    *((card, head_dim, F16, "packed, window") for card in ("a6000", "h100", "rtx5090") for head_dim in (64, 80, 96)),
    *((card, 256, BF16, "all") for card in EIGHT),
]
# Bytes, in the kernel of dk and dv.
SPILLED = {
    ("a100", 128, "packed, window"): 8,
    **dict.fromkeys([("h100", 128, name) for name in ("plain", "packed", "packed, window")], 8),
}


@pytest.mark.parametrize(("card", "head_dim", "dtype", "features"), some_in_ci(CASES, lambda i: i in (0, 4)))
def test_the_kernels_are_lean_machine_code(compile_for, card, head_dim, dtype, features):
    kernels = compile_attention(compile_for, card, head_dim, dtype, features)
    expected = blocks(card, head_dim, features)
    assert kernels.keys() == expected.keys()
    for name, kernel in kernels.items():
        block, products = expected[name]
        assert kernel.registers <= 255 and kernel.stack_bytes <= SPILLED.get((card, head_dim, features), 0)
        assert kernel.shared_bytes <= CARDS[card].shared_memory_per_block
        by_wgmma = bool(kernel.opcodes["HGMMA"])
        backward_too = head_dim < 128 or (head_dim == 128 and features != "all")  # elsewhere sums would spill
        assert by_wgmma == (card == "h100" and (backward_too or name == "attention_forward"))
        specialised = by_wgmma and name == "attention_forward"
        assert (kernel.opcodes["USETMAXREG"] == 2) == specialised
        # Otherwise two blocks per SM; on an RTX 5090 50 bytes are missing.
        if not specialised and head_dim <= 128 and (head_dim, card) != (128, "rtx5090"):
            assert 2 * (kernel.shared_bytes + 1024) <= CARDS[card].shared_memory_per_sm
        loop = max(kernel.loops, key=multiplications)
        assert not loop.opcodes["LDL"] + loop.opcodes["STL"]  # a kernel may spill once per tile, not per block
        # mma.sync multiplies 16 x 8 x 16, in four warps; wgmma 64 x (up to 256) x 16.
        small = products * block.queries * block.keys * head_dim // (16 * 8 * 16) // 4
        assert multiplications(loop) == (wgmmas(name, block, head_dim) if by_wgmma else small)
        if by_wgmma:
            assert loop.opcodes["WARPGROUP"] <= 10  # ptxas has put no wait between a product's instructions


def wgmmas(name, block, head_dim):
    """Returns the instructions of a warpgroup in a step: products that contract features, and that contract a step."""
    features, steps = head_dim // 16, {"attention_dk_dv": block.queries}.get(name, block.keys) // 16
    return {
        "attention_forward": features + steps,
        "attention_dq": 2 * features + steps,
        "attention_dk_dv": 2 * features + 2 * steps,
    }[name]


# Part of the time that an A100's tensor cores can be busy.
LEAST_SHARE = {"attention_forward": 0.8, "attention_dq": 0.85, "attention_dk_dv": 0.72}


@pytest.mark.parametrize("card", some_in_ci([(card,) for card in TENSOR_FLOPS], lambda i: i == 0))
def test_tensor_cores_bound_the_kernels(compile_for, card):
    """Limits per cycle: one instruction per scheduler, 128 bytes of shared memory. On an A100, the latter is lower."""
    kernels = compile_attention(compile_for, card, 128, BF16, "packed")
    for name, (block, products) in blocks(card, 128, "packed").items():
        loop = max(kernels[name].loops, key=multiplications)
        tensor = products * 2 * block.queries * block.keys * 128 / TENSOR_FLOPS[card]
        copied = 2 * 2 * min(block) * 128 / 128  # two operands of the step, 16 bits each
        shared = 4 * 4 * loop.opcodes["LDSM"] + copied  # four warps read four tiles of 8 x 8 each
        assert loop.instructions <= tensor
        assert tensor / max(tensor, shared) >= (LEAST_SHARE[name] if card == "a100" else 1)


@pytest.mark.parametrize(
    ("head_dim", "features", "least_share"),
    some_in_ci(
        [(128, "packed, window", 1), (128, "plain", 1), (128, "all", 0.6), (256, "plain", 1), (64, "plain", 0.85)],
        lambda i: i == 0,
    ),
)
def test_tensor_cores_bound_the_forward_pass_of_hopper(compile_for, head_dim, features, least_share):
    """Limits per cycle: an instruction per scheduler, 4 exponentials per scheduler, 128 bytes of shared memory.

    A step of the loop belongs to a warpgroup, so to one warp per scheduler. Masks are counted, which few blocks have.
    """
    kernel = compile_attention(compile_for, "h100", head_dim, BF16, features)["attention_forward"]
    ((queries, keys), products) = blocks("h100", head_dim, features)["attention_forward"]
    (loop,) = kernel.loops
    warpgroups = queries // 64
    tensor = products * 2 * queries * keys * head_dim / 4096
    issue, exponentials = warpgroups * loop.instructions, warpgroups * loop.opcodes["MUFU"] * 32 / 4
    scores = head_dim // 16 * (64 + keys) * 16 * 2 / 128  # both operands from shared memory
    values = keys // 16 * head_dim * 16 * 2 / 128  # the right one
    copied = 2 * 2 * keys * head_dim / 128
    assert tensor / max(tensor, issue, exponentials, warpgroups * (scores + values) + copied) >= least_share
