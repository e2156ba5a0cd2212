"""Replies drawn from a grammar's masks belong to its language, for every kind of tokenizer."""

import gzip
import json
import random
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from qlora_jax.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from qlora_jax.inference.engine.grammar import MOST_CHARACTERS, Grammar, GrammarCompiler, GrammarKind, Matcher
from qlora_jax.inference.engine.token_sampler import Row, row_settings, row_state, sample_tokens
from tests.inference.engine.random_schemas import random_schema
from tests.io.tiny_tokenizers import byte_level, gemma, sentencepiece, sentencepiece_metadata

pytest.importorskip("llguidance")
SMOLLM2 = Path(__file__).parents[2] / "data/assets/smollm2_tokenizer.json.gz"
PATIENCE = 60  # tokens after which a reply is ended as soon as it can be
CLOSING = ['"', "}", "]", ",", "0", "1"]

llama_like = {"bos_token": "<s>", "eos_token": "</s>"}
SOURCES = {
    "byte-level": lambda: {"tokenizer_json": byte_level(), "eos_token": "<|im_end|>"},
    "llama": lambda: {"tokenizer_json": sentencepiece(), **llama_like},
    "gemma": lambda: {"tokenizer_json": gemma(), **llama_like},
    "gguf": lambda: {"gguf": sentencepiece_metadata(460, False, ["\n", "<table>"]), **llama_like},
}


def smollm2() -> Tokenizer:
    text = gzip.decompress(SMOLLM2.read_bytes()).decode()
    return load_tokenizer({"tokenizer_json": text, "eos_token": "<|im_end|>"})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """SmolLM2's, with 49,152 tokens."""
    return smollm2()


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, 49_160)


def allowed(compiler: GrammarCompiler, matcher: Matcher) -> np.ndarray:
    """Ids that may come next."""
    (mask_W,) = compiler.masks([matcher])
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))


def ids_after(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, text: str) -> list[int]:
    """Ids that may follow a text."""
    matcher = compiler.matcher(grammar, ends_of(tokenizer))
    for token in tokenizer.encode(text):
        matcher.accept(token)
    return allowed(compiler, matcher).tolist()


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    assert tokenizer.eos_id is not None
    return frozenset({tokenizer.eos_id})


def drawn_reply(compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: Grammar, draw: random.Random) -> str:
    """A reply of tokens that are drawn uniformly from the masks; long ones take tokens that end them."""
    ends, ids = ends_of(tokenizer), []
    matcher = compiler.matcher(grammar, ends)
    closing = [tokenizer.encode(text)[-1] for text in CLOSING]
    while not matcher.is_over:
        choices = allowed(compiler, matcher)
        if matcher.is_over:
            break
        assert choices.size, matcher.problem
        assert (tokenizer.eos_id in choices) == matcher.may_end
        token = int(choices[draw.randrange(choices.size)])
        if len(ids) > PATIENCE:
            token = draw.choice([each for each in closing if each in choices] or [token])
            token = next((each for each in ends if each in choices), token)
        if token in ends:
            break
        ids.append(token)
        matcher.accept(token)
        assert len(ids) < 20 * PATIENCE
    return tokenizer.decode(ids)


def check_schemas(compiler: GrammarCompiler, tokenizer: Tokenizer, seeds: range) -> None:
    texts = set()
    for seed in seeds:
        draw = random.Random(seed)
        schema = random_schema(draw)
        text = drawn_reply(compiler, tokenizer, Grammar(kind="json_schema", text=json.dumps(schema)), draw)
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
        texts.add(text)
    assert len(texts) > 0.7 * len(seeds)


def test_replies_satisfy_random_schemas(compiler, tokenizer):
    check_schemas(compiler, tokenizer, range(60))


@pytest.mark.exhaustive
@pytest.mark.slow
def test_replies_satisfy_a_thousand_random_schemas(compiler, tokenizer):
    check_schemas(compiler, tokenizer, range(60, 1060))


GRAMMARS: list[tuple[GrammarKind, str, str]] = [
    ("regex", r"(foo|ba[rz]){2}[0-9]{3,}é?", r"(foo|ba[rz]){2}[0-9]{3,}é?"),
    ("regex", "[a-c]+ ☃", "[a-c]+ ☃"),
    ("choice", json.dumps(["yes", "yes, but", "naïve ☃", 'a "b"\\\n', "😀"]), 'yes(, but)?|naïve ☃|a "b"\\\\\n|😀'),
    ("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/', r"\(*[0-9]{1,3}\)*"),
    ("json_object", "", r"(?s)\{.*\}"),
]


@pytest.mark.parametrize("name", SOURCES)
def test_replies_belong_to_the_language_for_every_kind_of_tokenizer(name):
    tokenizer = load_tokenizer({"chat_template": None, **SOURCES[name]()})
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size + 3)
    for kind, text, pattern in GRAMMARS:
        replies = {
            drawn_reply(compiler, tokenizer, Grammar(kind=kind, text=text), random.Random(seed)) for seed in range(8)
        }
        assert len(replies) > 2
        for reply in replies:
            assert re.fullmatch(pattern, reply), (text, reply)
            if kind == "json_object":
                assert isinstance(json.loads(reply), dict)
    check_schemas(compiler, tokenizer, range(12))


@pytest.mark.parametrize("kind", SOURCES)
def test_what_a_tokenizer_writes_is_allowed(kind):
    """The tokenizer's own ids of a text in the language are accepted in their order."""
    tokenizer = load_tokenizer({"chat_template": None, **SOURCES[kind]()})
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    value = {"größe": [1, -2.5e3, True], "b": "two  spaces, \n and ☃"}
    matcher = compiler.matcher(Grammar(kind="json_object"), frozenset())
    ids = tokenizer.encode(json.dumps(value, ensure_ascii=False, indent=2))
    start = ids.index(next(each for each in ids if "{" in tokenizer.decode([each])))  # a space before it is not JSON
    for token in tokenizer.encode("{")[-1:] + ids[start + 1 :]:
        matcher.accept(token)
    assert matcher.is_over and matcher.may_end and matcher.problem is None


def test_stop_ids_are_allowed_where_the_grammar_may_end(compiler, tokenizer):
    grammar, (a,), (b,) = Grammar(kind="regex", text="ab*"), tokenizer.encode("a"), tokenizer.encode("b")
    stops = frozenset({tokenizer.eos_id, 0, 49_155, b})  # with an id beyond the tokenizer's, and one that is text
    matcher = compiler.matcher(grammar, stops)
    assert allowed(compiler, matcher).tolist() == [a, *ids_of(tokenizer, "ab")]
    matcher.accept(a)
    assert matcher.may_end and not matcher.is_over
    assert set(stops) <= set(allowed(compiler, matcher).tolist())
    assert ids_after(compiler, tokenizer, grammar, "a")[0] == tokenizer.eos_id
    within = compiler.matcher(Grammar(kind="regex", text="a(b|c)d"), stops)
    within.accept(a)
    assert not stops & set(allowed(compiler, within).tolist())  # as text, b could come here
    without = compiler.matcher(grammar, frozenset())
    without.accept(a)
    assert tokenizer.eos_id not in allowed(compiler, without)


def ids_of(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """Ids of those texts that are one token each."""
    return [ids[0] for text in texts if len(ids := tokenizer.encode(text)) == 1]


def test_a_reply_is_over_when_nothing_can_follow(compiler, tokenizer):
    matcher = compiler.matcher(Grammar(kind="choice", text='["yes", "no"]'), frozenset())
    (no,) = ids_of(tokenizer, "no")
    assert not matcher.is_over
    matcher.accept(no)
    assert matcher.is_over
    assert not allowed(compiler, matcher).size  # nor is a stop id that the request doesn't have
    assert matcher.problem is None
    matcher.accept(no)
    assert matcher.problem and not matcher.is_over


def test_rows_are_masked_together_and_others_are_free(compiler, tokenizer):
    grammars = [Grammar(kind="regex", text=text) for text in ("[0-9]+", "x|y", "z*")]
    matchers = [compiler.matcher(grammar, ends_of(tokenizer)) for grammar in grammars]
    together = compiler.masks([matchers[0], None, *matchers[1:]])
    assert together.shape == (4, -(-49_160 // 32)) and together.dtype == np.int32
    np.testing.assert_array_equal(together[[0, 2, 3]], np.concatenate([compiler.masks([each]) for each in matchers]))
    assert (together[1] == -1).all()
    rows = [Row()] * 4
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 1, (4, 49_160)).astype(np.float32))
    choice, _ = sample_tokens(logits, row_settings(rows, 49_160), row_state(rows, 49_160), together)
    texts = [tokenizer.decode([token]) for token in choice.token_R.tolist()]
    assert re.fullmatch("[0-9]+", texts[0]) and texts[2] in ("x", "y") and re.fullmatch(r"z*|<\|im_end\|>", texts[3])
    assert int(choice.token_R[1]) == int(jnp.argmax(logits[1]))


def test_requests_with_one_grammar_have_places_of_their_own(compiler, tokenizer):
    grammar = Grammar(kind="choice", text='["ab", "b"]')
    first, second = (compiler.matcher(grammar, frozenset()) for _ in range(2))
    before = allowed(compiler, second).tolist()
    first.accept(ids_of(tokenizer, "a")[0])
    assert allowed(compiler, second).tolist() == before != allowed(compiler, first).tolist()


def test_a_choice_of_thousands_is_made(compiler, tokenizer):
    texts = ["", *(f"c{number}" for number in range(5000))]
    grammar = Grammar(kind="choice", text=json.dumps(texts))
    found = {drawn_reply(compiler, tokenizer, grammar, random.Random(seed)) for seed in range(20)}
    assert len(found) > 5 and found <= set(texts)
    assert compiler.matcher(grammar, frozenset()).may_end  # the empty text is one of them


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', '"not"'),
        ("json_schema", '{"x-guidance": {"coerce_one_of": true}, "oneOf": [{}, {"minLength": 3}]}', "oneOf"),
        ("json_schema", '{"format": "colour"}', "colour"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", "false", "Unsatisfiable"),
        ("json_schema", '{"minimum": 3, "maximum": 2, "type": "integer"}', "greater than maximum"),
        ("json_schema", '{"$ref": "file:///etc/passwd"}', "Default retriever does not fetch"),
        ("json_schema", '{"type": "string"', "not valid JSON"),
        ("json_schema", '{"pattern": "(?=a)b", "type": "string"}', "look-around"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"[^\s\S]", "allows no text"),
        ("lark", "start: other", "unknown name"),
        ("lark", "start: start", "allows no text"),
        ("choice", "[]", "at least one"),
        ("choice", '["a", 3]', "list of texts"),
        ("choice", "yes", "not valid JSON"),
    ],
)
def test_a_grammar_that_cannot_be_followed_is_refused(compiler, kind, text, reason):
    with pytest.raises(ValueError, match=r"^grammar: the " + kind) as caught:
        compiler.matcher(Grammar(kind=kind, text=text), frozenset())
    assert reason in str(caught.value) and len(str(caught.value)) < 700 and "backtrace" not in str(caught.value)


INTERSECTION = {"type": "string", "allOf": [{"pattern": str(number)} for number in range(300)]}
CHAIN = "\n".join(["start: a0", *(f"a{index}: a{index + 1}" for index in range(3500)), 'a3500: "y"'])
HOSTILE: dict[str, tuple[GrammarKind, str]] = {
    "a megabyte": ("json_schema", '{"description": "' + "a" * 1_000_000 + '"}'),
    "brackets": ("json_schema", "[" * MOST_CHARACTERS),
    "deep": ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000),
    "endless work": ("json_schema", json.dumps(INTERSECTION)),
    "a stack of rules": ("lark", CHAIN),
    "parentheses": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
    "itself": (
        "json_schema",
        '{"$defs":{"a":{"anyOf":[{"$ref":"#/$defs/a"},{"$ref":"#/$defs/a"}]}},"$ref":"#/$defs/a"}',
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_one_error(compiler, name):
    kind, text = HOSTILE[name]
    with pytest.raises(ValueError, match=r"^grammar: ") as caught:
        compiler.matcher(Grammar(kind=kind, text=text), frozenset())
    assert len(str(caught.value)) < 700
    assert allowed(compiler, compiler.matcher(Grammar(kind="regex", text=f"x|{name}"), frozenset())).size  # others work


@pytest.mark.parametrize("text", ["(.*foo.*bar){30}", "((((a{1,99}){1,99}){1,99}){1,99}){1,99}", r"(.*a.{20}){5}"])
def test_a_reply_with_a_hard_grammar_ends_or_has_a_problem(compiler, tokenizer, text):
    matcher, draw = compiler.matcher(Grammar(kind="regex", text=text), ends_of(tokenizer)), random.Random(0)
    for _ in range(20):
        choices = allowed(compiler, matcher)
        assert choices.size or matcher.problem
        if matcher.problem or matcher.is_over:
            break
        token = int(draw.choice(choices))
        if token != tokenizer.eos_id:
            matcher.accept(token)


def test_a_missing_library_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"llguidance is not installed.*qlora-jax\[serve\]"):
        GrammarCompiler(tokenizer, 49_152)


def test_a_tokenizer_that_grammars_cannot_use_is_refused():
    whole = json.loads(byte_level())
    for change, reason in [({"decoder": None}, "decoder"), ({"added_tokens": []}, "special token")]:
        tokenizer = load_tokenizer({"tokenizer_json": json.dumps({**whole, **change}), "chat_template": None})
        with pytest.raises(ValueError, match=rf"tokenizer\.json: grammars need.*{reason}"):
            GrammarCompiler(tokenizer, 400)
