"""Many records are decoded in one go, or not before somebody looks; and the garbage collector is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from lightning.codec import DecodedLater, decode_many


@pytest.fixture(params=[True, False], ids=["collector awake", "collector asleep"])
def collector(request: pytest.FixtureRequest) -> Iterator[bool]:
    awake = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if awake else gc.disable)()


def test_each_is_decoded_in_order() -> None:
    assert decode_many(str, range(2500)) == [str(number) for number in range(2500)]
    assert decode_many(str, []) == []


def test_the_collector_rests_meanwhile_and_is_then_as_it_was(collector: bool) -> None:
    assert decode_many(lambda _: gc.isenabled(), range(3)) == [False] * 3
    assert gc.isenabled() is collector


def test_the_collector_is_as_it_was_after_an_error(collector: bool) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        decode_many(int, ["1", "x"])
    assert gc.isenabled() is collector


def test_nothing_is_decoded_before_somebody_looks_and_then_once() -> None:
    decoded: list[str] = []

    def decode(text: str) -> int:
        decoded.append(text)
        return int(text)

    later = DecodedLater(decode, ["1", "2", "3"])
    assert len(later) == 3
    assert decoded == []
    assert list(later) == [1, 2, 3]
    assert (later[0], later[-1], later[1:]) == (1, 3, [2, 3])
    assert 2 in later
    assert decoded == ["1", "2", "3"]


def test_what_is_decoded_later_reads_like_a_list() -> None:
    later = DecodedLater(int, ["1", "2"])
    assert repr(later) == "[1, 2]"
    assert later == [1, 2] == later
    assert later == DecodedLater(int, ["1", "2"])
    assert later != [1]
    assert later != 1
    assert later != "12"
