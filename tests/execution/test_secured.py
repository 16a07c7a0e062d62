"""Jobs whose store asks for certificates and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lightning import InMemoryLightningStore, LightningStore
from lightning.execution import ClientServerExecutionStrategy, ExecutionEvent
from lightning.rpc.tokens import add_token
from tests.rpc.certificates import Authority


class Waits:
    """An algorithm that has one thing done."""

    async def __call__(self, store: LightningStore, event: ExecutionEvent) -> None:
        rollout = await store.enqueue_rollout("task")
        (done,) = await store.wait_for_rollouts(rollout_ids=[rollout.rollout_id], timeout=50)
        assert done.status == "succeeded"


async def work(store: LightningStore, worker_id: int, event: ExecutionEvent) -> None:
    """A runner that does one thing."""
    for rollout in await store.claim_rollouts(timeout=50):
        await store.update_attempt(rollout.rollout_id, rollout.attempt.attempt_id, status="succeeded")


@pytest.mark.parametrize("store", [None, InMemoryLightningStore])
def test_the_processes_of_a_job_are_let_in_by_themselves(tmp_path: Path, store: Any) -> None:
    """Whatever name the certificate is for, and without any token but the job's own."""
    add_token(tmp_path / "tokens.json", "viewer", None, None)
    server_options = Authority(tmp_path).server_options(
        "store.example.org", tls_client_ca=tmp_path / "ca.pem", tokens=tmp_path / "tokens.json"
    )
    strategy = ClientServerExecutionStrategy(role="both", server_options=server_options)
    strategy.execute(Waits(), work, store and store())
