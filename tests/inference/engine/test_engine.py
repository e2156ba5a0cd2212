"""An engine's replies: those of the full forward pass, whatever runs beside them, and within the cache's pages."""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraArgs
from qlora_jax.inference.engine.engine import BESIDE_REPLIES, PATIENCE, Engine
from qlora_jax.inference.engine.model_calls import advance, page_bytes
from qlora_jax.inference.engine.request import Request, Step
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.nn.lora import RANK_UNIT
from tests.inference.tiny import VOCAB, byte_tokenizer, full_logits, tiny_config, tiny_parts
from tests.models.mixtures import NARROW, random_mixture

CACHE = 1 << 20
GREEDY = Sampling()
DRAWN = Sampling(temperature=1.2, top_k=60, top_p=0.95, seed=3)
MIXED = [Sampling(), DRAWN, dataclasses.replace(DRAWN, min_p=0.02, frequency_penalty=0.5), Sampling(presence_penalty=1)]
TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def parts() -> ModelParts:
    return tiny_parts()


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def requests_of(*lengths: int, count: int = 6, samplings=(GREEDY,), **settings) -> list[Request]:
    prompts = prompts_of(*lengths)
    chosen = [samplings[index % len(samplings)] for index in range(len(prompts))]
    return [
        Request(prompt=prompt, max_new_tokens=count, sampling=sampling, **settings)
        for prompt, sampling in zip(prompts, chosen, strict=True)
    ]


def answers(engine: Engine, requests) -> list[list[Step]]:
    found: list[list[Step]] = [[] for _ in requests]
    for step in engine.stream(requests):
        found[step.request].append(step._replace(request=0))
    return found


def ids_of(steps: list[Step]) -> list[int]:
    return [step.token for step in steps if step.token is not None]


def greedy(parts: ModelParts, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(full_logits(parts, ids)[-1].argmax()))
    return ids[len(prompt) :]


def test_replies_are_those_of_the_full_forward_pass(parts):
    requests = requests_of(3, 64, 41, 530, 33)
    found = answers(Engine(parts, cache_bytes=CACHE), requests)
    assert [ids_of(each) for each in found] == [greedy(parts, list(one.prompt), 6) for one in requests]


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"qk_norm": "head", "head_dim": 16}, "float32"),
        pytest.param({"windows": (None, 40)}, "int8", marks=pytest.mark.slow),
        pytest.param({"windows": (20, 20), "attention_softcap": 5.0}, "float32", marks=pytest.mark.slow),
    ],
    ids=["norms of heads", "one window", "windows"],
)
def test_a_reply_does_not_depend_on_what_runs_beside_it(changes, dtype):
    """Not on neighbours, on shared beginnings, or on beginning again: to the bit, log-probabilities included."""
    parts, page = tiny_parts(**changes), page_bytes(dataclasses.replace(tiny_config(), **changes), dtype)
    engine = functools.partial(Engine, parts, cache_dtype=dtype)
    requests = requests_of(9, 130, 41, 70, 33, 200, samplings=MIXED, count=12, likeliest=3)
    requests += [dataclasses.replace(one, prompt=[*one.prompt[:64], 7, 8, 9]) for one in requests[1:4]]
    alone = [answers(engine(cache_bytes=CACHE), [one])[0] for one in requests[:4]]
    together, full = engine(cache_bytes=CACHE), engine(cache_bytes=20 * page)
    assert answers(together, requests)[:4] == alone
    assert together.usage().shared_tokens == 64 + 32 + 64
    assert answers(together, requests[::-1])[::-1][:4] == alone
    assert answers(full, requests)[:4] == alone
    assert full.usage().preemptions > 0 and full.usage().pages_held == 0


@pytest.mark.parametrize(
    "weights", [WeightFormat(), pytest.param(WeightFormat(dtype="float32", quant_type=None), marks=pytest.mark.slow)]
)
def test_a_mixture_s_reply_does_not_depend_on_what_runs_beside_it(weights):
    sizes = NARROW | dict(vocab_size=VOCAB, max_position_embeddings=600, num_experts_per_tok=3)
    config = sizes | dict(model_type="qwen3_moe", num_experts=8, moe_intermediate_size=64)
    parts = random_mixture(config, LoraArgs(rank=4), weights)
    requests = requests_of(9, 130, 300, 41, samplings=MIXED, count=12, likeliest=3)
    alone = [answers(Engine(parts, cache_bytes=CACHE), [one])[0] for one in requests[:3]]
    assert answers(Engine(parts, cache_bytes=CACHE), requests[::-1])[::-1][:3] == alone


def test_pages_out_of_a_window_are_given_back():
    parts = tiny_parts(windows=(32, 32))
    engine = Engine(parts, cache_bytes=CACHE)
    engine.submit(requests_of(300, count=100)[0])
    held = []
    while engine.busy:
        engine.step()
        held.append(engine.usage().pages_held)
    assert max(held[-50:]) <= 2 * 2 and max(held) <= 2 * 18


def test_the_budget_is_never_exceeded_and_every_request_is_answered(parts):
    engine = Engine(parts, cache_bytes=24 * 4096)
    requests = requests_of(*[60] * 20, count=20)
    numbers = [engine.submit(one) for one in requests]
    ends = []
    while engine.busy:
        ends += [step for step in engine.step() if step.end]
        usage = engine.usage()
        assert usage.pages_held <= usage.pages
    assert sorted(step.request for step in ends) == numbers


def test_a_long_prompt_stops_others_for_one_chunk_at_most(parts):
    engine = Engine(parts, cache_bytes=CACHE)
    short = engine.submit(requests_of(5, count=40)[0])
    while not engine.step():
        pass
    engine.submit(requests_of(590, count=1)[0])
    before = engine.usage().prompt_tokens
    while engine.usage().prompt_tokens < before + 590:
        last = engine.usage().prompt_tokens
        assert any(step.request == short for step in engine.step())
        assert engine.usage().prompt_tokens <= last + BESIDE_REPLIES


def test_a_repeated_beginning_is_computed_once(parts):
    engine = Engine(parts, cache_bytes=CACHE)
    (request,) = requests_of(500)
    first = answers(engine, [request])
    computed = engine.usage().prompt_tokens
    assert answers(engine, [request] * 3) == first * 3
    assert engine.usage().prompt_tokens - computed <= 3 * 32


def test_log_probabilities_are_those_of_the_forward_pass(parts):
    (request,) = requests_of(90, likeliest=4, score_prompt=True)
    (steps,) = answers(Engine(parts, cache_bytes=CACHE), [request])
    ids = [*request.prompt, *ids_of(steps)]
    expected = np.asarray(jax.nn.log_softmax(full_logits(parts, ids)))
    scored = [*steps[0].prompt, *(step.scored for step in steps)]
    assert [one.token for one in scored] == ids[1:]
    for row, one in enumerate(scored):
        best = np.argsort(-expected[row], kind="stable")[:4]
        np.testing.assert_allclose(one.log_p, expected[row, ids[row + 1]], atol=2e-5)
        assert [token for token, _ in one.likeliest] == best.tolist()
        np.testing.assert_allclose([log_p for _, log_p in one.likeliest], expected[row, best], atol=2e-5)


def test_calls_shrink_while_a_reply_goes_on_and_it_stays_the_same(parts):
    requests = requests_of(9, 20, 12, count=4, likeliest=1)
    requests[0] = dataclasses.replace(requests[0], max_new_tokens=PATIENCE + 20)
    alone = answers(Engine(parts, cache_bytes=CACHE), requests[:1])
    assert answers(Engine(parts, cache_bytes=CACHE), requests)[:1] == alone


def test_scores_of_a_prompt_come_once_although_its_request_begins_again(parts):
    requests = requests_of(60, 60, 60, 60, count=40, score_prompt=True, likeliest=1)
    engine = Engine(parts, cache_bytes=24 * 4096)
    found = answers(engine, requests)
    assert engine.usage().preemptions > 0
    for steps in found:
        assert [step.prompt is not None for step in steps] == [True] + [False] * (len(steps) - 1)
        assert len(steps[0].prompt) == 59


def test_a_prompt_can_be_scored_without_a_reply(parts):
    (request,) = requests_of(70, count=0, score_prompt=True)
    ((step,),) = answers(Engine(parts, cache_bytes=CACHE), [request])
    assert (step.token, step.end) == (None, "length") and len(step.prompt) == 69


def test_a_stop_text_ends_the_reply_and_nothing_of_it_is_shown(parts):
    (request,) = requests_of(20, count=30)
    (steps,) = answers(Engine(parts, TOKENIZER, cache_bytes=CACHE), [request])
    text = "".join(step.text for step in steps)
    assert text == TOKENIZER.decode(ids_of(steps))
    stop = text[10:13]
    (stopped,) = answers(
        Engine(parts, TOKENIZER, cache_bytes=CACHE), [dataclasses.replace(request, stop_texts=("\0never", stop))]
    )
    assert "".join(step.text for step in stopped) == text[: text.index(stop)] and stopped[-1].end == "stop"


def test_a_cancelled_request_frees_its_place_and_leaves_others_alone(parts):
    requests = requests_of(9, 40, 70, count=12)
    alone = answers(Engine(parts, cache_bytes=CACHE), [requests[2]])[0]
    engine = Engine(parts, cache_bytes=CACHE)
    numbers = [engine.submit(one) for one in requests]
    found = [step for _ in range(4) for step in engine.step()]
    for number in numbers[:2]:
        engine.cancel(number)
    after = []
    while engine.busy:
        after += engine.step()
    assert {step.request for step in after} == {numbers[2]}
    assert [step for step in [*found, *after] if step.request == numbers[2]] == [
        step._replace(request=numbers[2]) for step in alone
    ]
    assert engine.usage().pages_held == 0


def bare(parts: ModelParts) -> ModelParts:
    model = combine(parts)
    for _, node in nnx.iter_graph(model):
        if getattr(node, "adapter", None) is not None:
            node.adapter = nnx.data(None)
    return partition(model)


def run_on(base: ModelParts, seed: int, **settings) -> ModelParts:
    model = combine(base)
    attach_method(model, LoraArgs(**settings), jax.random.key(seed))
    own, rng = partition(model), np.random.default_rng(seed)
    return own.with_lora(jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), own.lora))


def test_adapters_of_several_methods_share_a_batch(parts):
    base = bare(parts)
    runs = {
        "lora": run_on(base, 1, rank=2),
        "wide": run_on(base, 2, rank=24, use_rslora=True),
        "dora": run_on(base, 3, rank=4, method="dora"),
        "ia3": run_on(base, 4, method="ia3"),
        "some layers": run_on(base, 5, rank=4, layers_to_transform=[1]),
    }
    engine = Engine(base, cache_bytes=CACHE)
    for name, own in runs.items():
        engine.add_adapter(name, own)
    names = [None, *runs]
    requests = [
        dataclasses.replace(one, adapter=name)
        for one, name in zip(requests_of(*[40] * 6, samplings=MIXED, likeliest=1), names, strict=True)
    ]
    together = answers(engine, requests)
    assert together == [answers(engine, [one])[0] for one in requests]
    for name, one, steps in zip(names, requests, together, strict=True):
        model = Engine(base if name is None else runs[name], cache_bytes=CACHE)
        own = answers(model, [dataclasses.replace(one, adapter=None)])[0]
        assert ids_of(own) == ids_of(steps)
        np.testing.assert_allclose([x.scored.log_p for x in own], [x.scored.log_p for x in steps], atol=1e-5)
    engine.remove_adapter("wide")
    with pytest.raises(ValueError, match=r"adapter: found 'wide', expected one of \['lora', 'dora'"):
        engine.submit(requests[2])
    assert answers(engine, requests[:1]) == together[:1]


def test_adapters_are_held_once(parts):
    def held() -> int:
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    base = bare(parts)
    engine = Engine(base, cache_bytes=CACHE)
    before = held()
    for number, method in enumerate(["lora", "lora", "dora"]):
        engine.add_adapter(str(number), run_on(base, number, rank=RANK_UNIT, method=method))
    one = sum(leaf.nbytes for leaf in jax.tree.leaves(run_on(base, 0, rank=RANK_UNIT).lora))
    places = 4  # room for four runs
    assert held() - before == pytest.approx(2 * places * one, rel=0.15)  # stacks of two methods, vectors, numbers
    engine.remove_adapter("1")
    engine.remove_adapter("2")
    assert held() - before == pytest.approx(one, rel=0.15)


@pytest.mark.parametrize("method", ["houlsby", "vera", "ln_tuning"])
def test_a_method_without_a_form_for_batches_is_refused_by_name(parts, method):
    base = bare(parts)
    with pytest.raises(ValueError, match=r"mine: cannot share a batch with other runs"):
        Engine(base, cache_bytes=CACHE).add_adapter("mine", run_on(base, 1, method=method))


def test_a_request_that_cannot_be_answered_is_refused_with_all_reasons(parts):
    engine = Engine(parts, cache_bytes=12 * 4096)
    with pytest.raises(ValueError, match=r"adapter: found 'x'(?s:.*)max_new_tokens: found 0(?s:.*)too long"):
        engine.submit(Request(prompt=[1] * 700, max_new_tokens=0, adapter="x"))
    with pytest.raises(ValueError, match=r"cache: too small .the request takes up to \d+ pages"):
        engine.submit(Request(prompt=[1] * 500, max_new_tokens=9))
    with pytest.raises(ValueError, match="grammar, stop_texts: the engine has no tokenizer"):
        engine.submit(Request(prompt=[1], max_new_tokens=9, stop_texts=("x",)))
    with pytest.raises(ValueError, match=r"cache: too small .found 4,096 bytes"):
        Engine(parts, cache_bytes=4096)


def test_programs_are_compiled_once_per_shape(parts):
    advance.plain.clear_cache()
    engine = Engine(parts, cache_bytes=CACHE)
    for seed in range(2):
        for length in (3, 30, 40, 100, 200):
            answers(engine, [Request(prompt=prompts_of(length, seed=seed)[0], max_new_tokens=3)])
    assert advance.plain._cache_size() == 3 + 1  # prompt calls of 32, 128 and 512 tokens, and one row of a reply
