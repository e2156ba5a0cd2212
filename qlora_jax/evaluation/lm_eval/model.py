"""Runs EleutherAI's lm-evaluation-harness on our models: its tasks, prompts and metrics, our likelihoods and replies.

The harness (`pip install 'qlora-jax[lm-eval]'`) is optional, so this module is imported only when it is used.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds, score_rows
from qlora_jax.inference.decode import Reply, generate
from qlora_jax.inference.replies import greedy_replies
from qlora_jax.inference.result_cache import ResultCache
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.partition import ModelParts, combine
from qlora_jax.untrusted_json import JsonObject

MAX_NEW_TOKENS = 256  # the default of the harness' own backends
ContextAndContinuation = tuple[list[int], list[int]]
# generation_kwargs without `until`; their values are numbers and booleans.
Settings = tuple[tuple[str, object], ...]


class LmEvalModel(TemplateLM):
    """One of our models, with the interface that the harness requires.

    Texts are turned into tokens like in the harness' Hugging Face backend.
    """

    def __init__(self, parts: ModelParts, tokenizer: Tokenizer, progress: Callable[[int], None], cache: ResultCache):
        """Wraps a model.

        Args:
          progress: called with the number of requests done so far.
          cache: results of this model.
        """
        super().__init__()
        self._parts, self._tokenizer, self._progress, self._cache = parts, tokenizer, progress, cache
        self.max_length = combine(parts).config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        if self._tokenizer.eos_id is None:
            raise ValueError("harness: requires an eos_token, which the model's tokenizer does not name")
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that precedes a text without a context."""
        return self.eot_token_id if self._tokenizer.bos_id is None else self._tokenizer.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Encodes a text, with bos first if the tokenizer adds it and the text does not begin with it."""
        ids = self._tokenizer.encode(string)
        begins = bool(ids) and ids[0] == self._tokenizer.bos_id
        add = self._tokenizer.add_bos_token and add_special_tokens is not False and not begins
        return [self.prefix_token_id, *ids] if add else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[ContextAndContinuation]) -> list[tuple[float, bool]]:
        """(log p of the continuation, True if greedy decoding generates it) of each pair."""
        rows = [self._row(*pair) for pair in pairs]
        scores = score_rows(self._parts, rows, self._progress, self._cache)
        return [(-float(nll), bool(exact)) for nll, exact in zip(scores.nll, scores.exact, strict=True)]

    def _row(self, context: list[int], continuation: list[int]) -> ScoredIds:
        """The last ids that the model accepts, plus one that is only predicted; the continuation is scored."""
        ids = np.array([*context, *continuation], np.int32)
        scored = np.arange(len(ids)) >= len(context)
        return ids[-self.max_length - 1 :], scored[-self.max_length - 1 :]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns log p of each whole text, in windows that overlap by one token of context."""
        windows = [[make_disjoint_window(pair) for pair in self._rolling(_args(request)[0])] for request in requests]
        scores = iter(self._scores([pair for of_text in windows for pair in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _rolling(self, text: str) -> Sequence[ContextAndContinuation]:
        ids, prefix = self.tok_encode(text), self.prefix_token_id
        return [*get_rolling_token_windows(ids, prefix, max_seq_len=self.max_length, context_len=1)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns replies, each up to its first stop text; requests with equal settings share batches."""
        replies: dict[int, str] = {}
        for settings, members in _group_by_settings([_args(request)[1] for request in requests]).items():
            sampling, max_tokens = _sampling(dict(settings))
            length = self.max_length - max_tokens
            prompts = [self.tok_encode(_args(requests[index])[0])[-length:] for index in members]
            for index, reply in zip(members, self._replies(prompts, sampling, max_tokens), strict=True):
                replies[index] = self._text(reply.ids, _args(requests[index])[1].get("until", []))
            self._progress(len(replies))
        return [replies[index] for index in range(len(requests))]

    def _text(self, ids: Sequence[int], until: str | Sequence[str]) -> str:
        """The text of a reply, like in the harness' Hugging Face backend.

        It ends before the first stop text, which may be a special token. Special tokens are dropped.
        """
        stops = [until] if isinstance(until, str) else until

        def ended(count: int) -> bool:
            text = self._tokenizer.decode(ids[:count])
            return _cut(text, stops) != text

        end = bisect.bisect_left(range(len(ids)), True, key=ended)
        return _cut(self._tokenizer.decode(ids[:end], skip_special_tokens=True), stops)

    def _replies(self, prompts: list[list[int]], sampling: Sampling, max_tokens: int) -> list[Reply]:
        """Replies to prompts. Only greedy ones are cached: a drawn one depends on the equal prompts before it."""
        limits = {"max_new_tokens": max_tokens, "stop_ids": [self.eot_token_id]}
        if sampling == Sampling():
            return greedy_replies(self._parts, prompts, **limits, progress=self._progress, cache=self._cache)
        return generate(self._parts, prompts, sampling=sampling, **limits)


def _args(request: Instance) -> tuple[Any, ...]:
    """A text, or a prompt and its settings."""
    return request.args


def _group_by_settings(settings: Sequence[Mapping[str, object]]) -> dict[Settings, list[int]]:
    """Indices of the requests with each combination of settings; stop texts do not matter."""
    groups: dict[Settings, list[int]] = {}
    for index, each in enumerate(settings):
        key = tuple(sorted((name, value) for name, value in each.items() if name != "until"))
        groups.setdefault(key, []).append(index)
    return groups


def _sampling(settings: JsonObject) -> tuple[Sampling, int]:
    """(sampling settings, maximum new tokens); raises ValueError for settings that are not supported."""
    max_tokens = settings.pop("max_gen_toks", settings.pop("max_new_tokens", MAX_NEW_TOKENS))
    drawn = settings.pop("do_sample", False)
    known = {name: settings.pop(name) for name in ("temperature", "top_k", "top_p") if name in settings}
    if settings:
        raise ValueError(f"generation_kwargs: not supported (found {sorted(settings)}). Remove them from the task")
    return Sampling(**known) if drawn else Sampling(), max_tokens


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text."""
    ends = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
