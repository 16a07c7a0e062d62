"""What can be set on a client and on a server, and the channel arguments that follow from it on both sides.

The two sides' keepalive settings must fit each other: a server that finds pings too frequent hangs up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.rpc.address import Endpoint
from lightning.rpc.credentials import PLAIN, Credentials

DEFAULT_MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_LARGEST_MESSAGE_BYTES = 2**31 - 1
"""What protobuf can hold."""

_KEEPALIVE_INTERVAL_MS = 5_500
_KEEPALIVE_TIMEOUT_MS = 3_500
"""Both together are less than the interval of a worker's heartbeats: so soon a dead connection is noticed. Twice the
former is more than it, jitter included: an idle worker pings once between two heartbeats."""
_KEEPALIVE_HEAD_START_MS = 500
"""So much later than a client a server pings, and so much shorter it waits for the answer: whatever arrives puts its
ping off, so that where clients ping it only answers."""
_MIN_PING_INTERVAL_MS = 2_000
"""How often a client may ping before the server takes it for a nuisance."""

_INITIAL_RECONNECT_MS = 100
_MAX_RECONNECT_MS = 1_000
"""gRPC would back off to two minutes; a server that is back should be found at once."""

_READ_AHEAD_BYTES = 1024 * 1024
"""Of one stream, so much may be on its way: 20 MB/s where an answer takes 50 ms. gRPC would find out how much is right
by pings of its own, which on a connection that is seldom used go with nearly each message."""

_MAX_PENDING_CALLS = 16_384
"""Calls that wait to be accepted when thousands of clients come at once; above twice as many, some are turned away."""

ChannelOptions = tuple[tuple[str, Any], ...]

_FLOW_CONTROL: ChannelOptions = (
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _READ_AHEAD_BYTES),
)


@dataclass(frozen=True)
class ClientOptions:
    """See `LightningStoreClient`."""

    retry_delays: tuple[float, ...] = (1.0, 2.0, 5.0)
    health_retry_delays: tuple[float, ...] = (0.1, 0.2, 0.5)
    request_timeout: float = 30.0
    connection_timeout: float = 5.0
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    credentials: Credentials = PLAIN

    def __post_init__(self) -> None:
        object.__setattr__(self, "retry_delays", _check_delays(self.retry_delays, "retry_delays"))
        object.__setattr__(
            self, "health_retry_delays", _check_delays(self.health_retry_delays, "health_retry_delays")
        )
        check_seconds(self.request_timeout, "request_timeout")
        check_seconds(self.connection_timeout, "connection_timeout")
        check_message_bytes(self.max_message_bytes)

    def channel_options(self, endpoint: Endpoint) -> ChannelOptions:
        """The arguments of a channel to `endpoint`."""
        return (
            *_message_limits(self.max_message_bytes),
            *_FLOW_CONTROL,
            *_keepalive(_KEEPALIVE_INTERVAL_MS, _KEEPALIVE_TIMEOUT_MS),
            ("grpc.initial_reconnect_backoff_ms", _INITIAL_RECONNECT_MS),
            ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
            # despite its name: how long one attempt to connect may take
            ("grpc.min_reconnect_backoff_ms", int(self.connection_timeout * 1000)),
            # a proxy for web traffic has no business between processes of one machine
            ("grpc.enable_http_proxy", 0 if endpoint.is_loopback else 1),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.enable_retries", 0),  # this package retries by itself, with request ids
        )


@dataclass(frozen=True)
class ServerLimits:
    """See `LightningStoreServer`."""

    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    max_wait_seconds: float = 60.0
    remembered_seconds: float = 300.0
    remembered_bytes: int = 128 * 1024 * 1024
    max_streams: int = 10_000
    max_in_flight_bytes: int | None = None
    max_calls_per_second: float | None = None
    max_connection_age: float | None = None

    def __post_init__(self) -> None:
        check_message_bytes(self.max_message_bytes)
        check_seconds(self.max_wait_seconds, "max_wait_seconds")
        check_seconds(self.remembered_seconds, "remembered_seconds")
        if not _is_whole(self.remembered_bytes) or self.remembered_bytes < 0:
            raise ValueError(f"remembered_bytes must be a number of bytes, not {self.remembered_bytes!r}")
        if not _is_whole(self.max_streams) or self.max_streams < 1:
            raise ValueError(f"max_streams must be a number of streams, 1 or more, not {self.max_streams!r}")
        most = self.max_in_flight_bytes
        if most is not None and (not _is_whole(most) or most < self.max_message_bytes):
            raise ValueError(
                f"max_in_flight_bytes must be at least max_message_bytes ({self.max_message_bytes}), or no such "
                f"message would ever be taken, not {most!r}"
            )
        if self.max_connection_age is not None:
            check_seconds(self.max_connection_age, "max_connection_age")
        rate = self.max_calls_per_second
        if rate is not None and (not _is_number(rate) or not 0 < rate < math.inf):
            raise ValueError(f"max_calls_per_second must be a positive number, not {rate!r}")

    @property
    def in_flight_bytes(self) -> int:
        """`max_in_flight_bytes`, which unless given is room for four of the largest messages."""
        return self.max_in_flight_bytes or 4 * self.max_message_bytes

    def channel_options(self, *, share_port: bool = False) -> ChannelOptions:
        """The arguments of a server; `share_port`: of one of several at the same port."""
        age = self.max_connection_age
        # a stream that is opened at the last moment ends by itself at that age, when it has answered what waits
        grace = (age or 0) + self.max_wait_seconds
        ages = () if age is None else (("max_connection_age_ms", age), ("max_connection_age_grace_ms", grace))
        return (
            *((f"grpc.{name}", math.ceil(seconds * 1000)) for name, seconds in ages),
            *_message_limits(self.max_message_bytes),
            # unless several are asked for, a second server would start silently on the same port
            ("grpc.so_reuseport", int(share_port)),
            *_FLOW_CONTROL,
            *_keepalive(
                _KEEPALIVE_INTERVAL_MS + _KEEPALIVE_HEAD_START_MS,
                _KEEPALIVE_TIMEOUT_MS - _KEEPALIVE_HEAD_START_MS,
            ),
            ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
            ("grpc.server.max_pending_requests", _MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", 2 * _MAX_PENDING_CALLS),
        )


def check_seconds(value: Any, name: str) -> None:
    """Raises `ValueError` unless `value` is a positive, finite number of seconds."""
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number of seconds, not {value!r}")


def check_message_bytes(value: Any) -> None:
    """Raises `ValueError` unless `value` is a size that a message may have."""
    if not _is_whole(value) or not 0 < value <= _LARGEST_MESSAGE_BYTES:
        raise ValueError(
            f"max_message_bytes must be a number of bytes between 1 and {_LARGEST_MESSAGE_BYTES}, not {value!r}"
        )


def _message_limits(max_message_bytes: int) -> ChannelOptions:
    # what is sent is limited by who receives it, who says so in words; a sender's own limit would say less
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
    )


def _keepalive(interval_ms: int, timeout_ms: int) -> ChannelOptions:
    return (
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        # without this it is a minute, whatever the line above says: keepalive's pings are timed like any other
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )


def _check_delays(delays: Sequence[float], name: str) -> tuple[float, ...]:
    if isinstance(delays, str) or not all(_is_number(delay) and 0 <= delay < math.inf for delay in delays):
        raise ValueError(f"{name} must be a sequence of seconds, 0 or more each, not {delays!r}")
    return tuple(float(delay) for delay in delays)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
