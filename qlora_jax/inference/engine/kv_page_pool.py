"""The pages of a key-value cache: which are free, which requests hold them, and which prompts they can be shared by.

Layers with the same window form a group. A run of PAGE positions has a `Block` in each group: a page per layer of it.
Blocks that prompts filled are found by content, also after their requests have ended, until their pages are needed.

All of it is bookkeeping on the host; the arrays are in `pallas_kernels.attention.KVPages`.
"""

import collections
import dataclasses
import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from pallas_kernels.attention.pages import PAGE
from qlora_jax.models.config import ModelConfig

type Key = bytes  # digest of all tokens up to the end of a run of positions, and of what else their values depend on


@dataclasses.dataclass(frozen=True)
class Group:
    """Layers with the same window.

    Attributes:
      layers: their numbers.
      window: number of positions that a query sees; None: all.
    """

    layers: np.ndarray
    window: int | None

    def first_seen(self, position: int) -> int:
        """Returns the first block that a query at a position sees, or any later one."""
        return 0 if self.window is None else max(0, position - self.window + 1) // PAGE


def groups_of(config: ModelConfig) -> list[Group]:
    """Returns the groups of a model's layers."""
    seen = np.array(config.visible_counts(config.max_positions))
    windows = [None if count == config.max_positions else int(count) for count in np.unique(seen)]
    return [Group(np.flatnonzero(seen == (window or config.max_positions)), window) for window in windows]


@dataclasses.dataclass(eq=False)
class Block:
    """The pages of a run of positions in the layers of a group; `key` None: not found by content."""

    group: int
    pages: np.ndarray
    holders: int = 1
    key: Key | None = None


def block_keys(tokens: np.ndarray, root: Key) -> list[Key]:
    """Returns the key of each whole run of PAGE tokens; `root` stands for what their values depend on besides."""
    keys, key = [], root
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        key = hashlib.blake2b(key + tokens[start : start + PAGE].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """The pages of one device.

    Attributes:
      pages: number of pages that rows can have.
      available: number of them that no request holds.
    """

    def __init__(self, pages: int, groups: Sequence[Group]):
        """Creates a pool of pages 1 to `pages` - 1; page 0 belongs to no row."""
        self.groups = groups
        self.pages = pages - 1
        self._free = [*range(pages - 1, 0, -1)]
        self._found: dict[tuple[int, Key], Block] = {}
        self._idle: collections.OrderedDict[Block, None] = collections.OrderedDict()  # the longest unused first
        self.available = pages - 1

    def take(self, group: int) -> Block | None:
        """Returns a block of unused pages, or None if requests hold the others."""
        count = len(self.groups[group].layers)
        while len(self._free) < count:
            if not self._idle:
                return None
            self._forget(self._idle.popitem(last=False)[0])
        pages = np.array(self._free[-count:], np.int32)
        del self._free[-count:]
        self.available -= count
        return Block(group, pages)

    def release(self, block: Block) -> None:
        """Gives a block back; it is kept for later prompts while its pages are not needed."""
        block.holders -= 1
        if block.holders:
            return
        self.available += len(block.pages)
        if block.key is None:
            self._free += block.pages.tolist()
        else:
            self._idle[block] = None

    def publish(self, block: Block, key: Key) -> None:
        """Makes a block that a prompt filled known by its content."""
        if (block.group, key) not in self._found:
            block.key = key
            self._found[block.group, key] = block

    def shared(self, keys: Sequence[Key], start: int = 0) -> int:
        """Returns the number of leading keys, from `start` on, whose blocks a request that follows them can hold."""
        whole = [g for g, group in enumerate(self.groups) if group.window is None]
        known = (all((g, key) in self._found for g in whole) for key in keys[start:])
        for count in range(start + sum(1 for _ in itertools.takewhile(bool, known)), start, -1):
            firsts = [max(start, group.first_seen(count * PAGE)) for group in self.groups]
            if all((g, key) in self._found for g, first in enumerate(firsts) for key in keys[first:count]):
                return count
        return start

    def hold(self, group: int, key: Key) -> Block:
        """Returns the block of a key, with one more holder."""
        block = self._found[group, key]
        if not block.holders:
            del self._idle[block]
            self.available -= len(block.pages)
        block.holders += 1
        return block

    def forget_idle(self) -> None:
        """Frees the pages that no request holds."""
        while self._idle:
            self._forget(self._idle.popitem()[0])

    def _forget(self, block: Block) -> None:
        assert block.key is not None
        del self._found[block.group, block.key]
        self._free += block.pages.tolist()


def most_pages(groups: Sequence[Group], positions: int, chunk: int) -> int:
    """Returns the pages that a row of so many positions holds at most, if at most `chunk` of them are added at once."""
    blocks = -(-positions // PAGE)
    most = [blocks if one.window is None else min(blocks, -(-(one.window + chunk) // PAGE) + 1) for one in groups]
    return sum(len(group.layers) * count for group, count in zip(groups, most, strict=True))
