"""EleutherAI's lm-evaluation-harness on our models: its tasks, prompts and metrics, our likelihoods and replies.

The harness (`pip install 'qlora-jax[lm-eval]'`) is an extra; it is imported when a task of it is asked for.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.evaluation.loglikelihood import ScoredIds, answer_scores
from qlora_jax.inference.decode import Reply, generate
from qlora_jax.inference.replies import greedy_replies
from qlora_jax.inference.result_cache import Kept
from qlora_jax.inference.sampling import Sampling
from qlora_jax.models.partition import ModelParts, combine

MAX_NEW_TOKENS = 256  # where a task says nothing, as the harness' own backends have it
Pair = tuple[list[int], list[int]]


class HarnessModel(TemplateLM):
    """What the harness asks of a model. Texts become tokens as its Hugging Face backend makes them.

    Args:
      parts: of the model.
      progress: called with how many requests are done.
      kept: scores of this model.
    """

    def __init__(self, parts: ModelParts, tokenizer: Tokenizer, progress: Callable[[int], None], kept: Kept):
        super().__init__()
        self._parts, self._tokens, self._progress, self._kept = parts, tokenizer, progress, kept
        self.max_length = combine(parts).config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if self._tokens.eos_id is None:
            raise ValueError("the model's tokenizer names no eos_token, which the harness needs")
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self._tokens.bos_id is None else self._tokens.bos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The text's ids, after bos where the tokenizer has one and the text does not begin with it."""
        ids = self._tokens.encode(string)
        begins = bool(ids) and ids[0] == self._tokens.bos_id
        wanted = self._tokens.add_bos_token and add_special_tokens is not False and not begins
        return [self.prefix_token_id, *ids] if wanted else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding writes it) of each pair."""
        rows = [self._row(*pair) for pair in pairs]
        scores = answer_scores(self._parts, rows, self._progress, self._kept)
        return [(-float(nll), bool(exact)) for nll, exact in zip(scores.nll, scores.exact, strict=True)]

    def _row(self, context: list[int], continuation: list[int]) -> ScoredIds:
        """The last ids that the model reads, one more that it predicts, and which of them are the continuation's."""
        ids = np.array([*context, *continuation], np.int32)
        scored = np.arange(len(ids)) >= len(context)
        return ids[-self.max_length - 1 :], scored[-self.max_length - 1 :]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of each whole text, in windows without overlap but for one token of context."""
        windows = [[make_disjoint_window(pair) for pair in self._rolling(_args(request)[0])] for request in requests]
        scores = iter(self._scores([pair for of_text in windows for pair in of_text]))
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _rolling(self, text: str) -> Sequence[Pair]:
        ids, prefix = self.tok_encode(text), self.prefix_token_id
        return [*get_rolling_token_windows(ids, prefix, max_seq_len=self.max_length, context_len=1)]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Replies, each up to the first of its stop texts; requests with the same settings go together."""
        replies: dict[int, str] = {}
        for settings, members in _grouped([_args(request)[1] for request in requests]).items():
            sampling, most = _sampling(dict(settings))
            prompts = [self.tok_encode(_args(requests[index])[0])[-(self.max_length - most) :] for index in members]
            for index, reply in zip(members, self._replies(prompts, sampling, most), strict=True):
                replies[index] = self._text(reply.ids, _args(requests[index])[1].get("until", []))
            self._progress(len(replies))
        return [replies[index] for index in range(len(requests))]

    def _text(self, ids: Sequence[int], until: str | Sequence[str]) -> str:
        """As in the harness' own backend: a reply ends with the first stop text, which may be a special token; such
        tokens are left out of what is judged, and so is the stop text."""
        stops = [until] if isinstance(until, str) else until

        def ended(count: int) -> bool:
            text = self._tokens.decode(ids[:count])
            return _until(text, stops) != text

        ends = bisect.bisect_left(range(len(ids)), True, key=ended)
        return _until(self._tokens.decode(ids[:ends], skip_special_tokens=True), stops)

    def _replies(self, prompts: list[list[int]], sampling: Sampling, most: int) -> list[Reply]:
        """Greedy ones are kept; a drawn one follows from its place among equal prompts too."""
        limits = {"max_new_tokens": most, "stop_ids": [self.eot_token_id]}
        if sampling == Sampling():
            return greedy_replies(self._parts, prompts, **limits, progress=self._progress, kept=self._kept)
        return generate(self._parts, prompts, sampling=sampling, **limits)


def _args(request: Instance) -> tuple[Any, ...]:
    """A text, or a prompt and its settings."""
    return request.args


def _grouped(settings: Sequence[Mapping[str, Any]]) -> dict[tuple[tuple[str, Any], ...], list[int]]:
    """Indices by what decides how tokens are chosen."""
    groups: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for index, each in enumerate(settings):
        key = tuple(sorted((name, value) for name, value in each.items() if name != "until"))
        groups.setdefault(key, []).append(index)
    return groups


def _sampling(settings: dict[str, Any]) -> tuple[Sampling, int]:
    """(how tokens are chosen, how many at most).

    Raises:
      ValueError: names the settings that are not supported.
    """
    most = settings.pop("max_gen_toks", settings.pop("max_new_tokens", MAX_NEW_TOKENS))
    drawn = settings.pop("do_sample", False)
    known = {name: settings.pop(name) for name in ("temperature", "top_k", "top_p") if name in settings}
    if settings:
        raise ValueError(f"the task's generation_kwargs has {sorted(settings)}, which are not supported")
    return Sampling(**known) if drawn else Sampling(), most


def _until(text: str, stops: Sequence[str]) -> str:
    ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))]
