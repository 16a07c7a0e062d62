"""Where spans that are made with the plain OpenTelemetry API go: to the attempt in whose context they were started.

One span processor serves the process. It is attached to the global tracer provider; if the program has not set one,
one of ours becomes it. Tracers that were obtained before that work too: OpenTelemetry's are proxies until then.

Which attempt a span belongs to is decided when it starts: that of its parent, if the parent is open in this process
(however the parent was handed over); else the attempt in whose context (`contextvars`) the code runs, which asyncio
tasks inherit, as do threads that are started with a copied context; else the one whose trace it continues.
"""

from __future__ import annotations

import logging
import threading
from contextvars import ContextVar, Token
from typing import Protocol
from weakref import WeakSet

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON

logger = logging.getLogger(__name__)


class SpanTarget(Protocol):
    """Something that takes the ended spans of one attempt."""

    @property
    def otel_trace_id(self) -> int:
        """The trace that the attempt's spans belong to, unless they continue another."""

    @property
    def open(self) -> bool:
        """Whether it still takes spans."""

    def put(self, span: ReadableSpan) -> None:
        """Take a span; called from any thread, must not block."""


_current: ContextVar[SpanTarget | None] = ContextVar("lightning_span_target", default=None)
_by_open_span: dict[int, SpanTarget] = {}
_by_trace: dict[int, SpanTarget] = {}


class _AttemptIdGenerator(RandomIdGenerator):
    """Gives the root spans of an attempt one trace, without a parent that would be no real span."""

    def generate_trace_id(self) -> int:
        target = _current.get()
        return super().generate_trace_id() if target is None else target.otel_trace_id


class _AttemptSpanProcessor(SpanProcessor):
    def on_start(self, span: Span, parent_context: otel_context.Context | None = None) -> None:
        context = span.get_span_context()
        target = None if span.parent is None else _by_open_span.get(span.parent.span_id)
        if target is None or not target.open:
            target = _current.get()
        if (target is None or not target.open) and context is not None:
            target = _by_trace.get(context.trace_id)
        if target is not None and context is not None:
            _by_open_span[context.span_id] = target

    def on_end(self, span: ReadableSpan) -> None:
        context = span.get_span_context()
        target = None if context is None else _by_open_span.pop(context.span_id, None)
        if target is not None:
            target.put(span)


_lock = threading.RLock()
_attached: WeakSet[object] = WeakSet()
_own: TracerProvider | None = None


def own_provider() -> TracerProvider:
    """The product's tracer provider: samples everything, drops nothing, and feeds the attempts."""
    global _own  # noqa: PLW0603  # one per process, as the global provider of OpenTelemetry is
    with _lock:
        if _own is None:
            unlimited = SpanLimits.UNSET
            _own = TracerProvider(
                sampler=ALWAYS_ON,
                shutdown_on_exit=False,
                id_generator=_AttemptIdGenerator(),
                # what an agent did is training data: no attribute is cut and no event left out
                span_limits=SpanLimits(*(unlimited,) * 8),
            )
            _own.add_span_processor(_AttemptSpanProcessor())
            _attached.add(_own)
        return _own


def install() -> None:
    """See to it that the spans of OpenTelemetry's global tracer provider reach the attempts. Cheap to repeat."""
    if trace.get_tracer_provider() in _attached:
        return
    with _lock:
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):  # nobody has set one
            trace.set_tracer_provider(own_provider())
        provider = trace.get_tracer_provider()
        if provider in _attached:
            return
        _attached.add(provider)
        add = getattr(provider, "add_span_processor", None)
        if add is not None:
            add(_AttemptSpanProcessor())
            return
    logger.warning(
        "spans made through OpenTelemetry's global API are not recorded: its tracer provider is a %s, "
        "which takes no span processors; set an opentelemetry.sdk.trace.TracerProvider instead, or none",
        type(provider).__name__,
    )


def enter(target: SpanTarget) -> tuple[Token[SpanTarget | None], object]:
    """Make `target` the one of the current context, in which no span is open. Returns what `leave` needs."""
    _by_trace[target.otel_trace_id] = target
    # whatever span the runner itself runs in is not the agent's parent, and its trace would be shared by all attempts
    return _current.set(target), otel_context.attach(otel_context.Context())


def leave(target: SpanTarget, tokens: tuple[Token[SpanTarget | None], object]) -> None:
    """Undo `enter`, in the same context."""
    token, otel_token = tokens
    otel_context.detach(otel_token)  # type: ignore[arg-type]  # older releases type the token as object
    _current.reset(token)
    _by_trace.pop(target.otel_trace_id, None)


def forget(target: SpanTarget) -> None:
    """Drop what is remembered of `target`'s spans that were never ended."""
    for span_id in [span_id for span_id, owner in list(_by_open_span.items()) if owner is target]:
        _by_open_span.pop(span_id, None)


def current_target() -> SpanTarget | None:
    """The target of the current context, if it still takes spans."""
    target = _current.get()
    return target if target is not None and target.open else None
