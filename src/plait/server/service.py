"""What lives as long as the server: open engines, limits, counters, the runs that are looked at; and one request's run.

Knows nothing of HTTP and of the shapes of its bodies.
"""

from __future__ import annotations

import secrets
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import anyio

from plait import tasks
from plait.engines import is_address
from plait.engines.affinity import affinity
from plait.engines.base import Engine
from plait.errors import EngineUnavailable, ModelError, RequestError, UnsupportedJoin, nearest
from plait.events import Event, RunEnded, SegmentEnded, TokensSampled
from plait.formats.base import TrajectoryFormat
from plait.models import Model
from plait.server.admission import Admission, Lane, Lease
from plait.server.answer import Answer, answer_of
from plait.server.config import ServeConfig
from plait.server.keys import Client, cache_salt
from plait.server.metrics import JoinWaits, Metrics
from plait.server.refusal import Refusal, body_of, without_addresses
from plait.server.schemas import PlaitOptions, SampledRequest
from plait.server.traces import Trace, Traces
from plait.server.transcript import ROOT, Piece
from plait.session import Run, open_run
from plait.spelling import Spelling, describe
from plait.tree import Tree
from plait.types import Request, StopReason

if TYPE_CHECKING:
    from plait.server.spans import Spans

FINISH = {StopReason.EOS: "stop", StopReason.STOP: "stop", StopReason.LENGTH: "length", StopReason.BUDGET: "length"}
"""OpenAI's words for how a run ended; everything else is `stop`, and the `plait` block says more."""
DEFAULT_THREADS = 32
"""Places, where neither the config nor an engine says how many."""


@dataclass(slots=True, kw_only=True)
class Served:
    """A model that the server answers with."""

    model: Model
    engine_name: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Of its engine, beside what the limits ask for."""
    twin: str | None = None
    """Name of the served model that is its sequential twin."""
    engine: Engine | None = None
    """Open while the server runs."""
    format: TrajectoryFormat = field(init=False)

    def __post_init__(self) -> None:
        self.format = self.model.format

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def engine_label(self) -> str:
        """What others may know of the engine: never an address."""
        return "http" if is_address(self.engine_name) else self.engine_name

    def about(self) -> dict[str, Any]:
        """What `/v1/models` says of it beside its name."""
        model = self.model
        return {
            "id": model.id,
            "format": model.format_name,
            "join": model.join,
            "families": list(model.families),
            "plain": model.plain,
            "max_context": model.max_context,
            "weights": model.num_weights,
            "dtype": model.dtype,
            "engine": self.engine_label,
            "twin": self.twin,
        }


class Service:
    """Models, and the way to run one.

    Args:
        config: Limits.
        served: At least one; the first is what a request gets that names none.
    """

    def __init__(self, config: ServeConfig, served: Sequence[Served]) -> None:
        if not served:
            raise RequestError("there is no model to serve")
        self.config = config
        self.served = {one.name: one for one in served}
        if len(self.served) < len(served):
            raise RequestError(f"two models have the same name: {', '.join(one.name for one in served)}")
        self.default = served[0]
        self.admission = Admission(
            max_threads=config.max_threads or DEFAULT_THREADS,
            max_threads_per_key=config.max_threads_per_key,
            max_requests=config.max_requests,
            max_requests_per_key=config.max_requests_per_key,
        )
        self.metrics = Metrics(self.admission, self._stats)
        self.traces = Traces(config.keep_runs)
        self.spans = _spans(config, self.metrics)
        self._secret = config.cache_secret or secrets.token_hex(32)
        self.ready = False
        self.stopping = anyio.Event()
        """Set when the time to drain is over: what still runs is ended."""

    def _stats(self) -> list[Any]:
        return [(s.name, s.engine_label, s.engine.stats()) for s in self.served.values() if s.engine is not None]

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[None, None]:
        """Open every engine; on leaving, close them.

        Raises:
            UnsupportedJoin: An engine cannot join as its model was trained to.
            EngineError: An engine cannot be opened.
        """
        async with AsyncExitStack() as stack:
            for one in self.served.values():
                options = {**_engine_options(one, self.config), **self.config.options(), **one.options}
                one.engine = await stack.enter_async_context(one.model.open_engine(one.engine_name, **options))
                if one.model.join == "merge" and not one.engine.supports_merge:
                    raise UnsupportedJoin(
                        f"{one.name} joins threads by merging their keys and values; the {one.engine_label} engine"
                        " takes plain token sequences only"
                    )
            if self.config.max_threads is None:
                told = [getattr(one.engine, "max_active", None) for one in self.served.values()]
                self.admission.max_threads = min((n for n in told if n), default=DEFAULT_THREADS)
            if self.spans is not None:
                await stack.enter_async_context(self.spans.sending())
            self.ready = True
            try:
                yield
            finally:
                self.ready = False
                for one in self.served.values():
                    one.engine = None

    def find(self, name: str | None) -> Served:
        """The model that a request names.

        Raises:
            Refusal: 404, none has this name; the message lists those that are served.
        """
        if not name:
            return self.default
        if name not in self.served:
            text = str(nearest(name[:100], list(self.served), "model"))
            raise Refusal(text, status=404, code="model_not_found", param="model")
        return self.served[name]

    def in_line(self, served: Served) -> Served | None:
        """Who answers in one line where this model may not fork.

        Its sequential twin, which thinks so always. None where it has none that reads its prompts, or where its own
        weights were trained to be told so.
        """
        twin = self.served.get(served.twin or "")
        same = twin is not None and twin.model.tokenizer.tokens == served.model.tokenizer.tokens
        return twin if same and served.model.levels is None else None

    @asynccontextmanager
    async def job(
        self, served: Served, request: Request, *, asked: Asked, trace: Trace | None = None
    ) -> AsyncGenerator[Job, None]:
        """Run a request; leaving the block ends it and frees its threads.

        Args:
            asked: By whom.
            trace: Where its events are kept.

        Raises:
            Refusal: The server is full.
            RequestError, EngineError: See `plait.session.open_run`.
        """
        with self.lane(served, asked) as (lane, lease):
            async with _opened_job(asked, served, lane, lease, request, trace) as job:
                yield job

    def lane_on(self, served: Served, lease: Lease) -> Lane:
        """A model's engine as an admitted request sees it.

        Raises:
            EngineUnavailable: It is not open.
        """
        if served.engine is None:
            raise EngineUnavailable("the server is not ready")
        return Lane(served.engine, self.admission, lease, vocab_size=len(served.model.tokenizer.tokens))

    @contextmanager
    def lane(self, served: Served, asked: Asked) -> Iterator[tuple[Lane, Lease]]:
        """A model's engine as one request may use it.

        Raises:
            Refusal: The server is full.
            EngineUnavailable: It is not open.
            EngineTimeout: It said nothing for too long.
        """
        try:
            salt = cache_salt(asked.client, self._secret)
            with (
                self.admission.admitted(asked.client) as lease,
                # One for all calls of the request, so that its forks find what it has computed.
                affinity(f"plait-{secrets.token_hex(8)}", cache_salt=salt),
            ):
                with lease.scope:
                    yield self.lane_on(served, lease), lease
                if lease.failure is not None and lease.scope.cancelled_caught:
                    raise lease.failure
        except Refusal as exc:
            self.metrics.rejections.labels(exc.code).inc()
            raise


@asynccontextmanager
async def _opened_job(
    asked: Asked, served: Served, lane: Lane, lease: Lease, request: Request, trace: Trace | None
) -> AsyncGenerator[Job, None]:
    said: dict[str, Any] = {}
    if served.model.join != "none" and not lease.may_fork:
        asked.service.metrics.declined.inc()
        said["forks_declined"] = "the server is busy"
        twin = asked.service.in_line(served)
        if twin is None:
            # A fork id is then not sampled at all: the model goes on in one line.
            request = replace(request, budget=replace(request.budget, max_threads=0))
        else:
            served, lane = twin, asked.service.lane_on(twin, lease)
            said["answered_by"] = twin.name
    meta = {"model": served.model.id} if trace is None else _meta(served, request, trace)
    job = Job(asked, served, lease, trace, request=request, said=said)
    failure: BaseException | None = None
    try:
        async with open_run(request, engine=lane, format=served.format, meta=meta) as job.run:
            yield job
    except BaseException as exc:
        failure = lease.failure or exc
        raise
    finally:
        job.end(failure)


class Job:
    """One run of a request: iterate over it for its events."""

    run: Run
    served: Served
    """Who answers: the model that was asked, or its twin where forks were declined."""

    def __init__(
        self,
        asked: Asked,
        served: Served,
        lease: Lease,
        trace: Trace | None,
        *,
        request: Request,
        said: dict[str, Any],
    ) -> None:
        self.served, self._request = served, request
        self._asked, self._service, self._lease, self._trace = asked, asked.service, lease, trace
        self._events: list[Event] | None = None if asked.service.spans is None else []
        self._epoch = time.time()
        self._said = said
        self._waits = JoinWaits(asked.service.metrics)
        self._sampled = False
        self.wall_s = 0.0

    @property
    def tree(self) -> Tree:
        return self.run.tree

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        event = await anext(aiter(self.run))
        self._take(event)
        return event

    def _take(self, event: Event) -> None:
        if self._trace is not None:
            self._trace.write(event)
        if self._events is not None:
            self._events.append(event)
        if not self._sampled and isinstance(event, TokensSampled):
            self._sampled = True
            self._service.metrics.first_token.observe(time.perf_counter() - self._asked.started)
        self._waits.read(event)

    def end(self, failure: BaseException | None) -> None:
        """Count it, and close its trace."""
        self.wall_s = time.perf_counter() - self._asked.started
        metrics = self._service.metrics
        if hasattr(self, "run"):
            for event in self.run.pending():
                if isinstance(event, SegmentEnded | RunEnded):
                    # Of a run that failed these say why.
                    event = replace(event, note=without_addresses(event.note))
                self._take(event)
            metrics.observe(self.tree, engine=self.served.engine_label)
            metrics.latency.observe(self.wall_s)
            if self._service.spans is not None and self._events:
                self._service.spans.offer(self._events, epoch=self._epoch, parent=self._asked.traceparent)
        if self._trace is None:
            return
        if isinstance(failure, Exception):
            self._trace.end([("error", body_of(failure))])
        elif not hasattr(self, "run") or self.tree.stop is None:
            self._trace.end([("error", body_of(Refusal("the run was left", status=499, code="cancelled")))])
        else:
            about = {**self.usage(), **asdict(self.tree.usage()), "stop": str(self.tree.stop)}
            answer = self.served.model.answer(self.tree)
            if self.served.model.plain:
                answer = self._answered(without=self.served.format.eos_ids()).strip() or None
            self._trace.end([("usage", {**about, "answer": answer, "wall_s": round(self.wall_s, 6)}), ("end", {})])

    def tokens(self) -> dict[str, Any]:
        """Usage as OpenAI counts it, all that was sampled in all threads; and what its fields cannot say."""
        usage = self.tree.usage()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.sampled_tokens,
            "total_tokens": usage.prompt_tokens + usage.sampled_tokens,
            "plait": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """The `plait` block of usage."""
        usage = self.tree.usage()
        return {
            "critical_path_tokens": usage.critical_path_tokens,
            "threads": usage.threads,
            "forks": usage.forks,
            "max_concurrency": self._lease.peak,
            "acceleration": round(self.tree.acceleration(), 4),
            "longest_context_tokens": usage.longest_context_tokens,
            "forced_tokens": usage.forced_tokens,
            "reread_tokens": usage.reread_tokens,
        }

    def about(self) -> dict[str, Any]:
        """The `plait` block of a response: how the run ended, where OpenAI's words are too few."""
        tree = self.tree
        data: dict[str, Any] = {"stop": str(tree.stop or StopReason.STOP), **self._said}
        # Limits and tags that the run went on from are no part of how it ended.
        limits = [s.note for s in tree.segments.values() if s.stop in (StopReason.BUDGET, StopReason.MALFORMED)]
        met = dict.fromkeys(note for note in limits if note not in tree.note)
        if note := "; ".join(filter(None, (*met, tree.note))):
            data["note"] = note
        if self._trace is not None:
            data["run_id"] = self._trace.id
        return data

    @property
    def finish(self) -> str:
        """OpenAI's finish reason."""
        return FINISH.get(self.tree.stop or StopReason.STOP, "stop")

    def answer(self, stops: Sequence[str] = ()) -> Answer:
        """What tells its answer from its reasoning."""
        return answer_of(self.served.model, self.served.format, self._request.prompt_ids, stops)

    def answer_tokens(self) -> int:
        """Sampled tokens of the answer, which is the end of the text; the others are reasoning."""
        decode = self.served.model.tokenizer.decode
        ids = [id for s in self.tree.segments.values() if s.thread == ROOT for id in s.sampled_ids]
        left = len(self._answered())
        # Together, for a character may have several tokens.
        return bisect_right(range(len(ids)), left, key=lambda n: len(decode(ids[len(ids) - n - 1 :])))

    def _answered(self, *, without: Collection[int] = ()) -> str:
        """What the root thread sampled of the answer, but for some ids."""
        answer, decode = self.answer(), self.served.model.tokenizer.decode
        said: list[str] = []
        for segment in self.tree.segments.values():
            if segment.thread == ROOT:
                said.append(answer.put(Piece(thread=ROOT, kind="join"))[1])
                text = decode([id for id in segment.sampled_ids if id not in without])
                said.append(answer.put(Piece(thread=ROOT, kind="text", text=text))[1])
        return "".join([*said, answer.put(Piece(thread=ROOT, kind="close"))[1]])


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who asks, and since when."""

    service: Service
    client: Client
    request_id: str
    started: float
    """By `time.perf_counter`."""
    traceparent: str | None = None
    """The caller's span, as W3C's header says it."""

    def request(
        self,
        served: Served,
        question: str | list[dict[str, str]] | tuple[int, ...],
        *,
        param: str,
        body: SampledRequest,
        max_tokens: int | None = None,
    ) -> Request:
        """A question as a request within the server's limits.

        Args:
            question: In words; of a plain model also a conversation; or ids, which are taken as they are.
            param: The field that it came from.
            body: What was said of sampling, and of the run.
            max_tokens: Of the run, in the words of its route.

        Raises:
            Refusal: 400, the model does not know such questions, cannot write them as a prompt, or has another format.
        """
        model, options = served.model, body.plait
        if options.format not in (None, model.format_name):
            raise Refusal(
                f"{model.name} was trained in the {model.format_name} format and is not run in {options.format!r}",
                code="format_mismatch",
                param="plait.format",
            )
        settings: dict[str, Any] = {
            "budget": options.within(self.service.config.budget(plain=model.plain), max_tokens=max_tokens),
            "temperature": self.service.config.temperature if body.temperature is None else body.temperature,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "top_k": max(0, body.top_k or 0),
            "seed": secrets.randbits(63) if body.seed is None else body.seed,
            # Only a trace shows log-probabilities.
            "logprobs": options.trace,
        }
        if options.conditioned is not None:
            if options.conditioned and model.levels is None:
                raise Refusal(f"{model.name} was not trained to read a budget in its prompt", param="plait.conditioned")
            settings["conditioned"] = options.conditioned
        if isinstance(question, tuple):
            return Request(prompt_ids=question, **settings)
        try:
            return model.request(question, **settings)
        except RequestError as exc:
            code = "unwritable_prompt" if model.plain else "unknown_question"
            raise Refusal(str(exc), code=code, param=param) from exc
        except ModelError as exc:
            # A template that cannot write this conversation; it says why, and not where it lies.
            raise Refusal(str(exc).replace(str(model.path), model.name), code="unwritable_prompt", param=param) from exc

    def trace(self, served: Served, question: str, options: PlaitOptions) -> Trace | None:
        """Where the run's events go, if it was asked for."""
        if not options.trace:
            return None
        id = f"run_{secrets.token_hex(12)}"
        spelling = Spelling(served.model.tokenizer)
        trace = Trace(id=id, client=self.client.name, model=served.name, question=question[:2000], spelling=spelling)
        self.service.traces.add(trace)
        return trace


def checked_ids(ids: Sequence[int], served: Served, param: str) -> tuple[int, ...]:
    """A client's own ids: in the vocabulary, and none that controls, but for the one that opens a prompt."""
    tokenizer = served.model.tokenizer
    for number, id in enumerate(ids):
        if not 0 <= id < len(tokenizer.tokens):
            raise Refusal(f"token id {id} is not in the vocabulary of {len(tokenizer.tokens)}", param=param)
        text = tokenizer.tokens[id]
        if text in tokenizer.control and not (number == 0 and id in tokenizer.bos_ids):
            raise Refusal(f"token id {id} is {text}, a control token; a prompt has none", param=param)
    return tuple(ids)


def _meta(served: Served, request: Request, trace: Trace) -> dict[str, Any]:
    """What a trace's first line says: what the logs of `plait solve` say."""
    model = served.model
    asked = {"question": trace.question}
    if model.plain:
        asked |= {"family": "text", "prompt": trace.question}
    else:
        with suppress(RequestError):
            problem = tasks.parse(trace.question, model.families)
            asked = {"question": problem.question, "family": problem.family, "prompt": problem.prompt}
    return {
        **asked,
        "model": model.id,
        "temperature": request.temperature,
        "tokenizer": describe(model.tokenizer, served.format.tags()),
    }


def _spans(config: ServeConfig, metrics: Metrics) -> Spans | None:
    if config.otlp_endpoint is None:
        return None
    from plait.server.spans import Spans

    return Spans(config.otlp_endpoint, metrics)


def _engine_options(served: Served, config: ServeConfig) -> dict[str, Any]:
    """Room for as many threads as may sample at once."""
    if served.engine_name != "llamacpp":
        return {}
    # Each request also holds the context that its threads come from.
    threads = config.max_threads or DEFAULT_THREADS
    room = {"max_seqs": min(256, 2 * threads)}
    # What a thread of Plait's own models needs is known; of others the engine takes the context they were made for.
    return room if served.model.plain else room | {"cells": max(4096, 256 * threads)}
