"""Runs computations that need rendered conversations, such as those of many rows, and renders many at once."""

import collections
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

from qlora_jax.data.tokenizer.chat_template import Rendering

BATCH = 64  # computations whose conversations are rendered at once
_AHEAD = 2  # batches that are sent before the texts of the first are used

Texts = Sequence[str | ValueError]


def with_variables[T](
    computation: Generator[Sequence[Rendering], Texts, T], variables: Mapping[str, object]
) -> Generator[Sequence[Rendering], Texts, T]:
    """Returns the computation with these variables of the template in each conversation that it yields."""
    if not variables:
        return (yield from computation)
    try:
        wanted = next(computation)
        while True:
            texts = yield [one._replace(variables=variables) for one in wanted]
            wanted = computation.send(texts)
    except StopIteration as end:
        return end.value


def run_together[T](
    computations: Iterable[Generator[Sequence[Rendering], Texts, T]],
    start_rendering: Callable[[Sequence[Sequence[Rendering]]], Callable[[], Sequence[Texts]]],
) -> list[T | ValueError]:
    """Returns the result of each computation, or the ValueError that it raised.

    Args:
      computations: each yields groups of conversations, and is sent the text or the error of each conversation.
      start_rendering: starts to render groups of conversations, and returns a function that waits for their texts.
    """
    results: dict[int, T | ValueError] = {}
    wanted: collections.deque[tuple[int, Generator[Sequence[Rendering], Texts, T], Sequence[Rendering]]]
    wanted, started = collections.deque(), collections.deque()
    not_started = enumerate(computations)

    def advance(index: int, computation: Generator[Sequence[Rendering], Texts, T], texts: Texts | None) -> None:
        try:
            wanted.append((index, computation, next(computation) if texts is None else computation.send(texts)))
        except StopIteration as end:
            results[index] = end.value
        except ValueError as error:
            results[index] = error

    while True:
        while len(started) < _AHEAD:
            while len(wanted) < BATCH and (new := next(not_started, None)):
                advance(*new, None)
            batch = [wanted.popleft() for _ in range(min(BATCH, len(wanted)))]
            if not batch:
                break
            started.append((batch, start_rendering([group for _, _, group in batch])))
        if not started:
            return [results[index] for index in range(len(results))]
        batch, finish = started.popleft()
        for (index, computation, _), texts in zip(batch, finish(), strict=True):
            advance(index, computation, texts)
