"""A teacher behind an OpenAI-compatible endpoint, which scores the tokens of texts as vLLM does.

Dimension key: B rows, T positions, N positions of a text, K tokens, L = K + 1.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int32, Int64

from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.result_cache import digest
from qlora_jax.openai_client import Endpoint, RequestFailed, ScoredTokens, ask_repeatedly, score
from qlora_jax.terminal.visible import without_passwords
from qlora_jax.training.teacher.logprob_cache import Arrays, Predictions, TeacherError, check_are_known

FORM = 1  # raised by a change after which stored predictions no longer hold
AT_ONCE = 8  # requests, and rows of the data whose predictions are stored together
WAITS = (1.0, 4.0, 16.0)  # seconds before each further attempt
LEAST_TAIL = 1e-7  # a smaller probability of all other tokens is lost in the rounding of the others, as in TRL
MOST_SUM = 1.001  # largest sum of rounded probabilities
# Other tokenizers cut this text elsewhere, because it has rare words, digits, indents, accents and other scripts.
PROBE = "Unbelievably, 12345 antidisestablishmentarians' naïveté =\n\t\tdef f(x): return x**2 // 東京 привет 🙂"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointTeacher:
    """A model behind an endpoint.

    Attributes:
      count: K.
      tokens: number of ids that the student knows.
    """

    endpoint: Endpoint
    count: int
    tokens: int

    def predict(self, arrays: Arrays) -> Predictions:
        """Returns its predictions for a micro-batch.

        Raises:
          TeacherError: the endpoint does not reply, or replies something else.
          ValueError: it predicts a token that the student does not have.
        """
        shape = arrays["inputs"].shape
        ids, logps = np.zeros((*shape, self.count), np.int32), np.zeros((*shape, self.count + 1), np.float32)
        rows = [{name: each[b] for name, each in arrays.items()} for b in range(len(ids))]
        texts = [(b, text) for b, row in enumerate(rows) for text in _texts(row)]
        stopped = threading.Event()
        with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                found = [*pool.map(lambda each: self._predict(each[1], stopped), texts)]
            finally:
                stopped.set()
        for (b, text), predicted in zip(texts, found, strict=True):
            ids[b, text.positions], logps[b, text.positions] = predicted
        check_are_known(ids, self.tokens)
        return Predictions(ids, logps)

    def scored(self, text: str | Int32[np.ndarray, " N"], stopped: threading.Event) -> ScoredTokens:
        """Asks for the likeliest tokens along a text; raises TeacherError."""
        sent = text if isinstance(text, str) else text.tolist()
        try:
            return ask_repeatedly(lambda: score(self.endpoint, sent, self.count), WAITS, stopped)
        except RequestFailed as error:
            problem = str(error).rstrip(".")
            raise TeacherError(f"{self._place}: {problem}. Check the endpoint and distillation.teacher_model") from None

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises TeacherError unless the endpoint gives a text the same ids, and perhaps one more at the start."""
        ours = tokenizer.encode(PROBE)
        found = self.scored(PROBE, threading.Event()).ids
        if ours not in (found, found[1:]):
            raise TeacherError(
                f"{self._place}: has another tokenizer (found the ids {found}, expected {ours} for {PROBE!r}). Choose "
                "a teacher with the same tokenizer"
            )

    def _predict(self, text: "_Text", stopped: threading.Event) -> tuple[np.ndarray, np.ndarray]:
        """Returns the predictions at the positions of a text that are its own."""
        found = self.scored(text.ids, stopped)
        if found.ids != text.ids.tolist():
            raise TeacherError(
                f"{self._place}: scored other tokens than it got (found {len(found.ids)} ids, expected the "
                f"{len(text.ids)} that were sent). Choose an endpoint that does not change token ids"
            )
        pairs = np.array(found.likeliest[-len(text.positions) :], np.float64)
        log_p_NK = pairs[..., 1]
        sum_N = np.exp(log_p_NK).sum(axis=1)
        if not sum_N.max() <= MOST_SUM:  # nan, too
            raise TeacherError(
                f"{self._place}: the probabilities of the likeliest tokens add up to {sum_N.max():.3f}, expected at "
                "most 1. Set the endpoint to log-probabilities of the unchanged logits"
            )
        rest_N = np.log(np.maximum(1 - sum_N, LEAST_TAIL))
        return pairs[..., 0].astype(np.int32), np.concatenate([log_p_NK, rest_N[:, None]], axis=1)

    @property
    def _place(self) -> str:
        return f"distillation.teacher: {without_passwords(self.endpoint.url)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointSource:
    """An endpoint that has not been asked yet.

    Attributes:
      tokenizer: of the student.
      tokens: number of ids that the student knows.
    """

    endpoint: Endpoint
    count: int
    tokenizer: Tokenizer
    tokens: int
    nbytes = 0
    rows = AT_ONCE

    @property
    def key(self) -> str:
        """A hash of the address and the model's name, because the model itself is not known."""
        return digest([FORM, without_passwords(self.endpoint.url).rstrip("/"), self.endpoint.model, self.count])

    def load(self, mesh: Mesh | None, progress: Callable[..., None]) -> EndpointTeacher:
        """Checks that the endpoint replies, and has the student's tokenizer."""
        teacher = EndpointTeacher(endpoint=self.endpoint, count=self.count, tokens=self.tokens)
        teacher.check_tokenizer(self.tokenizer)
        return teacher


class _Text(NamedTuple):
    """A text of a batch's row that has supervised positions: a segment, after the part of the trunk that it continues.

    Fields:
      ids: its inputs and the last target.
      positions: those of the segment, which are predicted by the last of `ids`.
    """

    ids: Int32[np.ndarray, " N"]
    positions: Int64[np.ndarray, " N"]


def _texts(row: dict[str, np.ndarray]) -> Iterator[_Text]:
    supervised = np.flatnonzero(row["weights"])
    segments = row.get("segments", np.zeros(len(row["inputs"]), np.int32))
    for segment in np.unique(segments[supervised]):
        own = np.flatnonzero(segments == segment)
        own = own[own <= supervised[segments[supervised] == segment][-1]]
        before = own[:0]
        if "parents" in row and row["parents"][own[0]] != segment:
            before = np.flatnonzero(segments == row["parents"][own[0]])[: row["depths"][own[0]]]
        inputs = row["inputs"][np.concatenate([before, own])]
        yield _Text(np.append(inputs, row["targets"][own[-1]]), own)
