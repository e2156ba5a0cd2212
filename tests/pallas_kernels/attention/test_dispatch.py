"""The implementation of attention on a device, the reasons against others, and the blocks that kernels visit."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import costs
from pallas_kernels.attention.bounds import BLOCKS, Block, Visible, key_visits, query_visits
from pallas_kernels.attention.dispatch import choose, choose_decoding
from pallas_kernels.attention.mosaic.capabilities import DEVICES, DTYPES, HEAD_DIMS, MMA_DEVICES
from pallas_kernels.devices import Device
from pallas_kernels.mosaic import installation
from tests.nn.trees import random_trees, row_of_trees, visible_keys
from tests.pallas_kernels.attention.test_branching import spans_of
from tests.pallas_kernels.attention.test_contract import _segments, _visible


def gpu(major, minor):
    return Device(platform="gpu", kind="card", compute_capability=(major, minor))


def test_supported_cards_take_the_kernels():
    for name in MMA_DEVICES:
        device = gpu(int(name[3:-1]), int(name[-1]))
        assert device.names[0] == name
        best = "wgmma" if name in DEVICES["wgmma"] else "mma"
        assert {choose(device, dtype, head_dim).name for dtype in DTYPES for head_dim in HEAD_DIMS} == {best}


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reasons"),
    [
        (gpu(7, 5), "float16", 64, ["run on sm_80, sm_86", "not card (sm_75)"]),
        (gpu(8, 0), "float32", 64, ["take bfloat16, float16, not float32"]),
        (gpu(8, 0), "bfloat16", 100, ["take head dims 64, 80, 96, 128, 256, not 100"]),
        (gpu(7, 0), "float32", 32, ["not card (sm_70)", "not float32", "not 32"]),
    ],
)
def test_other_calls_take_tiles_for_all_reasons(device, dtype, head_dim, reasons):
    choice = choose(device, dtype, head_dim)
    assert choice.name == "tiles" and all(reason in choice.refusals["mma"] for reason in reasons)


def test_arrays_beyond_32_bit_offsets_take_tiles_where_offsets_are_computed():
    names = {numbers: choose(gpu(8, 0), "bfloat16", 128, numbers).name for numbers in (2**31 - 1, 2**31)}
    assert names == {2**31 - 1: "mma", 2**31: "tiles"}
    assert choose(gpu(9, 0), "bfloat16", 128, 2**32).name == "wgmma"


def test_an_old_jax_takes_tiles(monkeypatch):
    monkeypatch.setattr(installation, "LEAST_JAX", (99, 0))
    choice = choose(gpu(8, 9), "bfloat16", 128)
    assert choice.name == "tiles" and choice.refusals["mma"].startswith("mma kernels: requires jax 99.0")


@pytest.mark.parametrize(("runtime", "taken"), [(12060, "wgmma"), (12080, "mma"), (12090, "mma"), (13000, "wgmma")])
def test_a_cuda_that_miscompiles_masks_takes_mma_on_hopper(monkeypatch, runtime, taken):
    monkeypatch.setattr(installation, "_versions_in_use", lambda: (13000, runtime))
    choice = choose(gpu(9, 0), "bfloat16", 128)
    assert choice.name == taken and ("wgmma" in choice.refusals) == (taken == "mma")
    assert taken == "wgmma" or "whose ptxas miscompiles masks. Install jax[cuda13]" in choice.refusals["wgmma"]
    assert choose(gpu(8, 0), "bfloat16", 128) == ("mma", {})


@pytest.mark.parametrize(
    ("device", "dtype", "cache_dtype", "reason"),
    [
        (gpu(8, 0), "bfloat16", "bfloat16", None),
        (gpu(12, 0), "float16", "int8", None),
        (gpu(7, 5), "float16", "int8", "decode kernels run on sm_80, sm_86"),
        (gpu(8, 6), "bfloat16", "float16", "with bfloat16 take pages of bfloat16 and int8, not float16"),
        (gpu(9, 0), "float32", "float32", "take bfloat16, float16, not float32"),
    ],
)
def test_decoding_takes_its_kernel_or_says_why_not(device, dtype, cache_dtype, reason):
    choice = choose_decoding(device, dtype, 128, cache_dtype)
    assert choice.name == ("mma" if reason is None else "reference")
    assert reason is None or reason in choice.refusals["mma"]


# Blocks that are visited, against the mask by definition


def visited(table, blocks):
    """Returns True where a row of `bounds` visits a block: [B, tiles, blocks]."""
    found = np.zeros((*table.shape[:2], blocks), int)
    for at in np.ndindex(*table.shape[:2]):
        count, of_first, first, second = np.asarray(table[at])
        for n in range(count):
            found[(*at, n + (first if n < of_first else second))] += 1
    assert found.max() == 1, "a block is visited twice"
    return found == 1


def needed(visible_BTS, block):
    """Returns True where a query of a block sees a key of a block: [B, I, J]."""
    batch, length, _ = visible_BTS.shape
    shape = (batch, length // block.queries, block.queries, length // block.keys, block.keys)
    return visible_BTS.reshape(shape).any(axis=(2, 4))


TILES = dict.fromkeys(block for of in BLOCKS.values() for width in (64, 256) for block in of(width, capped=False)[:3])


@pytest.mark.parametrize("window", [None, 1, 70, 200])
@pytest.mark.parametrize("texts", ["one", "packed", "pairs"])
def test_wholly_hidden_blocks_are_skipped(window, texts):
    length = 640
    trees = np.stack([row_of_trees(length, [(256, [(256, 130), (256, 60)]), (64, [(64, 40), (64, 40)])])])
    ids = _segments(length, (40, 2, 200), (256, 1, 300))
    of_texts, mask = {
        "one": (None, _visible(length, window)),
        "packed": (ids, _visible(length, window, ids)),
        "pairs": (spans_of(trees), visible_keys(trees, window)),  # two answers to each prompt
    }[texts]
    visible = Visible.of(len(mask), length, of_texts, None if window is None else jnp.int32(window))
    for block in TILES:
        right = needed(np.asarray(mask), block)
        np.testing.assert_array_equal(visited(key_visits(visible, block), length // block.keys), right)
        by_keys = visited(query_visits(visible, block), length // block.queries)
        np.testing.assert_array_equal(by_keys.swapaxes(1, 2), right)


@pytest.mark.parametrize("kind", ["trees", "any order"])
def test_no_needed_block_is_skipped(kind):
    length = 384
    for seed in range(6):
        rng = np.random.default_rng(seed)
        if kind == "trees":
            trees = random_trees(rng, length)[None]
            mask, texts = visible_keys(trees, 90), spans_of(trees)
        else:
            texts = jnp.asarray(rng.integers(0, 5, (1, length)), jnp.int32)
            mask = _visible(length, 90, texts)
        visible = Visible.of(1, length, texts, 90)
        for block in TILES:
            right = needed(np.asarray(mask), block)
            assert not (right & ~visited(key_visits(visible, block), length // block.keys)).any()
            by_keys = visited(query_visits(visible, block), length // block.queries).swapaxes(1, 2)
            assert not (right & ~by_keys).any()


@pytest.mark.parametrize("window", [1, 100, 130, 1000])
@pytest.mark.parametrize("block", TILES)
def test_pairs_are_those_of_visited_blocks(window, block):
    right = needed(_visible(640, window), block)
    assert costs.visited_pairs(640, window, block) == right.sum() * block.queries * block.keys


def test_pairs_of_whole_rows():
    assert costs.visited_pairs(2000, 2000, Block(64, 64)) == 64**2 * 32 * 33 // 2
