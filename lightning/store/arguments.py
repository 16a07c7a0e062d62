"""Checking what callers hand in, once, in the words of the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.store.contract import UnknownIdError
from lightning.store.numbers import check_count as check_count
from lightning.store.numbers import check_time as check_time
from lightning.store.records import ConfigRecord
from lightning.store.texts import check_text
from lightning.store.texts import check_worker_id as check_worker_id
from lightning.types import EnqueueRolloutRequest, RolloutConfig

ROLLOUT_STATUSES = ("queuing", "preparing", "running", "succeeded", "failed", "requeuing", "cancelled")
ATTEMPT_STATUSES = ("preparing", "running", "succeeded", "failed", "timeout", "unresponsive", "cancelled")
MODES = ("train", "val", "test")
WORKER_STATUSES = ("idle", "busy", "unknown")


def quote(text: str) -> str:
    """An identifier as it appears in an error message, shortened if it is absurdly long."""
    return repr(text if len(text) <= 200 else text[:200] + "…") if isinstance(text, str) else repr(text)


def unknown_rollout(rollout_id: str, why: str | None = None) -> UnknownIdError:
    return UnknownIdError(f"unknown rollout {quote(rollout_id)}" + (f": {why}" if why else ""))


def unknown_attempt(rollout_id: str, attempt_id: str) -> UnknownIdError:
    return UnknownIdError(f"unknown attempt {quote(attempt_id)} of rollout {quote(rollout_id)}")


def unknown_resources(resources_id: str) -> UnknownIdError:
    return UnknownIdError(f"unknown resources {quote(resources_id)}")


def check_resources_id(resources_id: Any) -> str | None:
    return None if resources_id is None else check_text(resources_id, "resources_id")


def config_record(config: RolloutConfig | None) -> ConfigRecord:
    if config is not None and not isinstance(config, RolloutConfig):
        raise TypeError(f"config must be a RolloutConfig, not {type(config).__name__}")
    return ConfigRecord.of(config)


def check_requests(rollouts: Sequence[Any]) -> None:
    for index, request in enumerate(rollouts):
        if not isinstance(request, EnqueueRolloutRequest):
            raise TypeError(
                f"rollouts[{index}] must be an EnqueueRolloutRequest, not {type(request).__name__}"
            )


def require_choice(value: Any, choices: Sequence[str], name: str) -> Any:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def check_choice(value: Any, choices: Sequence[str], name: str) -> Any:
    return None if value is None else require_choice(value, choices, name)
