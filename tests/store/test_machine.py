"""Random histories on our stores, compared with the model; `scripts/prove-store` runs many more."""

from __future__ import annotations

from contextlib import AsyncExitStack

from hypothesis import HealthCheck, settings

from lightning.rpc import LightningStoreClient, LightningStoreServer
from lightning.store import InMemoryLightningStore
from lightning.store.contract import LightningStore
from lightning.testing.machine import StoreMachine

quick = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


class MemoryMachine(StoreMachine):
    def make_store(self) -> LightningStore:
        return InMemoryLightningStore(clock=self.clock)


class ClientMachine(StoreMachine):
    async def open_store(self, stack: AsyncExitStack) -> LightningStore:
        server = LightningStoreServer(InMemoryLightningStore(clock=self.clock), port=0)
        stack.push_async_callback(server.close)
        await server.start()
        client = LightningStoreClient(server.endpoint)
        stack.push_async_callback(client.close)
        return client


TestMemory = MemoryMachine.TestCase
TestMemory.settings = quick
TestClient = ClientMachine.TestCase
TestClient.settings = settings(quick, max_examples=10)
