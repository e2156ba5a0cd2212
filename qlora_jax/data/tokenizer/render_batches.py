"""Runs computations that need rendered conversations, such as those of many rows, and renders many at once."""

import collections
import difflib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence

import jinja2
import jinja2.nodes
from jinja2.defaults import DEFAULT_NAMESPACE

from qlora_jax.data.tokenizer.chat_template import MAX_TEMPLATE, Rendering
from qlora_jax.data.tokenizer.template_pipe import STRFTIME_NOW
from qlora_jax.data.tokenizer.template_worker import make_environment

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


# Finds the variables that a chat template reads, so that a misspelt one is an error.
#
# The template is parsed here, but neither compiled nor rendered: a stranger wrote it, and jinja computes constants when
# it compiles.

# Variables that a conversation or the tokenizer sets, and functions of the template's environment.
OWN_VARIABLES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
)
_FUNCTIONS = frozenset({"raise_exception", STRFTIME_NOW, *DEFAULT_NAMESPACE})


def template_variables(template: str) -> frozenset[str]:
    """Returns the names that the template reads and that a setting may give; none if it does not parse.

    A name that the template also sets, as a default does, is among them. Targets of loops and macros with
    their arguments are not.
    """
    if len(template) > MAX_TEMPLATE:
        return frozenset()
    try:
        tree = make_environment(optimized=False).parse(template)
        names = [*tree.find_all(jinja2.nodes.Name)]
        targets = [loop.target for loop in tree.find_all(jinja2.nodes.For)]
        targets += [name for target in targets for name in target.find_all(jinja2.nodes.Name)]
        local = {macro.name for macro in tree.find_all(jinja2.nodes.Macro)}
    except (jinja2.TemplateSyntaxError, RecursionError):  # rendering raises an error that says where
        return frozenset()
    read = {name.name for name in names if name.ctx == "load"}
    local |= {name.name for name in names if name.ctx == "param"}
    local |= {target.name for target in targets if isinstance(target, jinja2.nodes.Name)}
    return frozenset(read - local - OWN_VARIABLES - _FUNCTIONS - {"loop", "caller", "varargs", "kwargs"})


def check_variables(template: str, given: set[str], key: str) -> None:
    """Raises ValueError for names that the template does not read, or that are not for settings to give.

    Args:
      key: the setting that gives them, for messages.
    """
    known = template_variables(template)
    unknown = sorted(given - known)
    if not unknown:
        return
    near = {name: difflib.get_close_matches(name, known, n=1) for name in unknown}
    meant = "".join(f"; for {name!r}, did you mean {found[0]!r}?" for name, found in near.items() if found)
    raise ValueError(
        f"{key}: the chat template reads no variable of this name (found {', '.join(map(repr, unknown))}, expected "
        f"{', '.join(sorted(known)) or 'none'}{meant}). Correct the names, or set a chat template that reads them"
    )
