"""Computations that run together get the same texts as alone, in as few batches as the longest needs."""

from collections.abc import Generator, Sequence

from qlora_jax.data.tokenizer.chat_template import Rendering
from qlora_jax.data.tokenizer.render_batches import run_together


def count_to(number: int) -> Generator[Rendering, str, list[str]]:
    """Yields `number` conversations; the third is wrong."""
    texts = []
    for n in range(number):
        try:
            texts.append((yield Rendering([{"role": "user", "content": f"{number}.{n}"}])))
        except ValueError as error:
            texts.append(f"caught {error}")
    if number == 4:
        raise ValueError("four")
    return texts


def test_texts_and_errors_reach_the_computation_that_asked_for_them():
    batches: list[int] = []

    def render_all(renderings: Sequence[Rendering]) -> list[str | ValueError]:
        batches.append(len(renderings))
        texts = [rendering.messages[0]["content"] for rendering in renderings]
        return [ValueError(text) if text.endswith(".2") else text for text in texts]

    none, three, four, one = run_together([count_to(number) for number in (0, 3, 4, 1)], render_all)
    assert (none, one, three) == ([], ["1.0"], ["3.0", "3.1", "caught 3.2"])
    assert isinstance(four, ValueError) and str(four) == "four"
    assert [size for size in batches if size] == [3, 2, 2, 1]
