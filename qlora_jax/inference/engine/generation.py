"""One request on its way through an engine: the positions that it has in the cache, and the reply so far."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from pallas_kernels.attention.pages import PAGE
from qlora_jax.inference.engine.detokenizer import ReplyText
from qlora_jax.inference.engine.grammar import Matcher
from qlora_jax.inference.engine.kv_page_pool import Block, Key, PagePool
from qlora_jax.inference.engine.request import EndReason, Request, Scored, Step
from qlora_jax.inference.engine.token_sampler import Row


@dataclasses.dataclass(eq=False, kw_only=True)
class Generation:
    """A request and its state.

    Attributes:
      number: the request's number; lower ones were submitted earlier.
      prompt: its token ids.
      keys: of the prompt's blocks that may be shared; its last token is always computed, because the reply follows it.
      length: largest number of positions of this row, for rotations that depend on it; None for others.
      text: of the reply; None without a tokenizer.
      matcher: the reply's place in its grammar, if it has one.
      generated: ids of the reply. After a preemption they are fed again, by the same kind of call that computed them.
      computed: number of positions in the cache once the calls so far have run.
      pages_version: changes whenever its pages do.
      device: number of the device whose pages it has.
      blocks: per group of layers, the block of each run of positions; None where no later query sees it.
      prompt_scores: of the prompt's tokens so far, until a step reports them; None if no step has to.
    """

    number: int
    request: Request
    prompt: np.ndarray
    keys: Sequence[Key]
    length: int | None
    text: ReplyText | None
    matcher: Matcher | None
    generated: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    pages_version: int = 0
    device: int = 0
    blocks: list[list[Block | None]] = dataclasses.field(default_factory=list)
    prompt_scores: list[Scored] | None = None
    ended: bool = False

    @property
    def prompt_left(self) -> int:
        """Number of the prompt's tokens that are not computed."""
        return max(0, len(self.prompt) - self.computed)

    @property
    def fed(self) -> int:
        """Number of the reply's tokens that calls have got."""
        return self.computed - len(self.prompt)

    @property
    def is_replaying(self) -> bool:
        """True if the call that was fed last chooses a token that is known."""
        return self.fed < len(self.generated)

    @property
    def row(self) -> Row:
        """Everything but the logits that the next token depends on."""
        request, generated = self.request, self.generated[: max(0, self.fed)]
        return Row(request.sampling, request.repeat, request.prompt, generated, request.score_draw)

    def has_room(self, chosen: int, max_positions: int) -> bool:
        """Returns False if the reply ends by its length after `chosen` further tokens."""
        expected = len(self.generated) + chosen
        return expected < self.request.max_new_tokens and len(self.prompt) + expected < max_positions

    def share(self, pool: PagePool) -> None:
        """Takes over blocks that other prompts with the same beginning filled, from its next position on."""
        if self.computed % PAGE or not self.prompt_left:
            return
        start = self.computed // PAGE
        count = pool.shared(self.keys, start)
        self.pages_version += 1
        for g, group in enumerate(pool.groups):
            first = group.first_seen(count * PAGE)
            self.blocks[g] += [pool.hold(g, self.keys[at]) if at >= first else None for at in range(start, count)]
        self.computed = count * PAGE

    def extend(self, pool: PagePool, positions: int) -> bool:
        """Takes pages for so many further positions, after giving back those that are out of sight.

        Returns False, with what it has got so far, if other requests hold all pages.
        """
        blocks = -(-(self.computed + positions) // PAGE)
        for g, group in enumerate(pool.groups):
            own = self.blocks[g]
            for at in range(min(group.first_seen(self.computed), len(own))):
                if (block := own[at]) is not None:
                    pool.release(block)
                    own[at], self.pages_version = None, self.pages_version + 1
            while len(own) < blocks:
                if (taken := pool.take(g)) is None:
                    return False
                own.append(taken)
                self.pages_version += 1
        return True

    def publish(self, pool: PagePool) -> None:
        """Makes the blocks that the prompt has filled known to later prompts."""
        whole = min(self.computed, len(self.prompt)) // PAGE
        for own in self.blocks:
            for block, key in zip(own[:whole], self.keys, strict=False):
                if block is not None and block.key is None:
                    pool.publish(block, key)

    def release(self, pool: PagePool) -> None:
        """Gives all pages back; the request can begin again."""
        for block in [block for own in self.blocks for block in own if block is not None]:
            pool.release(block)
        self.blocks, self.computed, self.prompt_scores = [], 0, None
        self.pages_version += 1

    def write_table(self, table_LI: np.ndarray, pool: PagePool) -> None:
        """Writes the pages of each layer and block."""
        for group, own in zip(pool.groups, self.blocks, strict=True):
            for at, block in enumerate(own):
                if block is not None:
                    table_LI[group.layers, at] = block.pages

    def add(self, token: int, scored: Scored | None, max_positions: int) -> Step:
        """Adds a token to the reply and returns its step."""
        request, matcher = self.request, self.matcher
        if token in request.stop_ids or (matcher is not None and matcher.is_over):
            kept = (token, scored) if request.keep_stop and token in request.stop_ids else (None, None)
            return self._end("stop", *kept)
        if matcher is not None:
            matcher.accept(token)
            if matcher.problem is not None:
                return self._end("error", None, None)._replace(problem=matcher.problem)
        self.generated.append(token)
        text, stopped = ("", False) if self.text is None else self.text.push(token)
        if stopped:
            return self._end("stop", token, scored, text)
        if matcher is not None and matcher.is_over:
            return self._end("stop", token, scored, text)
        if len(self.prompt) + len(self.generated) == max_positions:
            return self._end("context", token, scored, text)
        if len(self.generated) == request.max_new_tokens:
            return self._end("length", token, scored, text)
        return Step(self.number, token, text, None, scored)

    def without_reply(self) -> Step:
        """Returns the step of a request that only scores its prompt."""
        return self._end("length", None, None)

    def _end(self, end: EndReason, token: int | None, scored: Scored | None, text: str = "") -> Step:
        self.ended = True
        rest, stopped = ("", False) if self.text is None else self.text.flush()
        return Step(self.number, token, text + rest, "stop" if stopped else end, scored)
