"""Computations that run together get the same texts as alone, and the next batch is rendered meanwhile."""

from collections.abc import Callable, Generator, Sequence

from qlora_jax.data.tokenizer.chat_template import Rendering, text_of
from qlora_jax.data.tokenizer.render_batches import BATCH, Texts, run_together


def count_to(number: int) -> Generator[Sequence[Rendering], Texts, list[str]]:
    """Yields `number` conversations one by one; the third is wrong."""
    texts = []
    for n in range(number):
        try:
            (text,) = yield [Rendering([{"role": "user", "content": f"{number}.{n}"}])]
            texts.append(text_of(text))
        except ValueError as error:
            texts.append(f"caught {error}")
    if number == 4:
        raise ValueError("four")
    return texts


def test_texts_and_errors_reach_the_computation_that_asked_for_them():
    batches: list[int] = []

    def start_rendering(groups: Sequence[Sequence[Rendering]]) -> Callable[[], list[Texts]]:
        batches.append(len(groups))
        texts = [group[0].messages[0]["content"] for group in groups]
        return lambda: [[ValueError(text) if text.endswith(".2") else text] for text in texts]

    none, three, four, one = run_together([count_to(number) for number in (0, 3, 4, 1)], start_rendering)
    assert (none, one, three) == ([], ["1.0"], ["3.0", "3.1", "caught 3.2"])
    assert isinstance(four, ValueError) and str(four) == "four"
    assert batches == [3, 2, 2, 1]


def test_a_computation_gets_the_texts_of_several_conversations_at_once():
    def both() -> Generator[Sequence[Rendering], Texts, list[str]]:
        return [text_of(text) for text in (yield [Rendering([{"role": role}]) for role in ("user", "tool")])]

    def start_rendering(groups: Sequence[Sequence[Rendering]]) -> Callable[[], list[Texts]]:
        return lambda: [[one.messages[0]["role"] for one in group] for group in groups]

    assert run_together([both(), both()], start_rendering) == [["user", "tool"]] * 2


def test_the_next_batch_is_rendered_while_the_last_is_used():
    """Neither process waits for the other, and no more than two batches are in memory."""
    events: list[str] = []

    def start_rendering(groups: Sequence[Sequence[Rendering]]) -> Callable[[], list[Texts]]:
        name = groups[0][0].messages[0]["content"]
        events.append(f"start {name} of {len(groups)}")
        return lambda: events.append(f"finish {name}") or [["text"]] * len(groups)

    def search(number: int) -> Generator[Sequence[Rendering], Texts, int]:
        yield [Rendering([{"role": "user", "content": f"{number}"}])]
        return number

    count = 2 * BATCH + 1
    assert run_together([search(number) for number in range(count)], start_rendering) == [*range(count)]
    first, second, last = (f"{number * BATCH}" for number in range(3))
    sizes = [f"start {first} of {BATCH}", f"start {second} of {BATCH}", f"start {last} of 1"]
    assert events == [*sizes[:2], f"finish {first}", sizes[2], f"finish {second}", f"finish {last}"]


def test_computations_that_need_no_text_do_not_end_the_others():
    counts = [0] * (3 * BATCH) + [2]

    def start_rendering(groups: Sequence[Sequence[Rendering]]) -> Callable[[], list[Texts]]:
        return lambda: [["text"]] * len(groups)

    assert run_together([count_to(number) for number in counts], start_rendering)[-1] == ["text", "text"]
