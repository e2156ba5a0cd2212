"""Decodes the replies to many requests together, in calls of static shapes: prompts in chunks, replies by token.

The reply to a request does not depend on what runs beside it, to the bit. A row's result in a call depends on that row
alone, prompts are always computed by prompt calls, and replies by decode calls.

Dimension key: D devices, R rows of a decode call, B, T tokens of a call, L layers, I pages of a row, V vocab.
"""

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.attention import KVPages
from pallas_kernels.attention.pages import PAGE
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference.engine.adapters import ByProjection, adapters_of, with_adapters
from qlora_jax.inference.engine.detokenizer import ReplyText
from qlora_jax.inference.engine.generation import Generation
from qlora_jax.inference.engine.grammar import GrammarCompiler, Matcher
from qlora_jax.inference.engine.kv_page_pool import PagePool, block_keys, groups_of, most_pages
from qlora_jax.inference.engine.model_calls import (
    PROMPT_TOKENS,
    ROW_COUNTS,
    advance,
    advance_and_score,
    decode_inputs,
    empty_cache,
    page_bytes,
    prompt_call,
    rotation_length,
    round_up,
    table_blocks,
)
from qlora_jax.inference.engine.request import LIKELIEST, Request, Scored, Step, prompt_problems
from qlora_jax.inference.engine.token_sampler import (
    Choice,
    Row,
    RowSettings,
    RowState,
    row_settings,
    row_state,
    sample_tokens,
)
from qlora_jax.inference.mesh_inference import row_shards
from qlora_jax.models.partition import ModelParts, combine, prepare_for_decoding
from qlora_jax.sharding import mesh_of

BESIDE_REPLIES = 128  # tokens of prompts per call while replies wait for it
PATIENCE = 64  # decode calls with half of their rows empty, after which they get a smaller shape


class Usage(NamedTuple):
    """The state of an engine.

    Fields:
      waiting, running: numbers of requests.
      pages, pages_held: pages of the cache, and those that requests hold.
      prompt_tokens: tokens of prompts that were computed.
      shared_tokens: tokens of prompts that were found in the cache.
      generated_tokens: tokens of replies.
      preemptions: requests that began again because the cache was full.
    """

    waiting: int
    running: int
    pages: int
    pages_held: int
    prompt_tokens: int
    shared_tokens: int
    generated_tokens: int
    preemptions: int


type Rows = list[list[Generation]]  # per device


@dataclasses.dataclass(eq=False)
class _Flight:
    """A decode call whose tokens have not been read.

    Attributes:
      rows: of the call.
      indices: number of the token of its reply that each row gets.
      choice: the tokens.
      settings, state: of the rows, for the next call with the same ones.
    """

    rows: Rows
    indices: dict[Generation, int]
    choice: Choice
    settings: RowSettings
    state: RowState

    @property
    def is_restricted(self) -> bool:
        """True if a grammar has to know these tokens before the next ones are chosen."""
        return any(each.matcher is not None for each in self.indices)

    def has(self, rows: Rows, count: int) -> bool:
        """Returns True if the rows of a call of `count` rows per device are fed these tokens, in their places."""
        same = rows == self.rows and len(self.choice.token_R) == count * len(rows)
        return same and all(self.indices[each] == each.fed for each in self.indices)


class Engine:
    """A model that answers requests; one thread may call it."""

    def __init__(
        self,
        parts: ModelParts,
        tokenizer: Tokenizer | None = None,
        *,
        adapters: Mapping[str, ModelParts] = MappingProxyType({}),
        cache_bytes: int,
        cache_dtype: DTypeLike | None = None,
        max_rows: int = ROW_COUNTS[-1],
    ):
        """Allocates the cache.

        Args:
          tokenizer: for the text of steps, and for stop texts; None: steps have ids only.
          adapters: models of runs on the same base, by the names that requests use; see `add_adapter`.
          cache_bytes: limit of the cache's bytes on each device.
          cache_dtype: dtype of keys and values; None: the compute dtype.
          max_rows: number of replies that each device decodes together, at most 16.

        Raises:
          ValueError: the limit is below one page per layer, or `max_rows` is out of bounds.
        """
        if not 1 <= max_rows <= ROW_COUNTS[-1]:
            raise ValueError(f"max_rows: found {max_rows}, expected 1 to {ROW_COUNTS[-1]}")
        self._alone = prepare_for_decoding(parts)
        self._parts = self._alone
        self._adapters: dict[str, tuple[int, ByProjection]] = {}
        model = combine(self._parts)
        self._tokenizer, self._config, self._mesh = tokenizer, model.config, mesh_of(parts)
        self._num_ids = model.model.embed_tokens.num_ids
        dtype = cache_dtype or model.model.embed_tokens.weight[...].dtype
        pages = cache_bytes // page_bytes(self._config, dtype)
        if pages <= self._config.num_layers:
            least = (self._config.num_layers + 1) * page_bytes(self._config, dtype)
            raise ValueError(f"cache: too small (found {cache_bytes:,} bytes, expected {least:,} or more). Raise it")
        self._groups = groups_of(self._config)
        self._pools = [PagePool(pages, self._groups) for _ in range(row_shards(self._mesh))]
        self._cache = empty_cache(self._config, pages, dtype, self._mesh)
        self._max_rows = max_rows
        self._waiting: collections.deque[Generation] = collections.deque()
        self._prompts: list[Generation] = []
        self._running: list[Generation] = []
        self._flights: dict[int | None, _Flight] = {}
        self._rows: dict[int | None, tuple[int, int]] = {}  # per length: rows of its calls, calls that were half empty
        self._table_of: tuple[int, list[list[tuple[int, int]]]] | None = None  # rows whose pages the cache's table has
        self._grammars: GrammarCompiler | None = None
        self._numbers = itertools.count()
        self._counts: collections.Counter[str] = collections.Counter()
        for name, own in adapters.items():
            self.add_adapter(name, own)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the runs whose adapters requests may ask for."""
        return tuple(self._adapters)

    @property
    def positions(self) -> int:
        """The most positions of one request: those of the model, or fewer if the cache holds no more."""

        def pages(positions: int) -> int:
            return most_pages(self._groups, positions, PROMPT_TOKENS[-1])

        return bisect.bisect(range(self._config.max_positions + 1), self._pools[0].pages, key=pages) - 1

    def add_adapter(self, name: str, parts: ModelParts) -> None:
        """Adds the adapter of a run's model, whose base is that of the engine.

        Raises:
          ValueError: the name is taken, or its method cannot share a batch with other runs.
        """
        if name in self._adapters:
            raise ValueError(f"{name}: the engine has an adapter of this name. Choose another one")
        number = min(set(range(1, len(self._adapters) + 2)) - {number for number, _ in self._adapters.values()})
        self._set_adapters(self._adapters | {name: (number, adapters_of(name, parts))})

    def remove_adapter(self, name: str) -> None:
        """Removes an adapter.

        Raises:
          ValueError: there is none of this name, or requests use it.
        """
        if name not in self._adapters:
            raise ValueError(f"{name}: the engine has no adapter of this name (found {list(self._adapters)})")
        if any(each.request.adapter == name for each in (*self._waiting, *self._prompts, *self._running)):
            raise ValueError(f"{name}: requests use this adapter. Wait for them, or cancel them")
        self._set_adapters({other: own for other, own in self._adapters.items() if other != name})
        for pool in self._pools:
            pool.forget_idle()  # another adapter may get the name

    def _set_adapters(self, adapters: dict[str, tuple[int, ByProjection]]) -> None:
        numbers = dict(adapters.values())
        most = max(numbers, default=1)
        count = 1 + (1 << (most - 1).bit_length())  # none, and 1, 2, 4, ... runs: another count is another program
        self._parts = with_adapters(self._alone, numbers, count) if numbers else self._alone
        self._adapters = adapters

    def _own(self, each: Generation) -> int:
        return 0 if each.request.adapter is None else self._adapters[each.request.adapter][0]

    @property
    def busy(self) -> bool:
        """True while requests wait or run."""
        return bool(self._waiting or self._prompts or self._running)

    def usage(self) -> Usage:
        """Returns the engine's state."""
        pages = sum(pool.pages for pool in self._pools)
        counted = {name: self._counts[name] for name in Usage._fields[4:]}
        held = pages - sum(pool.available for pool in self._pools)
        return Usage(len(self._waiting), len(self._prompts) + len(self._running), pages, held, **counted)

    def submit(self, request: Request) -> int:
        """Adds a request; returns its number.

        Raises:
          ValueError: it cannot be answered; lists all problems.
        """
        if problems := self.problems(request):
            raise ValueError("\n".join(problems))
        prompt = np.asarray(request.prompt, np.int32)
        length = rotation_length(self._most_positions(request), self._config)
        root = repr((request.adapter, length)).encode()
        keys = [] if request.score_prompt else block_keys(prompt[:-1], root)
        text = None if self._tokenizer is None else ReplyText(self._tokenizer, request.stop_texts)
        reply = {"length": length, "text": text, "matcher": self._matcher(request)}
        number = next(self._numbers)
        self._waiting.append(Generation(number=number, request=request, prompt=prompt, keys=keys, **reply))
        return number

    def prepare(self, request: Request) -> None:
        """Compiles the grammar of a request, so that `submit` takes little time; any thread may call it.

        Raises:
          ValueError: the grammar cannot be followed.
        """
        self._matcher(request)

    def _matcher(self, request: Request) -> Matcher | None:
        if request.grammar is None or self._tokenizer is None:  # `problems` refuses one without a tokenizer
            return None
        if self._grammars is None:
            self._grammars = GrammarCompiler(self._tokenizer, self._num_ids)
        return self._grammars.matcher(request.grammar, request.stop_ids)

    def problems(self, request: Request) -> list[str]:
        """Returns why a request cannot be answered, one line each."""
        problems = []
        if request.adapter is not None and request.adapter not in self._adapters:
            problems.append(f"adapter: found {request.adapter!r}, expected one of {list(self._adapters)}")
        if request.max_new_tokens < (0 if request.score_prompt else 1):
            problems.append(f"max_new_tokens: found {request.max_new_tokens}, expected at least 1")
        least = min(1, request.max_new_tokens)
        problems += prompt_problems("prompt", request.prompt, self._config.max_positions, self._num_ids, least)
        if self._tokenizer is None and (request.grammar is not None or request.stop_texts):
            problems.append("grammar, stop_texts: the engine has no tokenizer. Give it one")
        if self._mesh is not None and request.score_prompt:
            problems.append("score_prompt: several devices share the model. Score prompts with `evaluate`")
        most = min(LIKELIEST[-1], self._num_ids)
        if request.likeliest is not None and not 0 <= request.likeliest <= most:
            problems.append(f"likeliest: found {request.likeliest}, expected 0 to {most}")
        if wrong := [token for token, _ in request.sampling.logit_bias if token >= self._num_ids]:
            problems.append(f"logit_bias: found id {wrong[0]}, expected 0 to {self._num_ids - 1}")
        needed = most_pages(self._groups, self._most_positions(request), PROMPT_TOKENS[-1])
        if not problems and needed > self._pools[0].pages:
            found = f"the request takes up to {needed:,} pages, the cache has {self._pools[0].pages:,}"
            problems.append(f"cache: too small ({found}). Raise it, or lower max_new_tokens")
        return problems

    def cancel(self, number: int) -> None:
        """Drops a request; no further step has it."""
        for queue in (self._waiting, self._prompts, self._running):
            for each in [one for one in queue if one.number == number]:
                queue.remove(each)
                self._drop(each)

    def step(self) -> list[Step]:
        """Runs one call for prompts and one for the next token of each reply; returns the steps that they give."""
        self._admit()
        steps = self._prompt_call()
        for length in list(dict.fromkeys([*self._flights, *(each.length for each in self._running)])):
            steps += self._decode_call(length)
        return steps

    def stream(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Yields the steps of requests as they are generated; requests are numbered by their order here.

        No other requests may run meanwhile.
        """
        numbers = {self.submit(request): index for index, request in enumerate(requests)}
        try:
            while self.busy:
                yield from (step._replace(request=numbers[step.request]) for step in self.step())
        finally:
            for number in numbers:
                self.cancel(number)

    # ---- places and pages

    def _most_positions(self, request: Request) -> int:
        return min(len(request.prompt) + request.max_new_tokens, self._config.max_positions)

    def _admit(self) -> None:
        """Gives waiting requests a place, in their order, while pages for their prompts are left."""
        while self._waiting:
            placed = [each.device for each in (*self._prompts, *self._running)]
            device = min(range(len(self._pools)), key=placed.count)
            first, pool = self._waiting[0], self._pools[device]
            if placed.count(device) >= self._max_rows:
                return
            first.device, first.blocks = device, [[] for _ in self._groups]
            first.share(pool)
            held = sum(len(block.pages) for own in first.blocks for block in own if block is not None)
            needed = most_pages(self._groups, len(first.prompt) + 1, PROMPT_TOKENS[-1])
            if placed and needed - held > pool.available:
                first.release(pool)
                return
            self._counts["shared_tokens"] += first.computed
            self._prompts.append(self._waiting.popleft())

    def _take_pages(self, generation: Generation, positions: int) -> bool:
        """Takes pages for further positions, from younger requests if need be; False if it has to wait itself."""
        pool = self._pools[generation.device]
        while not generation.extend(pool, positions):
            others = [each for each in (*self._prompts, *self._running) if each.device == generation.device]
            youngest = max(others, key=lambda each: each.number)
            self._preempt(youngest)
            if youngest is generation:
                return False
        return True

    def _preempt(self, generation: Generation) -> None:
        for queue in (self._prompts, self._running):
            if generation in queue:
                queue.remove(generation)
        generation.release(self._pools[generation.device])
        self._counts["preemptions"] += 1
        at = sum(each.number < generation.number for each in self._waiting)
        self._waiting.insert(at, generation)

    def _drop(self, generation: Generation) -> None:
        generation.ended = True
        generation.release(self._pools[generation.device])

    def _with_table(self, rows: Rows, count: int) -> KVPages:
        """Returns the cache with the pages [L, D R, I] of rows of each device, of which each has `count`."""
        versions = [[(each.number, each.pages_version) for each in own] for own in rows]
        if self._table_of == (count, versions):
            return self._cache
        self._table_of = count, versions
        positions = max(each.computed for own in rows for each in own)
        shape = self._config.num_layers, count * len(rows), table_blocks(positions, self._config)
        table_LRI = np.zeros(shape, np.int32)
        for device, own in enumerate(rows):
            for row, each in enumerate(own):
                each.write_table(table_LRI[:, device * count + row], self._pools[device])
        return dataclasses.replace(self._cache, pages_LRI=table_LRI)

    # ---- prompts

    def _prompt_call(self) -> list[Step]:
        """Runs the next chunk of prompts, in their order, and returns the first steps of those that it completes."""
        if not self._prompts:
            return []
        length = self._prompts[0].length
        limit = BESIDE_REPLIES if self._running else PROMPT_TOKENS[-1]
        chosen = [self._next_prompts(device, length, limit) for device in range(len(self._pools))]
        left = max(sum(min(each.prompt_left, limit) for each in own) for own in chosen)
        size = prompt_call(min(left, limit))
        shares = {each: count for own in chosen for each, count in self._shares(own, size).items()}
        counts = {each: count for each, count in shares.items() if each in self._prompts}  # others had to give way
        chosen = [[each for each in own if each in counts] for own in chosen]
        if not any(chosen):
            return []
        return self._run_prompts(chosen, counts, size, length)

    def _next_prompts(self, device: int, length: int | None, limit: int) -> list[Generation]:
        """Returns the first prompts of a device with `limit` tokens; of those that begin alike, only the first."""
        chosen, tokens, begun = [], 0, set()
        if self._prompts[0].request.score_prompt:
            return [self._prompts[0]]
        for each in self._prompts:
            if each.device != device or each.length != length or each.request.score_prompt:
                continue
            before = each.computed
            each.share(self._pools[device])
            self._counts["shared_tokens"] += each.computed - before
            upcoming = each.keys[each.computed // PAGE : (each.computed + limit) // PAGE]
            if begun.isdisjoint(upcoming):
                chosen.append(each)
                tokens += each.prompt_left
                begun.update(upcoming)
            if tokens >= limit or len(chosen) == ROW_COUNTS[-1]:
                break
        return chosen

    def _shares(self, own: Sequence[Generation], size: int) -> dict[Generation, int]:
        """Returns the tokens of each prompt in a call of `size` tokens, and takes pages for them."""
        counts: dict[Generation, int] = {}
        for each in own:
            count = min(each.prompt_left, size - sum(counts.values()))
            if count and each in self._prompts and self._take_pages(each, count):
                counts[each] = count
        return counts

    def _run_prompts(self, chosen: Rows, counts: dict[Generation, int], size: int, length: int | None) -> list[Step]:
        devices, most = len(chosen), max(map(len, chosen))
        rows = round_up(most, (1, ROW_COUNTS[-1]))
        tokens_BT = np.zeros((devices, size), np.int32)
        rows_BT, own_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT), np.full_like(tokens_BT, -1)
        last_DR = np.zeros((devices, rows), np.int32)
        for device, own in enumerate(chosen):
            end = 0
            for row, each in enumerate(own):
                here, at = slice(end, end + counts[each]), slice(each.computed, each.computed + counts[each])
                tokens_BT[device, here], rows_BT[device, here] = each.prompt[at], row
                positions_BT[device, here], own_BT[device, here] = np.arange(at.start, at.stop), self._own(each)
                end, each.computed = here.stop, at.stop
                last_DR[device, row] = end - 1
                self._counts["prompt_tokens"] += counts[each]
        cache = self._with_table(chosen, rows)
        inputs = tokens_BT.reshape(-1), rows_BT, positions_BT, last_DR.reshape(-1), cache, own_BT
        scoring = next((each for each in counts if each.request.score_prompt and not each.generated), None)
        if scoring is None:
            logits_RV = self._advance(*inputs, length)
        else:
            logits_RV = self._advance_and_score(scoring, counts[scoring], *inputs, length)
        for each in counts:
            each.publish(self._pools[each.device])
        done = [each for each in counts if not each.prompt_left]
        self._prompts = [each for each in self._prompts if each not in done]
        self._running += done
        new = [each for each in done if not each.generated]
        if scoring in new and scoring.request.max_new_tokens == 0:
            return [self._finish(scoring, scoring.without_reply())]
        if not new:
            return []
        choice = jax.tree.map(np.asarray, self._choose(logits_RV, chosen, rows, None)[0])
        places = {each: device * rows + row for device, own in enumerate(chosen) for row, each in enumerate(own)}
        return [self._add(each, choice, places[each]) for each in new]

    # ---- replies

    def _decode_call(self, length: int | None) -> list[Step]:
        """Runs the next token of each reply of rows of a length; returns the steps of the call before it.

        The call is dispatched before the tokens of the one before it are read, unless rows have changed. If a grammar
        restricts rows, they are read while the model runs, before it chooses the next ones.
        """
        flight = self._flights.pop(length, None)
        unread, steps = flight, []
        rows = self._decode_rows(length, flight)
        count = self._row_count(length, max(map(len, rows)))
        if flight is not None and not flight.has(rows, count):
            steps, unread = self._read(flight), None
            rows = self._decode_rows(length, None)  # some of these rows
        if any(rows):
            before = flight if flight is not None and flight.has(rows, count) else None
            logits_RV, indices = self._dispatch(rows, count, length, None if unread is None else unread.choice)
            if unread is not None and unread.is_restricted:
                steps, unread = self._read(unread), None
            known = None if before is None else (before.settings, before.state)
            self._flights[length] = _Flight(rows, indices, *self._choose(logits_RV, rows, count, known))
        return steps + ([] if unread is None else self._read(unread))

    def _decode_rows(self, length: int | None, flight: _Flight | None) -> Rows:
        """Returns the rows of each device that take part in the next call, with pages for it."""

        def wants_more(each: Generation) -> bool:
            is_chosen = flight is not None and flight.indices.get(each) == len(each.generated)
            return each.length == length and each.has_room(int(is_chosen), self._config.max_positions)

        for each in sorted(filter(wants_more, self._running), key=lambda one: one.number):
            if each in self._running:  # none had to give way
                self._take_pages(each, 1)
        own = [*filter(wants_more, self._running)]
        return [[each for each in own if each.device == device] for device in range(len(self._pools))]

    def _dispatch(
        self, rows: Rows, count: int, length: int | None, unread: Choice | None
    ) -> tuple[jax.Array, dict[Generation, int]]:
        """Starts a decode call; returns (its logits, the number of the token of its reply that each row gets).

        Args:
          count: rows of the call on each device.
          unread: the tokens of these rows, if they have not been read.
        """
        known_R, own_R = np.zeros((2, count * len(rows)), np.int32)
        positions_R = np.full(count * len(rows), -1)
        indices: dict[Generation, int] = {}
        for device, own in enumerate(rows):
            for row, each in enumerate(own):
                at = device * count + row
                positions_R[at], own_R[at], indices[each] = each.computed, self._own(each), each.fed + 1
                if each.fed < len(each.generated):
                    known_R[at] = each.generated[each.fed]
        tokens_R = known_R if unread is None else unread.token_R
        if self._mesh is not None:  # tokens are chosen on one device
            tokens_R = np.asarray(tokens_R)
        for each in indices:
            each.computed += 1
        rows_BT, positions_BT, last_R = decode_inputs(count, positions_R, self._mesh)
        cache = self._with_table(rows, count)
        inputs = tokens_R, rows_BT, positions_BT, last_R, cache, own_R[:, None]
        return self._advance(*inputs, length), indices

    def _advance(
        self, tokens_M, rows_BT, positions_BT, last_R, cache: KVPages, own_BT, length: int | None
    ) -> jax.Array:
        """Runs a call, whose results are the new cache and the returned logits."""
        inputs = tokens_M, rows_BT, positions_BT, last_R, cache, own_BT if self._adapters else None
        logits_RV, self._cache = advance(self._parts, *inputs, length=length, mesh=self._mesh)
        return logits_RV

    def _advance_and_score(
        self, each: Generation, count: int, tokens_M, rows_BT, positions_BT, last_R, cache: KVPages, own_BT, length
    ) -> jax.Array:
        """Runs a call for one prompt, and adds the scores of its tokens."""
        start = each.computed - count
        upcoming = each.prompt[start + 1 : start + 1 + count]
        next_M = np.zeros(tokens_M.size, np.int32)
        next_M[: len(upcoming)] = upcoming
        likeliest = round_up(each.request.likeliest or 0, LIKELIEST)
        inputs = tokens_M, rows_BT, positions_BT, last_R, cache, own_BT if self._adapters else None, next_M
        logits_RV, self._cache, choice = advance_and_score(self._parts, *inputs, likeliest=likeliest, length=length)
        choice = jax.tree.map(np.asarray, choice)
        scored = [_scored(each.request, choice, row) for row in range(len(upcoming))]
        each.prompt_scores = (each.prompt_scores or []) + scored
        return logits_RV

    def _row_count(self, length: int | None, needed: int) -> int:
        """Returns the rows per device of the next decode call; they shrink after a while, as each size is compiled."""
        count, idle = self._rows.get(length, (0, 0))
        idle = idle + 1 if 2 * needed <= count else 0
        if needed > count or idle > PATIENCE:
            count, idle = round_up(max(1, needed), ROW_COUNTS), 0
        self._rows[length] = count, idle
        return count

    def _read(self, flight: _Flight) -> list[Step]:
        choice = jax.tree.map(np.asarray, flight.choice)
        count = len(choice.token_R) // len(flight.rows)
        return [
            self._add(each, choice, device * count + row)
            for device, own in enumerate(flight.rows)
            for row, each in enumerate(own)
            if each in self._running and flight.indices[each] == len(each.generated)
        ]

    def _add(self, each: Generation, choice: Choice, row: int) -> Step:
        scored = None if each.request.likeliest is None else _scored(each.request, choice, row)
        step = each.add(int(choice.token_R[row]), scored, self._config.max_positions)
        self._counts["generated_tokens"] += 1
        return self._finish(each, step)

    def _finish(self, each: Generation, step: Step) -> Step:
        """Returns a step with the scores of the prompt, if it is the first, and frees the pages after the last."""
        if each.prompt_scores is not None:
            step, each.prompt_scores = step._replace(prompt=tuple(each.prompt_scores)), None
        if each.ended:
            self._running.remove(each)
            each.release(self._pools[each.device])
        return step

    def _choose(
        self, logits_RV: jax.Array, rows: Rows, count: int, known: tuple[RowSettings, RowState] | None
    ) -> tuple[Choice, RowSettings, RowState]:
        """Chooses the next token of each row; masks of grammars are computed while the model runs.

        Args:
          known: settings and state that the call before left, if it had the same rows.
        """
        filled = [own + [None] * (count - len(own)) for own in rows]
        each_R, vocab = [each for own in filled for each in own], logits_RV.shape[1]
        if known is None:
            described = [Row() if each is None else each.row for each in each_R]
            known = row_settings(described, vocab), row_state(described, vocab)
        asked = [each.request.likeliest for each in each_R if each is not None and each.request.likeliest is not None]
        likeliest = round_up(max(asked), LIKELIEST) if asked else None
        local_RV = logits_RV if self._mesh is None else logits_RV.addressable_data(0)
        choice, state = sample_tokens(local_RV, *known, self._mask(each_R), likeliest=likeliest)
        return choice, known[0], state

    def _mask(self, each_R: Sequence[Generation | None]) -> np.ndarray | None:
        """Returns which tokens the grammars of rows allow next; None without grammars."""
        matchers = [None if each is None or each.ended or each.is_replaying else each.matcher for each in each_R]
        return self._grammars.masks(matchers) if self._grammars is not None and any(matchers) else None


def _scored(request: Request, choice: Choice, row: int) -> Scored:
    log_p_R, likeliest_RN, log_p_RN = choice[1:]
    assert log_p_R is not None and likeliest_RN is not None and log_p_RN is not None
    ids, log_ps = (each[row, : request.likeliest or 0].tolist() for each in (likeliest_RN, log_p_RN))
    return Scored(int(choice.token_R[row]), float(log_p_R[row]), tuple(zip(ids, log_ps, strict=True)))
