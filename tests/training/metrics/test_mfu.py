"""MFU: operations in closed form, pairs against a mask that is written out, peaks by the device's own name."""

import dataclasses

import numpy as np
import pytest

from pallas_kernels.devices import Device
from pallas_kernels.gpu_specs import CARDS
from qlora_jax.config import LoraArgs
from qlora_jax.data.batching.packing import Batch
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.nn.rope import Rope
from qlora_jax.training.cost import flops
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.metrics.mfu import NO_WINDOW, causal_pairs, peak_flops, utilization
from tests.nn.trees import row_of_trees, visible_keys

L, D, N, K, H, F, V, R = 3, 64, 4, 2, 16, 96, 500, 8
MODEL = ModelConfig(
    vocab_size=V,
    embed_dim=D,
    num_layers=L,
    num_heads=N,
    num_kv_heads=K,
    head_dim=H,
    mlp_dim=F,
    norm_eps=1e-5,
    rope=Rope(theta=1e4, dim=H, max_positions=512),
    tie_embeddings=False,
    max_positions=512,
)
SHAPES = [(N * H, D), (K * H, D), (K * H, D), (D, N * H), (F, D), (F, D), (D, F)]
FROZEN = sum(out * into for out, into in SHAPES)
LORA = sum(R * (out + into) for out, into in SHAPES)
LENGTHS = np.array([[[3], [10]], [[7], [0]]])  # two micro-batches; the last row of the second is a gap
TOKENS, TARGETS = 20, 6
PAIRS = sum(n * (n + 1) // 2 for n in (3, 10, 7))


def step(**changes) -> StepShape:
    fields = dict(model=MODEL, weights=WeightFormat(), lora=LoraArgs(rank=R), batch=(4, 8, 512), remat="full")
    return StepShape(**fields | changes)


def test_operations_in_closed_form():
    found = utilization(step(), None).flops(LENGTHS, TARGETS)
    layers = TOKENS * L * (4 * FROZEN + 6 * LORA)
    assert found == layers + 12 * N * H * L * PAIRS + TARGETS * 4 * D * V


def test_several_devices_have_their_peaks_together():
    one, four = utilization(step(), 1e12), utilization(step(), 1e12, devices=4)
    assert four.peak == 4 * one.peak and four.flops(LENGTHS, TARGETS) == one.flops(LENGTHS, TARGETS)
    assert utilization(step(), None, devices=4).peak is None


@pytest.mark.parametrize(("method", "frozen"), [("full", 0), ("ia3", 1)])
def test_what_palms_6_p_and_12_lht_has_more(method, frozen):
    """The upper half of attention's square, and gradients of weights where these are frozen."""
    t = 512
    found = utilization(step(lora=LoraArgs(method=method)), None).flops(np.full((1, 1, 1), t), t)
    weights = L * FROZEN + V * D
    more = frozen * 2 * t * weights + 12 * L * N * H * (t * t - t * (t + 1) // 2)
    assert found + more == t * (6 * weights + 12 * L * N * H * t)


def test_neither_padding_nor_batches_nor_recomputation_count():
    found = {
        utilization(step(remat=remat, batch=batch), None).flops(lengths, TARGETS)
        for remat in ("none", "names", "full")
        for batch in ((1, 2, 64), (2, 2, 512))
        for lengths in (LENGTHS, LENGTHS.reshape(1, 1, 4), np.array([[[10]], [[7]], [[3]]]))
    }
    assert len(found) == 1


def test_without_padding_products_are_those_of_the_program():
    """counts.flops equals what XLA compiles (test_flops.py); attention there visits whole tiles, so it stays out."""
    full = step(remat="none", batch=(2, 4, 64), supervised=256)
    parts = flops.flops(full)
    found = utilization(full, None)
    lengths = np.full((2, 4, 1), 64)
    attention = found.pair * 6 * L * causal_pairs(lengths, NO_WINDOW)
    expected = sum(count for name, count in parts.items() if not name.startswith("attention"))
    assert found.flops(lengths, 512) - attention == expected
    assert attention < parts["attention forward"] + parts["attention backward"]


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"lora": LoraArgs(rank=R, modules_to_save=["lm_head"])}, TARGETS * 2 * D * V),
        ({"lora": LoraArgs(rank=R, method="dora")}, 2 * L * sum(R * o * i + R * R * (o + i) for o, i in SHAPES) * 2),
        ({"lora": LoraArgs(rank=R, target_modules=["q_proj"])}, TOKENS * L * 6 * (R * (N * H + D) - LORA)),
        ({"new_tokens": 2}, TOKENS * 2 * D * 2 * 4),  # logits, their gradient by both factors, the embedding's
    ],
    ids=["whole head", "dora, in two micro-batches", "one adapter", "new tokens"],
)
def test_what_else_trains(changes, more):
    plain, other = (utilization(step(**c), None).flops(LENGTHS, TARGETS) for c in ({}, changes))
    assert other - plain == more


@pytest.mark.parametrize("window", [1, 2, 5, 10, NO_WINDOW])
def test_pairs_are_those_of_the_mask(window):
    query, key = np.indices((10, 10))
    masks = [(key <= query) & (key > query - window) & (query < n) for n in (3, 10, 7)]
    assert causal_pairs(LENGTHS, window) == sum(int(mask.sum()) for mask in masks)


def test_layers_have_windows_of_their_own():
    model = dataclasses.replace(MODEL, windows=(2, None, 2))
    less = 12 * N * H * 2 * (PAIRS - causal_pairs(LENGTHS, 2))
    plain, windowed = (utilization(step(model=m), None).flops(LENGTHS, TARGETS) for m in (MODEL, model))
    assert plain - windowed == less > 0


def test_layers_before_the_first_adapter_have_no_backward_products():
    """Adapters in the last two of three layers; the first has a window, and only its 2 forward products count."""
    model, lora = dataclasses.replace(MODEL, windows=(2, None, 2)), LoraArgs(rank=R, layers_to_transform="1-2")
    found = utilization(step(model=model, lora=lora), None).flops(LENGTHS, TARGETS)
    products = TOKENS * (L * 2 * FROZEN + 2 * (2 * FROZEN + 6 * LORA))
    attention = 2 * N * H * (6 * PAIRS + (2 + 6) * causal_pairs(LENGTHS, 2))
    assert found == products + attention + TARGETS * 4 * D * V


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        *((card.description, "bfloat16", card.bf16_flops) for card in CARDS.values()),
        ("NVIDIA A100-SXM4-40GB", "float16", 312e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("Tesla T4", "float16", 65e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bfloat16", None),
        ("NVIDIA Voodoo", "bfloat16", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_a_peak_is_known_by_the_devices_name_or_not_at_all(kind, dtype, peak):
    assert peak_flops(Device(platform="gpu", kind=kind), WeightFormat(dtype=dtype)) == peak


@pytest.mark.parametrize("window", [None, 4])
def test_a_trunk_counts_once_and_branches_see_it(window):
    trees = [[(6, [(6, 5), (3, 4), (0, 2)]), (0, [(0, 3), (0, 4)])], [(9, [(9, 7)])]]
    rows_B4T = np.stack([row_of_trees(32, each) for each in trees])
    segments, parents, depths = (rows_B4T[None, :, i] for i in range(3))
    zeros, lengths = np.zeros((1, 2, 32), np.int32), np.array([[[17, 7], [16, 0]]])
    batch = Batch(
        inputs=zeros,
        targets=zeros,
        weights=zeros.astype(np.float32),
        segments=segments,
        rows=np.zeros_like(lengths),
        lengths=lengths,
        parents=parents,
        depths=depths,
    )
    model = dataclasses.replace(MODEL, windows=() if window is None else (window,) * L)
    found = utilization(step(model=model), None)
    filled = np.arange(32) < lengths.sum(axis=2)[0][:, None]
    pairs = int((visible_keys(rows_B4T, window) & filled[..., None]).sum())
    without = found.flops(np.zeros((1, 1, 1), np.int64), 0)
    layers = int(lengths.sum()) * L * (4 * FROZEN + 6 * LORA)
    assert found.metrics(batch, TARGETS, 1.0)["model_flops"] == (
        without + layers + 12 * N * H * L * pairs + TARGETS * 4 * D * V
    )
