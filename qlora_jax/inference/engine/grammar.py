"""Restricts replies to a JSON schema, a regular expression, a Lark grammar or a choice, by llguidance.

A matcher follows one reply. It knows which tokens may come next as a mask, whose words `sample_tokens` unpacks.

Dimension key: R rows, W words of 32 tokens.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from qlora_jax.data.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_schema", "json_object", "regex", "lark", "choice"]
MOST_CHARACTERS = 1 << 16  # a grammar of this length compiles within about a second
_SPACES = r"[ \n\r\t]{1,100}"  # between JSON's tokens; a model may repeat spaces without end


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grammar:
    """A language that a reply's text belongs to; hashable.

    Attributes:
      kind: language in which `text` is written.
      text: a JSON schema, a regular expression that the whole reply matches, a grammar in llguidance's dialect of Lark,
        or a JSON list of texts of which the reply is one; empty for "json_object", which is any JSON object.
      field: the field of a request that has it, with which messages begin.
    """

    kind: GrammarKind
    text: str = ""
    field: str = dataclasses.field(default="grammar", compare=False)


class Matcher:
    """The place of one reply in its grammar.

    Attributes:
      ends_W: mask of the stop ids, which may come next where the grammar may end.
    """

    def __init__(self, compiled: "llguidance.LLMatcher", ends_W: np.ndarray):
        self.compiled, self.ends_W = compiled, ends_W

    def accept(self, token: int) -> None:
        """Moves on by one token of the reply, which no stop id is; a token that is not allowed is a problem."""
        self.compiled.consume_token(token)

    @property
    def is_over(self) -> bool:
        """True if the reply is complete, and nothing can follow."""
        return self.compiled.is_stopped() and not self.compiled.is_error()

    @property
    def may_end(self) -> bool:
        """True if the reply is complete, whether or not something can follow."""
        return self.compiled.is_accepting()

    @property
    def problem(self) -> str | None:
        """The reason why the reply cannot go on, or None: a step that is too complex, or a token that is not allowed.

        Masks are of no use afterwards.
        """
        return _first_line(self.compiled.get_error()) or None


class GrammarCompiler:
    """Compiles grammars for one tokenizer; creating it takes about a second."""

    def __init__(self, tokenizer: Tokenizer, vocab: int):
        """Reads the tokenizer's vocabulary.

        Args:
          vocab: length of the model's logits.

        Raises:
          ValueError: llguidance is not installed, or cannot read the tokenizer.
        """
        try:
            import llguidance

            from qlora_jax.inference.engine.grammar_trial import LIMITS, Trial
        except ImportError as error:
            raise ValueError(
                f"grammar: llguidance is not installed ({error}). Run pip install 'qlora-jax[serve]'."
            ) from error
        tokens = max(tokenizer.backend.get_vocab(with_added_tokens=True).values()) + 1
        self._vocab, self._tokens = vocab, max(vocab, tokens)
        self._end = _special_id(tokenizer)
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer.backend.to_str(), self._tokens, self._end)
        except ValueError as error:
            raise ValueError(f"{tokenizer.name}: grammars need another tokenizer ({error}).") from error
        self._executor, self._matcher = llguidance.LLExecutor(), llguidance.LLMatcher
        self._limits, self._trial = LIMITS, Trial()
        self._compiled = functools.lru_cache(maxsize=32)(self._compile)
        self._never_W = ~self._words({self._end})

    def matcher(self, grammar: Grammar, stop_ids: frozenset[int]) -> Matcher:
        """Returns the beginning of a reply.

        Raises:
          ValueError: the grammar is not valid, too complex, or allows no text, or it has a rule that is not supported.
        """
        return Matcher(self._compiled(grammar).deep_copy(), self._words(stop_ids))

    def masks(self, matchers: Sequence[Matcher | None]) -> np.ndarray:
        """Returns int32 [R, W]: bit i of word w of a row is set if token 32 w + i may come next.

        A row without a matcher may have any token. Masks of several rows are computed in parallel, without Python's
        lock. A reply may be found to be over here, so ask `is_over` afterwards.
        """
        from llguidance.numpy import fill_next_token_bitmask_par

        mask_RW = np.full((len(matchers), -(-self._tokens // 32)), -1, np.int32)
        rows = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
        fill_next_token_bitmask_par(self._executor, [(matcher.compiled, row) for row, matcher in rows], mask_RW)
        for row, matcher in rows:
            mask_RW[row] &= self._never_W & ~matcher.ends_W
            if matcher.may_end:
                mask_RW[row] |= matcher.ends_W
        return np.ascontiguousarray(mask_RW[:, : -(-self._vocab // 32)])

    def _compile(self, grammar: Grammar) -> "llguidance.LLMatcher":
        start = f"{grammar.field}: the {grammar.kind}"
        if len(grammar.text) > MOST_CHARACTERS:
            raise ValueError(
                f"{start} is too long (found {len(grammar.text)} characters, expected at most {MOST_CHARACTERS})"
            )
        try:
            text = _WRITERS[grammar.kind](self._matcher, grammar.text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{start} is not valid JSON ({_first_line(str(error))})") from error
        try:
            self._trial.check(text)
        except ValueError as error:
            raise ValueError(f"{start} is {error}") from error
        compiled = self._matcher(self._tokenizer, text, log_level=0, limits=self._limits)
        problems = [compiled.get_error()] if compiled.is_error() else compiled.get_grammar_warnings()
        if problems:
            reasons = "; ".join(problem.strip() for problem in problems)
            raise ValueError(f"{start} cannot be followed ({reasons[:500]})")
        compiled.compute_bitmask()
        if compiled.is_error():
            reason = _first_line(compiled.get_error())
            raise ValueError(f"{start} allows no text of this model's tokens ({reason})")
        return compiled

    def _words(self, tokens: frozenset[int] | set[int]) -> np.ndarray:
        bits = np.zeros(-(-self._tokens // 32) * 32, bool)
        bits[[token for token in tokens if token < self._tokens]] = True
        return np.packbits(bits, bitorder="little").view(np.int32)


def _special_id(tokenizer: Tokenizer) -> int:
    """A token that is not text, which llguidance calls the end. It would take one that is text if none were given."""
    special = (index for index, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special)
    found = tokenizer.eos_id if tokenizer.eos_id is not None else next(special, None)
    if found is None:
        raise ValueError(f"{tokenizer.name}: grammars need a tokenizer with a special token (found none).")
    return found


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


Writer = Callable[["type[llguidance.LLMatcher]", str], str]


def _schema(matcher: "type[llguidance.LLMatcher]", text: str) -> str:
    if text.strip() in ("true", "false"):  # llguidance has options for objects only
        text = f'{{"allOf": [{text}]}}'
    # A schema's own `x-guidance` must not make llguidance ignore what it cannot honour.
    return matcher.grammar_from_json_schema(
        text,
        overrides={
            "lenient": False,
            "coerce_one_of": False,
            "whitespace_flexible": True,
            "whitespace_pattern": _SPACES,
        },
    )


def _choice(matcher: "type[llguidance.LLMatcher]", text: str) -> str:
    texts = json.loads(text)
    if not isinstance(texts, list) or not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError("expected a list of texts with at least one")
    return matcher.grammar_from_lark("start: TEXT\nTEXT: " + " | ".join(map(json.dumps, texts)))


_WRITERS: dict[GrammarKind, Writer] = {
    "json_schema": _schema,
    "json_object": lambda matcher, _: _schema(matcher, '{"type": "object"}'),
    "regex": lambda matcher, text: matcher.grammar_from_regex(text),
    "lark": lambda matcher, text: matcher.grammar_from_lark(text),
    "choice": _choice,
}
