"""Runs computations that need rendered conversations, such as those of many rows, and renders for all at once."""

from collections.abc import Callable, Generator, Sequence

from qlora_jax.data.tokenizer.chat_template import Rendering


def run_together[T](
    computations: Sequence[Generator[Rendering, str, T]],
    render_all: Callable[[Sequence[Rendering]], Sequence[str | ValueError]],
) -> list[T | ValueError]:
    """Returns the result of each computation, or the ValueError that it raised.

    Args:
      computations: each yields conversations one by one, and is sent their texts. An error of a conversation is raised
        at its `yield`.
      render_all: returns the text or the error of each conversation.
    """
    results: dict[int, T | ValueError] = {}
    texts: dict[int, str | ValueError | None] = dict.fromkeys(range(len(computations)))  # None starts a computation
    while texts:
        wanted: dict[int, Rendering] = {}
        for index, text in texts.items():
            try:
                wanted[index] = _advance(computations[index], text)
            except StopIteration as end:
                results[index] = end.value
            except ValueError as error:
                results[index] = error
        texts = dict(zip(wanted, render_all([*wanted.values()]), strict=True))
    return [results[index] for index in range(len(computations))]


def _advance[T](computation: Generator[Rendering, str, T], text: str | ValueError | None) -> Rendering:
    if text is None:
        return next(computation)
    return computation.throw(text) if isinstance(text, ValueError) else computation.send(text)
