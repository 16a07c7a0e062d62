"""Between the records of `lightning.types` and the messages of `lightningpb.v1`, exactly and in both directions.

`…_to_proto` encodes and `…_from_proto` decodes. Encoding raises `TypeError` or `ValueError` for what cannot be stored,
naming the path; decoding raises `ValueError` for what no honest peer sends. Nothing here does I/O or knows of calls.
"""

from __future__ import annotations

from lightning.codec.attributes import MAX_ATTRIBUTE_DEPTH, read_attributes, write_attributes
from lightning.codec.batches import batch_request, chunked, items_in
from lightning.codec.building import DecodedLater, build, decode_many, decode_object, encode_object
from lightning.codec.enums import (
    ATTEMPT_STATUS,
    FILTER_LOGIC,
    ROLLOUT_MODE,
    ROLLOUT_STATUS,
    SORT_ORDER,
    SPAN_STATUS_CODE,
    WORKER_STATUS,
    EnumTable,
)
from lightning.codec.resources import (
    resources_from_proto,
    resources_to_proto,
    update_from_proto,
    update_to_proto,
)
from lightning.codec.results import (
    capabilities_from_proto,
    capabilities_to_proto,
    event_to_proto,
    events_from_proto,
    page_from_proto,
    page_info_to_proto,
    page_to_proto,
    result_from_proto,
    statistics_from_proto,
    statistics_to_proto,
)
from lightning.codec.rollouts import (
    attempt_from_proto,
    attempt_to_proto,
    attempted_rollout_from_proto,
    config_from_proto,
    config_to_proto,
    mode_from_proto,
    mode_to_proto,
    rollout_from_proto,
    rollout_to_proto,
    spec_from_proto,
    spec_to_proto,
)
from lightning.codec.spans import (
    check_span,
    decode_span,
    encode_span,
    span_from_proto,
    span_to_proto,
)
from lightning.codec.updates import (
    attempt_changes_from_proto,
    attempt_changes_to_proto,
    rollout_changes_from_proto,
    rollout_changes_to_proto,
)
from lightning.codec.workers import (
    command_from_proto,
    command_to_proto,
    heartbeat_from_proto,
    heartbeat_to_proto,
    worker_from_proto,
    worker_to_proto,
)

__all__ = [
    "ATTEMPT_STATUS",
    "FILTER_LOGIC",
    "MAX_ATTRIBUTE_DEPTH",
    "ROLLOUT_MODE",
    "ROLLOUT_STATUS",
    "SORT_ORDER",
    "SPAN_STATUS_CODE",
    "WORKER_STATUS",
    "DecodedLater",
    "EnumTable",
    "attempt_changes_from_proto",
    "attempt_changes_to_proto",
    "attempt_from_proto",
    "attempt_to_proto",
    "attempted_rollout_from_proto",
    "batch_request",
    "build",
    "capabilities_from_proto",
    "capabilities_to_proto",
    "check_span",
    "chunked",
    "command_from_proto",
    "command_to_proto",
    "config_from_proto",
    "config_to_proto",
    "decode_many",
    "decode_object",
    "decode_span",
    "encode_object",
    "encode_span",
    "event_to_proto",
    "events_from_proto",
    "heartbeat_from_proto",
    "heartbeat_to_proto",
    "items_in",
    "mode_from_proto",
    "mode_to_proto",
    "page_from_proto",
    "page_info_to_proto",
    "page_to_proto",
    "read_attributes",
    "resources_from_proto",
    "resources_to_proto",
    "result_from_proto",
    "rollout_changes_from_proto",
    "rollout_changes_to_proto",
    "rollout_from_proto",
    "rollout_to_proto",
    "span_from_proto",
    "span_to_proto",
    "spec_from_proto",
    "spec_to_proto",
    "statistics_from_proto",
    "statistics_to_proto",
    "update_from_proto",
    "update_to_proto",
    "worker_from_proto",
    "worker_to_proto",
    "write_attributes",
]
