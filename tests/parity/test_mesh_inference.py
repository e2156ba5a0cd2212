"""Decoding, scoring and letters on a mesh of eight devices give what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.aot.collectives import ALL_GATHER, read_collectives, totals
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.config import LoraArgs
from qlora_jax.evaluation import loglikelihood
from qlora_jax.evaluation.divergence import compare_rows
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.tasks import letters
from qlora_jax.evaluation.tasks.letters import LetterQuestion, score_letters
from qlora_jax.inference.decode import generate
from qlora_jax.inference.lowering import lower_decoding
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.partition import ModelParts, place_parts, prepare_for_decoding
from qlora_jax.sharding import make_mesh, part_bytes
from tests.marks import first_always
from tests.training.mesh_models import CUT_VOCABULARY, WHOLE_VOCABULARY, mesh_config, mesh_parts

GREEDY, DRAWN = Sampling(), Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=3)
# (data, fsdp, vocabulary): both axes with tables cut; then each axis alone, and whole tables.
MESHES = first_always(
    [(2, 4, CUT_VOCABULARY), (1, 8, CUT_VOCABULARY), (8, 1, CUT_VOCABULARY), (2, 4, WHOLE_VOCABULARY)]
)


@functools.cache
def one_device(vocabulary: int) -> ModelParts:
    return mesh_parts(mesh_config(vocabulary))


def on_mesh(parts: ModelParts, data: int, fsdp: int) -> ModelParts:
    return place_parts(parts, make_mesh(data, fsdp))


def texts(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, WHOLE_VOCABULARY, length).astype(np.int32) for length in lengths]


def prompts() -> list[list[int]]:
    """Five prompts, fewer than devices; one is there twice, and its second reply has other draws."""
    some = [ids.tolist() for ids in texts(9, 30, 17, 64)]
    return [*some, some[1]]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "vocabulary"), MESHES)
def test_replies_are_those_of_one_device(data, fsdp, vocabulary):
    parts = one_device(vocabulary)
    whole = generate(parts, prompts(), sampling=GREEDY, max_new_tokens=6, stop_ids=[])
    stops = [whole[0].ids[2]]  # ends some rows early, while the others go on
    for sampling in (GREEDY, DRAWN):
        limits = {"sampling": sampling, "max_new_tokens": 6, "stop_ids": stops}
        expected = generate(parts, prompts(), **limits)
        assert generate(on_mesh(parts, data, fsdp), prompts(), **limits) == expected
        assert len({tuple(reply.ids) for reply in expected}) == (4 if sampling == GREEDY else 5)
    assert {reply.end for reply in whole} == {"length"} and len(whole[0].ids) == 6


@pytest.mark.exhaustive
@pytest.mark.slow
def test_replies_with_dora_are_those_of_one_device():
    """Its norms are computed once, from the parts of all devices."""
    lora = LoraArgs(rank=16, method="dora", target_modules=["q_proj", "down_proj"])
    parts = mesh_parts(mesh_config(CUT_VOCABULARY), lora=lora)
    placed = on_mesh(parts, 2, 4)
    ours, theirs = (prepare_for_decoding(each).lora for each in (placed, parts))
    for name in ours:
        np.testing.assert_allclose(ours[name]["scale"], theirs[name]["scale"], rtol=1e-6)
    limits = {"sampling": GREEDY, "max_new_tokens": 4, "stop_ids": []}
    assert generate(placed, prompts(), **limits) == generate(parts, prompts(), **limits)


@pytest.mark.slow
@pytest.mark.parametrize("neumann", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_replies_with_oft_are_those_of_one_device(neumann):
    """Its rotations are computed once, from the parts of all devices: down_proj's are cut, q_proj's are not."""
    projections = ["q_proj", "down_proj"]
    lora = LoraArgs(method="oft", oft_block_size=32, use_cayley_neumann=neumann, target_modules=projections)
    parts = mesh_parts(mesh_config(CUT_VOCABULARY, intermediate_size=1024), lora=lora)
    placed = on_mesh(parts, 4, 2)
    cut = {name.rpartition(".")[2]: not leaves["oft_r"].is_fully_replicated for name, leaves in placed.lora.items()}
    assert cut == {"q_proj": False, "down_proj": True}
    ours, theirs = (prepare_for_decoding(each).lora for each in (placed, parts))
    for name in ours:
        np.testing.assert_allclose(ours[name]["rotation"], theirs[name]["rotation"], atol=1e-6)
    limits = {"sampling": GREEDY, "max_new_tokens": 4, "stop_ids": []}
    expected = generate(parts, prompts(), **limits)
    assert generate(placed, prompts(), **limits) == expected
    still = parts.with_lora(jax.tree.map(jnp.zeros_like, parts.lora))
    assert generate(still, prompts(), **limits) != expected


def scored_rows() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three whole texts, so most devices have none, and a question of nine options that share its prompt."""
    alone = [(ids, np.arange(len(ids)) >= 5) for ids in texts(40, 23, 33)]
    (prompt,) = texts(48, seed=1)
    options = [np.concatenate([prompt, more]) for more in texts(*range(1, 10), seed=2)]
    return alone + [(ids, np.arange(len(ids)) >= len(prompt)) for ids in options]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "fsdp", "vocabulary"), MESHES)
def test_scores_are_those_of_one_device(data, fsdp, vocabulary):
    parts = one_device(vocabulary)
    rows = [*scored_rows(), greedy_row(parts)]
    expected, done = score_rows(parts, rows), []
    scores = score_rows(on_mesh(parts, data, fsdp), rows, done.append)
    np.testing.assert_allclose(scores.nll, expected.nll, rtol=1e-6)
    np.testing.assert_array_equal(scores.tokens, expected.tokens)
    np.testing.assert_array_equal(scores.exact, expected.exact)
    np.testing.assert_array_equal(scores.begins, expected.begins)
    assert expected.exact[-1] and not expected.exact[0] and done[-1] == len(rows)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_divergences_are_those_of_one_device():
    parts, rows = one_device(CUT_VOCABULARY), scored_rows()
    rng = np.random.default_rng(0)
    other = parts.with_lora(jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), parts.lora))
    expected, done = compare_rows(other, parts, rows), []
    found = compare_rows(on_mesh(other, 2, 4), on_mesh(parts, 2, 4), rows, done.append)
    for name, sums in vars(expected).items():
        np.testing.assert_allclose(getattr(found, name), sums, rtol=1e-5)
    assert expected.divergence.min() > 0.1 and done[-1] == len(rows)


def greedy_row(parts: ModelParts) -> tuple[np.ndarray, np.ndarray]:
    """A row whose last tokens are those that greedy decoding generates."""
    prompt, reply = prompts()[1], generate(parts, prompts(), sampling=GREEDY, max_new_tokens=6, stop_ids=[])[1]
    ids = np.array([*prompt, *reply.ids], np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


@pytest.mark.parametrize(("data", "fsdp", "vocabulary"), MESHES)
def test_letters_are_those_of_one_device(data, fsdp, vocabulary, monkeypatch):
    parts, found = one_device(vocabulary), []
    logits = letters._letter_logits

    def watched(*args, **kwargs):
        found.append(logits(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(letters, "_letter_logits", watched)
    asked = texts(21, 40, 33, 18, 25, 38, 40, 40, 17, 30, 29)
    questions = [LetterQuestion(ids=ids, letters=[65, 66, 67, 68], answer=n % 4) for n, ids in enumerate(asked)]
    expected, scores = score_letters(parts, questions), score_letters(on_mesh(parts, data, fsdp), questions)
    np.testing.assert_array_equal(scores.right, expected.right)
    np.testing.assert_array_equal(scores.tied, expected.tied)
    assert 0 < expected.right.sum() < len(questions)
    one, several = (np.asarray(each)[: len(questions)] for each in found)
    np.testing.assert_allclose(several, one, rtol=1e-6, atol=1e-6 * np.abs(one).max())


def test_a_decode_step_has_the_memory_of_one_device_and_gathers_packed_weights_once():
    parts = one_device(CUT_VOCABULARY)
    placed = on_mesh(parts, 2, 4)
    prompts = [[1] * 40] * 16  # two a device
    for alone, shared in zip(lower_decoding(parts, prompts, 6), lower_decoding(placed, prompts, 6), strict=True):
        # The numbers of pages are rounded, and each device has a page for padding.
        assert alone.live_bytes / 8 == pytest.approx(shared.live_bytes, rel=0.03)
    compiled = shared.lowered.compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None
    assert memory.argument_size_in_bytes == pytest.approx(part_bytes(placed) + shared.live_bytes, rel=0.01)
    crossing = read_collectives(text)
    packed = [leaf for leaf in jax.tree.leaves(parts.base) if leaf.dtype == np.uint8]
    assert totals(crossing)[ALL_GATHER, "u8"].nbytes == sum(leaf.nbytes for leaf in packed)
    stacks = jax.tree.leaves(parts.base, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    smallest = min(2 * stack.codes[0].size for stack in stacks if isinstance(stack, QTensor))  # two weights a byte
    assert max(one.elements for one in crossing if one.dtype != "u8") < smallest


def test_memory_of_scoring_is_that_of_one_device():
    parts = one_device(CUT_VOCABULARY)
    rows = [(ids, np.arange(len(ids)) >= 5) for ids in texts(*[40] * 16)]
    (alone,), (shared,) = (loglikelihood.lower_scoring(each, rows) for each in (parts, on_mesh(parts, 2, 4)))
    assert shared.live_bytes < alone.live_bytes / 2
