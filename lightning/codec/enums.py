"""Enums: lower-case words in the records, prefixed numbers on the wire. One table for each, read off the protos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lightningpb.v1 import rollout_pb2, span_pb2, store_service_pb2, worker_pb2

from lightning.types import AttemptStatus, RolloutMode, RolloutStatus, StatusCode, WorkerStatus

if TYPE_CHECKING:
    from lightning.store.contract import FilterLogic, SortOrder

WordT = TypeVar("WordT", bound=str)
NumberT = TypeVar("NumberT", bound=int)

_UNSPECIFIED = "UNSPECIFIED"


class EnumTable(Generic[WordT, NumberT]):
    """Both directions of one enum."""

    def __init__(self, enum: Any, *, upper_case: bool = False) -> None:
        """`enum` is the generated enum class; its number 0 is `…_UNSPECIFIED` and stands for no word."""
        prefix = enum.Name(0).removesuffix(_UNSPECIFIED)
        words = {name.removeprefix(prefix): number for name, number in enum.items() if number != 0}
        self._numbers: dict[Any, Any] = (
            words if upper_case else {word.lower(): n for word, n in words.items()}
        )
        self._words: dict[Any, Any] = {number: word for word, number in self._numbers.items()}

    def to_number(self, word: WordT, field: str) -> NumberT:
        """The number of `word`. Raises `ValueError` naming `field` if there is none."""
        try:
            number: NumberT = self._numbers[word]
        except (KeyError, TypeError):
            raise ValueError(f"{field} must be one of {', '.join(self._numbers)}, not {word!r}") from None
        return number

    def to_word(self, number: NumberT, field: str) -> WordT:
        """The word of `number`. Raises `ValueError` naming `field` and the number if there is none."""
        try:
            word: WordT = self._words[number]
        except KeyError:
            problem = "is not set" if number == 0 else f"has the unknown enum number {number}"
            raise ValueError(f"{field} {problem}") from None
        return word


ROLLOUT_STATUS: EnumTable[RolloutStatus, rollout_pb2.RolloutStatus.ValueType] = EnumTable(
    rollout_pb2.RolloutStatus
)
ATTEMPT_STATUS: EnumTable[AttemptStatus, rollout_pb2.AttemptStatus.ValueType] = EnumTable(
    rollout_pb2.AttemptStatus
)
ROLLOUT_MODE: EnumTable[RolloutMode, rollout_pb2.RolloutMode.ValueType] = EnumTable(rollout_pb2.RolloutMode)
WORKER_STATUS: EnumTable[WorkerStatus, worker_pb2.WorkerStatus.ValueType] = EnumTable(worker_pb2.WorkerStatus)
SPAN_STATUS_CODE: EnumTable[StatusCode, span_pb2.StatusCode.ValueType] = EnumTable(
    span_pb2.StatusCode, upper_case=True
)
FILTER_LOGIC: EnumTable[FilterLogic, store_service_pb2.FilterLogic.ValueType] = EnumTable(
    store_service_pb2.FilterLogic
)
SORT_ORDER: EnumTable[SortOrder, store_service_pb2.SortOrder.ValueType] = EnumTable(
    store_service_pb2.SortOrder
)
