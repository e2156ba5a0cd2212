"""Runs an engine in one thread, and hands its steps to the event loop."""

import asyncio
import concurrent.futures
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from qlora_jax.inference.engine.request import Request, Step
from qlora_jax.server.errors import ApiError, bad_request

RETRY_SECONDS = 1  # after which a client whose request did not fit into the queue may send it again


@runtime_checkable
class EngineUsage(Protocol):
    """The state of an engine as named numbers."""

    def _asdict(self) -> dict[str, int]: ...


@runtime_checkable
class AnyEngine(Protocol):
    """The methods of an engine that the thread calls; `prepare` is called by others."""

    @property
    def busy(self) -> bool: ...
    def prepare(self, request: Request) -> None: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, number: int) -> None: ...
    def step(self) -> list[Step]: ...
    def usage(self) -> EngineUsage: ...


class Replies:
    """The replies to the requests of one client: an iterator over (index of the request, step) as they come."""

    def __init__(self, count: int):
        self.left = set(range(count))
        self.numbers: list[int] = []
        self._items: asyncio.Queue[tuple[int, Step] | ApiError] = asyncio.Queue()
        self._watch: Callable[[int, Step], None] = lambda index, step: None

    def watch(self, function: Callable[[int, Step], None]) -> None:
        """Calls a function with each step when it arrives from the engine."""
        self._watch = function

    def __aiter__(self) -> "Replies":
        return self

    async def __anext__(self) -> tuple[int, Step]:
        while self.left:
            item = await self._items.get()
            if isinstance(item, ApiError):
                raise item
            index, step = item
            if step.end == "error":
                raise bad_request([f"{step.problem}"])
            if index in self.left:
                if step.end is not None:
                    self.left.remove(index)
                return item
        raise StopAsyncIteration

    def put(self, item: tuple[int, Step] | ApiError) -> None:
        """Adds a step, or the error that ends all replies."""
        if not isinstance(item, ApiError):
            self._watch(*item)
        self._items.put_nowait(item)


def took_too_long(seconds: float) -> ApiError:
    """Returns the error of a request whose time is over."""
    return ApiError(504, f"the request took more than {seconds:g} s. Shorten it, or raise --timeout")


class EngineThread:
    """An engine and its thread. All methods but `run` belong to the event loop.

    A command is taken before each step of the engine, so a cancelled request runs for one step at most.
    """

    def __init__(self, engine: AnyEngine, *, places: int):
        """Starts no thread yet.

        Args:
          places: requests that may wait or run.
        """
        self._engine, self._places = engine, places
        self.on_failure: Callable[[], None] = lambda: None  # called in the event loop if the engine fails
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: dict[int, tuple[Replies, int]] = {}  # by the engine's number
        self._calls: set[concurrent.futures.Future] = set()
        self._taken = 0
        self.failure: BaseException | None = None

    def start(self) -> None:
        """Starts the thread; steps go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._commands.put(None)
        self._thread.join()

    @property
    def taken(self) -> int:
        """Number of requests that wait or run."""
        return self._taken

    async def call[T](self, function: Callable[[], T]) -> T:
        """Returns what a function returns, which runs in the thread between two steps."""
        done: concurrent.futures.Future[T] = concurrent.futures.Future()

        def command() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except Exception as error:
                    done.set_exception(error)

        self.check_runs()
        self._calls.add(done)
        self._commands.put(command)
        try:
            return await asyncio.wrap_future(done)
        finally:
            self._calls.discard(done)

    @contextlib.asynccontextmanager
    async def replies(self, requests: Sequence[Request], seconds: float) -> AsyncIterator[Replies]:
        """Yields the replies; leaving it ends what is left of them.

        Raises:
          ApiError: a request cannot be answered, or too many wait; in the iteration: the time is over.
        """
        assert self._loop is not None, "start came before"
        replies = Replies(len(requests))
        with self.places(len(requests)):
            timer = self._loop.call_later(seconds, replies.put, took_too_long(seconds))
            try:
                await self._submitted(replies, requests)
                yield replies
            finally:
                timer.cancel()
                self._commands.put(lambda: self._cancel(replies))

    @contextlib.contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Takes places among the requests that wait or run; raises ApiError if there are fewer."""
        self.check_runs()
        if count > self._places:
            problem = f"found {count} replies in one request, expected at most {self._places}. Ask for fewer"
            raise ApiError(400, f"{problem}, or raise --queue")
        if self._taken + count > self._places:
            raise ApiError(
                429,
                f"too many requests wait (found {self._taken}, expected at most {self._places - count}). "
                "Send it again later",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self._taken += count
        try:
            yield
        finally:
            self._taken -= count

    async def _submitted(self, replies: Replies, requests: Sequence[Request]) -> None:
        try:
            if any(request.grammar for request in requests):  # compiling one must not stop other replies
                await asyncio.to_thread(lambda: [self._engine.prepare(request) for request in requests])
            await self.call(lambda: self._submit(replies, requests))
        except ValueError as error:
            raise bad_request(str(error).split("\n")) from None

    def end(self, replies: Replies, index: int) -> None:
        """Ends one of the replies."""
        replies.left.discard(index)
        self._commands.put(lambda: self._engine.cancel(replies.numbers[index]))

    def usage(self) -> EngineUsage:
        """Returns the engine's state; for `call`."""
        return self._engine.usage()

    def check_runs(self) -> None:
        """Raises ApiError if the engine has failed."""
        if self.failure is not None:
            raise ApiError(503, "the engine has stopped. Start the server again")

    # In the thread.

    def _submit(self, replies: Replies, requests: Sequence[Request]) -> None:
        for request in requests:
            replies.numbers.append(self._engine.submit(request))
        self._post(self._register, replies)

    def _cancel(self, replies: Replies) -> None:
        for number in replies.numbers:
            self._engine.cancel(number)
        self._post(self._forget, replies)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None, "start came before"
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits for it
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            while True:
                # Waits for a command while there is nothing else to do.
                while not self._commands.empty() or not self._engine.busy:
                    command = self._commands.get()
                    if command is None:
                        return
                    command()
                if steps := self._engine.step():
                    self._post(self._deliver, steps)
        except BaseException as error:
            self._post(self._fail, error)

    # In the event loop.

    def _register(self, replies: Replies) -> None:
        self._open |= {number: (replies, index) for index, number in enumerate(replies.numbers)}

    def _forget(self, replies: Replies) -> None:
        for number in replies.numbers:
            self._open.pop(number, None)

    def _deliver(self, steps: Sequence[Step]) -> None:
        for step in steps:
            if (place := self._open.get(step.request)) is not None:
                place[0].put((place[1], step))

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        ended = ApiError(500, "the engine has failed. Its error is in the server's log")
        for replies in {id(replies): replies for replies, _ in self._open.values()}.values():
            replies.put(ended)
        for call in [*self._calls]:
            if not call.cancel():
                call.set_exception(ended)
        self.on_failure()
