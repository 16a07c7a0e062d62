"""MongoDB's documents have room for 16 MB: what is larger rests elsewhere, or is refused and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from server import Mongod

from lightning.store import lifecycle
from lightning.store.mongo import MongoLightningStore
from lightning.store.persistence.mongo.backend import MongoPersistence
from lightning.store.records import ConfigRecord, RolloutRecord
from lightning.testing import make_span
from lightning.types import PromptTemplate

pytestmark = pytest.mark.anyio

LARGE = "x" * 17_000_000
MANY_ATTEMPTS, TOO_MANY_ATTEMPTS = 3_000, 90_000


async def test_large_payloads_rest_beside_the_document(replica_set: Mongod, partition: str) -> None:
    store = MongoLightningStore(replica_set.uri, partition_id=partition)
    prompt = PromptTemplate(template=LARGE[:100_000], engine="f-string")
    await store.add_resources({"prompt": prompt})
    rollout = await store.start_rollout({"text": LARGE}, metadata={"text": LARGE[:100_000]})
    await store.add_span(make_span(rollout, attributes={"text": LARGE}))
    await store.update_rollout(rollout.rollout_id, metadata={"text": "small again"})
    await store.close()

    other = MongoLightningStore(replica_set.uri, partition_id=partition)
    stored = await other.get_rollout_by_id(rollout.rollout_id)
    assert stored is not None
    assert stored.input == {"text": LARGE}
    assert stored.metadata == {"text": "small again"}
    (span,) = await other.query_spans(rollout.rollout_id)
    assert span.attributes["text"] == LARGE
    latest = await other.get_latest_resources()
    assert latest is not None
    assert latest.resources["prompt"] == prompt
    await other.close()


def begin(attempts: int) -> Callable[[RolloutRecord], RolloutRecord]:
    """So many attempts, one after the other."""

    def transition(record: RolloutRecord) -> RolloutRecord:
        first = lifecycle.begin_attempt(record, "at-0", "w-1", None, 1.0).attempts[-1]
        more = tuple(
            first._replace(attempt_id=f"at-{number}", sequence_id=number + 1, status="failed", end_time=2.0)
            for number in range(attempts)
        )
        return record._replace(status="running", attempts=more)

    return transition


@pytest.fixture
def mongod(replica_set: Mongod) -> Mongod:
    """Here one kind is enough."""
    return replica_set


async def test_a_rollout_has_room_for_thousands_of_attempts(backend: MongoPersistence) -> None:
    await backend.insert_rollouts(
        [RolloutRecord("ro-1", b"1", "queuing", 1.0, ConfigRecord(None, None, 1, ()))]
    )
    await backend.change_rollout("ro-1", begin(MANY_ATTEMPTS))
    change = await backend.change_rollout(
        "ro-1", lambda record: lifecycle.begin_attempt(record, "at-next", None, None, 3.0)
    )
    assert change is not None
    stored = await backend.get_rollout_of_attempt("at-next")
    assert stored == change.after
    assert len(change.after.attempts) == MANY_ATTEMPTS + 1
    totals = await backend.totals()
    assert totals.attempts_by_status == {"failed": MANY_ATTEMPTS, "preparing": 1}


async def test_one_more_than_fits_is_refused_and_changes_nothing(backend: MongoPersistence) -> None:
    (before,) = await backend.insert_rollouts(
        [RolloutRecord("ro-1", b"1", "queuing", 1.0, ConfigRecord(None, None, 1, ()))]
    )
    with pytest.raises(ValueError, match=r"ro-1.*cannot be stored in MongoDB.*16 MiB"):
        await backend.change_rollout("ro-1", begin(TOO_MANY_ATTEMPTS))
    assert await backend.get_rollout("ro-1") == before
    change = await backend.change_rollout("ro-1", begin(1))
    assert change is not None
