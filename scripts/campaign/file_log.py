"""Replays the file operations of a process, as strace logged them, up to a crash of the system.

The data of a file is on the disk when an fsync of the file has ended, and the names in a folder when one of the folder
has. Until then, a crash may lose them.
"""

import ast
import dataclasses
import functools
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

SYNCS = ("fsync", "fdatasync")
BY_DESCRIPTOR = ("write", "writev", "pwrite64", "ftruncate", *SYNCS)
CALLS = (*BY_DESCRIPTOR, "openat", "mkdir", "mkdirat", "rename", "unlink", "unlinkat", "rmdir")

# A call that other threads interrupt has two lines: `7 mkdir("a" <unfinished ...>`, `7 <... mkdir resumed>, 0777) = 0`.
_START = re.compile(r"(\d+) +(\w+)\((.*?)( <unfinished \.\.\.>)?\n")
_REST = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)\n")
_ENDED = re.compile(r"(.*)\) += (\d+)")  # the result of an error is -1
_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DESCRIPTOR = re.compile(r"<([^>]*)>(?! ?\(deleted\))")


type Left = tuple[str, bytes | None]  # a path with the data of the file; None for a folder


class Event(NamedTuple):
    """The start of an operation that succeeds, or the end of an fsync ("synced").

    Fields:
      name: of the system call.
      number: relates the start and the end of an fsync.
      paths: of the file or folder; of a rename, the old and the new one.
      data: that is written.
      arguments: as strace writes them.
    """

    name: str
    number: int
    paths: list[str]
    data: bytes
    arguments: str


def read_log(lines: Iterable[str], root: str) -> list[Event]:
    """Returns the events in the folder `root`, in order; paths are relative to it."""
    started: dict[str, Event] = {}  # by thread
    events: dict[float, Event] = {}
    for place, line in enumerate(lines):
        if found := _START.fullmatch(line):
            started[found[1]] = Event(found[2], place, [], b"", found[3])
        elif found := _REST.fullmatch(line):
            started[found[1]] = started[found[1]]._replace(arguments=started[found[1]].arguments + found[2])
        if found and (ended := _ENDED.match(started[found[1]].arguments)):
            event = _parsed(started[found[1]]._replace(arguments=ended[1]), int(ended[2]), f"{root}/")
            if event.paths:
                events[event.number] = event
                if event.name in SYNCS:
                    events[place + 0.5] = event._replace(name="synced")
    return [events[number] for number in sorted(events)]


def _parsed(event: Event, result: int, root: str) -> Event:
    texts = [ast.literal_eval(f'b"{text}"') for text in _TEXT.findall(event.arguments)]  # strace has C's escapes
    paths, data = _DESCRIPTOR.findall(_TEXT.sub("", event.arguments)), b""
    if event.name in BY_DESCRIPTOR:
        data = b"".join(texts)[:result]
    else:
        paths = [posixpath.join(*paths, text.decode()) for text in texts]
    inside = [path[len(root) :] for path in paths if f"{path}/".startswith(root)]
    return event._replace(paths=inside, data=data)


type Content = bytes | dict[str, Node]  # data of a file, or nodes of a folder by name


@dataclasses.dataclass(eq=False)
class Node:
    """A file or a folder: its content now, and as of the last fsync that has ended."""

    now: Content
    synced: Content

    @property
    def names(self) -> "dict[str, Node]":
        """Nodes of a folder by name."""
        assert isinstance(self.now, dict)
        return self.now

    def write(self, offset: int | None, data: bytes) -> None:
        """Writes into a file; `offset` None appends."""
        assert isinstance(self.now, bytes)
        at = len(self.now) if offset is None else offset
        self.now = self.now[:at].ljust(at, b"\0") + data + self.now[at + len(data) :]


class Disk:
    """The files in a folder, as events change them."""

    def __init__(self):
        self.root = Node({}, {})
        self._syncing: dict[int, Content] = {}

    def apply(self, event: Event) -> None:
        """Changes the files as one event does."""
        (folder, name), *new = map(self._entry, event.paths)
        node = folder.names.get(name, Node(b"", b"")) if name else self.root
        match event.name:
            case "openat" if "O_CREAT" in event.arguments:
                folder.names[name] = node
                node.now = b"" if "O_TRUNC" in event.arguments else node.now
            case "mkdir" | "mkdirat":
                folder.names[name] = Node({}, {})
            case "rename":
                new[0][0].names[new[0][1]] = folder.names.pop(name)
            case "unlink" | "unlinkat" | "rmdir":
                del folder.names[name]
            case "write" | "writev":
                node.write(None, event.data)
            case "pwrite64":
                node.write(int(event.arguments.rpartition(", ")[2]), event.data)
            case "ftruncate":
                assert isinstance(node.now, bytes)
                node.now = node.now[: int(event.arguments.rpartition(", ")[2])]
            case "fsync" | "fdatasync":
                self._syncing[event.number] = {**node.names} if isinstance(node.now, dict) else node.now
            case "synced":
                node.synced = self._syncing.pop(event.number)

    def _entry(self, path: str) -> tuple[Node, str]:
        """Returns the folder and the name of a path."""
        *folders, name = path.split("/")
        return functools.reduce(lambda node, part: node.names[part], folders, self.root), name


def left(node: Node, survives: Callable[[Node], Content], path: str = "") -> Iterator[Left]:
    """Yields the folders and files that a crash leaves of a node, given what survives of each."""
    content = survives(node)
    yield path, None if isinstance(content, dict) else content
    for name, child in content.items() if isinstance(content, dict) else ():
        yield from left(child, survives, posixpath.join(path, name))
