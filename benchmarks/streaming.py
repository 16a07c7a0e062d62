"""One client process that streams spans, and what the protobuf of the same spans costs alone.

python -m benchmarks.streaming ADDRESS N     streams N spans of 1 KB to a store
python -m benchmarks.streaming alone N       builds, serialises and parses the same, and sends them nowhere

Prints spans per second, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from lightningpb.v1 import span_pb2
from lightningpb.v1 import store_service_pb2 as pb

import lightning
from benchmarks.shared.store_bench import spans_of

SPAN_BYTES = 1024
_CALLERS = 16
_SPANS_PER_CALL = 64


async def stream(address: str, n: int) -> float:
    """Spans per second, from the records that a user has to the acknowledgement of the last."""
    client = lightning.LightningStoreClient(address)
    rollout = await client.start_rollout(input={})
    ids = (rollout.rollout_id, rollout.attempt.attempt_id)
    spans = spans_of(lightning, *ids, range(1, n + 1), SPAN_BYTES)
    pieces = iter([spans[first : first + _SPANS_PER_CALL] for first in range(0, n, _SPANS_PER_CALL)])
    stored = 0

    async def caller() -> None:
        nonlocal stored
        for piece in pieces:
            count = await client.deliver_spans(piece)
            stored += count

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(_CALLERS)))
    seconds = time.perf_counter() - started
    await client.close()
    if stored != n:
        raise RuntimeError(f"{n} spans were sent, {stored} stored")
    return n / seconds


def alone(n: int) -> float:
    """Spans per second that protobuf builds from plain values, serialises and parses, in batches as they travel."""
    spans = spans_of(lightning, "ro-0123456789abcdef", "at-0123456789abcdef", range(1, n + 1), SPAN_BYTES)
    started = time.perf_counter()
    for first in range(0, n, _SPANS_PER_CALL):
        batch = pb.StreamSpansRequest.Batch(batch_sequence=first + 1)
        for span in spans[first : first + _SPANS_PER_CALL]:
            fill(batch.spans.add(), span)
        pb.StreamSpansRequest.FromString(pb.StreamSpansRequest(batch=batch).SerializeToString())
    return n / (time.perf_counter() - started)


def fill(message: span_pb2.Span, span: lightning.Span) -> None:
    """Set what a span of the benchmark has, as protobuf is used by hand, with nothing checked."""
    message.rollout_id = span.rollout_id
    message.attempt_id = span.attempt_id
    message.sequence_id = span.sequence_id
    message.trace_id = span.trace_id
    message.span_id = span.span_id
    message.name = span.name
    message.start_time = span.start_time or 0.0
    message.end_time = span.end_time or 0.0
    message.status.code = span_pb2.STATUS_CODE_OK
    context = span.context
    if context is not None:
        message.context.trace_id = context.trace_id
        message.context.span_id = context.span_id
    for key, value in span.attributes.items():
        attribute = message.attributes.add()
        attribute.key = key
        if isinstance(value, bool):
            attribute.value.bool_value = value
        elif isinstance(value, int):
            attribute.value.int_value = value
        elif isinstance(value, float):
            attribute.value.double_value = value
        else:
            attribute.value.string_value = value


if __name__ == "__main__":
    where, count = sys.argv[1], int(sys.argv[2])
    rate = alone(count) if where == "alone" else asyncio.run(stream(where, count))
    print(json.dumps({"spans": rate}))
