"""What schedulers of calls have in common, whatever they compute with: messages in, tokens out, and what goes wrong.

A scheduler runs in the worker's thread, by turns. It talks to the event loop by an inbox of messages and a `post`
function, and knows nothing of either side's library. How calls are let in, computed and put off is its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from threading import Event
from time import perf_counter
from typing import Any, Generic, TypeVar

from plait.engines.inprocess.calls import Call, Delivery
from plait.errors import EngineError, EngineUnavailable
from plait.types import StopReason

CallT = TypeVar("CallT", bound=Call)


class Scheduler(Generic[CallT]):
    """Base of the schedulers.

    Args:
        wake: Set when any scheduler of the thread gets a message: a turn then ends.
        post: Called with what calls sampled, from the worker's thread; must not block.
        close: Called there when told to close, after the last delivery.
        flush_s: Calls that go on sampling are heard of this often.
    """

    name: str
    """Of the engine, for its errors."""

    def __init__(
        self,
        *,
        wake: Event,
        post: Callable[[list[Delivery]], object],
        close: Callable[[], object],
        flush_s: float,
    ) -> None:
        self._wake, self._post, self._close, self._flush_s = wake, post, close, flush_s
        self._inbox: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        self._bug: EngineError | None = None
        self._closing = False
        self._flush_at = 0.0
        self._since = 0.0
        self._unanswered: dict[CallT, None] = {}
        """Calls that did not end yet, wherever they are: none is forgotten when something breaks."""
        self.queue: deque[CallT] = deque()
        """Calls that wait to be let in."""
        self.slots: list[CallT] = []
        """Calls that sample."""
        self.prefill_tokens = self.reused_tokens = self.decode_tokens = self.steps = self.preemptions = 0
        self.drafted_tokens = self.accepted_tokens = 0
        self.compute_s = self.work_s = 0.0
        """Seconds inside forward passes; and in all of the thread's work on calls, deliveries excepted."""

    @property
    def active(self) -> int:
        """Calls that were let in."""
        raise NotImplementedError

    @property
    def evictions(self) -> int:
        raise NotImplementedError

    @property
    def cached_tokens(self) -> int:
        raise NotImplementedError

    @property
    def queued(self) -> int:
        return len(self.queue) + self._inbox.qsize()

    def put(self, message: tuple[str, Any]) -> None:
        """Tell it something, from any thread: a call to submit or cancel, to forget what is cached, to close."""
        self._inbox.put(message)
        self._wake.set()

    def ready(self) -> bool:
        """Whether there is something to do."""
        return bool(self.queue or self.active) or not self._inbox.empty()

    def turn(self) -> bool:
        """Take in messages and work for some milliseconds. False once closed."""
        try:
            self._receive()
            if self._bug is None and not self._closing:
                self._since = perf_counter()
                self._work()
                self.work_s += perf_counter() - self._since
        except Exception as exc:
            # Nobody knows what state it is in: every call is answered with the error until it is told to close.
            self._bug = EngineError(f"the {self.name} engine failed, please report: {type(exc).__name__}: {exc}")
            self._bug.__cause__ = exc
        if self._closing:
            self._fail(EngineUnavailable(f"the {self.name} engine was closed while a call was running"))
            self._close()
        elif self._bug is not None:
            self._fail(self._bug)
        return not self._closing

    def _receive(self) -> None:
        """Take in all messages."""
        while not self._inbox.empty():
            kind, what = self._inbox.get()
            if kind == "close":
                self._closing = True
            elif kind == "submit":
                self._unanswered[what] = None
                self.queue.append(what)
            elif kind == "forget":
                try:
                    self._forget()
                finally:
                    what()
            elif kind == "cancel":
                self._unanswered.pop(what, None)
                if what in self.queue:
                    self.queue.remove(what)
                else:
                    self._cancel(what)
            else:
                self._told(kind, what)

    def _told(self, kind: str, what: Any) -> None:
        """Take in a message of a kind of its own."""
        raise NotImplementedError(kind)

    def _cancel(self, call: CallT) -> None:
        """Take out a call that was let in, if it has not ended meanwhile."""
        raise NotImplementedError

    def _forget(self) -> None:
        """Drop what is cached of calls that ended."""
        raise NotImplementedError

    def _work(self) -> None:
        """Let calls in, compute, and `_deliver`."""
        raise NotImplementedError

    def _end(self, ended: Sequence[tuple[CallT, StopReason]]) -> None:
        """Take calls out that end with the token sampled last."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Forget all calls and contexts, whatever state the books are in."""
        raise NotImplementedError

    def _deliver(self) -> None:
        """After a step: end the calls that ended, and say what is due."""
        ended = [(call, stop) for call in self.slots if (stop := call.stop()) is not None]
        deliveries = [call.delivery(stop) for call, stop in ended]
        if ended:
            self._end(ended)
        now = perf_counter()
        if now >= self._flush_at:
            self._flush_at = now + self._flush_s
            deliveries += [call.delivery() for call in self.slots if len(call.ids) > call.sent]
        if deliveries:
            self._say(deliveries)

    def _say(self, deliveries: list[Delivery]) -> None:
        """Post deliveries. Calls that have a reason to stop in them have ended."""
        for call, _, _, stop, _ in deliveries:
            if stop is not None:
                self._unanswered.pop(call, None)  # type: ignore[arg-type]
        self.work_s += perf_counter() - self._since
        self._post(deliveries)
        self._since = perf_counter()

    def _fail(self, error: EngineError) -> None:
        """Every call ends with an error, and nothing stays cached."""
        failed = list(self._unanswered)
        self._unanswered.clear()
        self.queue.clear()
        self._drop()
        if failed:
            self._post([(call, [], [], None, error) for call in failed])
