"""The suite as such: nothing in it hides, and time in it behaves."""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter

import pytest

from lightning.store.contract import LightningStore
from lightning.store.forwarding import STREAM_VERBS, VERBS
from lightning.testing import (
    ClockedStoreContractSuite,
    EvictionContract,
    FakeClock,
    LaxResourcesContract,
    ResumedWatchContract,
    RunnerContract,
    StoreContractSuite,
    StoreTheme,
    contract,
)


class Everything(
    ClockedStoreContractSuite,
    StoreContractSuite,
    RunnerContract,
    ResumedWatchContract,
    EvictionContract,
    LaxResourcesContract,
):
    """All themes together."""


def test_no_test_hides_another() -> None:
    names = Counter(name for theme in Everything.__mro__ for name in vars(theme) if name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
    assert len(names) > 200


def test_every_theme_is_in_a_suite() -> None:
    themes = {
        member
        for _, member in inspect.getmembers(contract, inspect.isclass)
        if issubclass(member, StoreTheme)
    }
    assert themes <= set(Everything.__mro__)


def test_every_verb_is_called_by_the_suite() -> None:
    sources = "".join(inspect.getsource(inspect.getmodule(theme)) for theme in Everything.__mro__[1:-1])  # type: ignore[arg-type]
    assert [verb for verb in (*VERBS, *STREAM_VERBS) if f"store.{verb}(" not in sources] == []


def test_a_suite_without_a_store_says_what_is_missing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        from lightning.testing import StoreContractSuite

        class TestForgetful(StoreContractSuite):
            pass
        """
    )
    result = pytester.runpytest_inprocess("-k", "test_the_oldest_comes_first", "-p", "no:cacheprovider")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*TestForgetful must define the fixture `store`*"])


def test_a_failure_shows_what_was_compared(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import pytest
        from lightning.store import InMemoryLightningStore
        from lightning.testing import StoreContractSuite

        class Backwards(InMemoryLightningStore):
            async def dequeue_many_rollouts(self, **arguments):
                return [rollout for rollout in await super().dequeue_many_rollouts(**arguments)][::-1]

        class TestBackwards(StoreContractSuite):
            @pytest.fixture
            async def store(self):
                store = Backwards()
                yield store
                await store.close()
        """
    )
    result = pytester.runpytest_inprocess(
        "-k", "test_many_are_claimed_up_to_the_limit", "-p", "no:cacheprovider"
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*At index 0 diff: 'ro-*"])


# --- FakeClock -------------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_alarms_go_off_in_order_when_time_has_moved() -> None:
    clock, rung = FakeClock(start=100.0), []
    for name, when in (("c", 103.0), ("a", 101.0), ("b", 102.0), ("never", 104.0)):
        cancel = clock.call_at(when, lambda name=name: rung.append(name))  # type: ignore[misc]
    cancel()
    clock.call_at(100.0, lambda: rung.append("now"))
    await asyncio.sleep(0)
    assert rung == ["now"]
    clock.advance(2.0)
    await asyncio.sleep(0)
    assert (clock.now(), rung) == (102.0, ["now", "a", "b"])
    clock.advance(100.0)
    await asyncio.sleep(0)
    assert rung == ["now", "a", "b", "c"]
    cancel()


def test_time_does_not_run_backwards() -> None:
    with pytest.raises(ValueError, match="-1"):
        FakeClock().advance(-1)


@pytest.mark.anyio
async def test_a_test_can_wait_until_somebody_waits() -> None:
    clock = FakeClock()
    clock.call_at(clock.now() + 60, lambda: None)
    watcher = asyncio.ensure_future(clock.until_awaited(5))
    await asyncio.sleep(0)
    assert not watcher.done()
    await asyncio.to_thread(asyncio.run, _set_alarm(clock, 5))
    await asyncio.wait_for(watcher, 10)
    await asyncio.wait_for(clock.until_awaited(60), 10)


async def _set_alarm(clock: FakeClock, seconds: float) -> None:
    clock.call_at(clock.now() + seconds, lambda: None)


@pytest.mark.anyio
async def test_alarms_of_closed_event_loops_are_dropped() -> None:
    clock = FakeClock()
    await asyncio.to_thread(asyncio.run, _set_alarm(clock, 5))
    clock.advance(5)


def test_the_contract_is_all_abstract_but_for_runners_and_health() -> None:
    own = {
        "check_writable",
        "claim_rollouts",
        "deliver_spans",
        "send_heartbeat",
        "receive_commands",
        "send_command",
    }
    assert set(VERBS) - LightningStore.__abstractmethods__ == own
