"""The one event loop on which this process speaks gRPC.

grpc.aio has one queue of events per process. With several event loops on it they all wake up for each event, all but
one in vain, and each of those logs an error. So every client and server of a process shares one loop in a thread of
its own, and callers on other loops hand their calls over to it. The thread lives from the first share to the last.

gRPC and `fork` do not mix: a child of a process that has spoken gRPC cannot, and asks by way of
`lightning.rpc.relay`. The core's own handlers of `fork` are therefore switched off, unless the user has set
`GRPC_ENABLE_FORK_SUPPORT`: they cannot help such a child, and where a stream is open they kill it at times (SIGSEGV).
"""

from __future__ import annotations

import os
import threading
from typing import Any

from lightning.store.threaded import LoopThread

_THREAD_NAME = "lightning-grpc"

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # read by the core when it is first used


class _Shared:
    def __init__(self, unusable: bool = False) -> None:
        self.lock = threading.Lock()
        self.connecting = threading.Lock()
        self.thread: LoopThread | None = None
        self.shares = 0
        self.used = False
        self.unusable = unusable

    def after_fork(self) -> None:
        """Start afresh in a forked child: the parent's thread is not here, and its locks may be held for ever."""
        self.__init__(self.unusable or self.used)  # type: ignore[misc]


_shared = _Shared()
os.register_at_fork(after_in_child=_shared.after_fork)


def is_dead() -> bool:
    """Whether this process was forked from one that had spoken gRPC. The core's threads did not come along, and nothing
    that is asked of it ever ends; see `lightning.rpc.relay`."""
    return _shared.unusable


def acquire() -> LoopThread:
    """Take a share in the loop; `release` it once. Raises `RuntimeError` if gRPC `is_dead` in this process."""
    if _shared.unusable:
        raise RuntimeError(
            "gRPC was in use when this process was forked, and does not work after that: "
            "start processes that serve a store by 'spawn' or 'forkserver'"
        )
    with _shared.lock:
        if _shared.thread is None or _shared.thread.stopped:
            _shared.thread = LoopThread(_THREAD_NAME)
        _shared.shares += 1
        _shared.used = True
        return _shared.thread


def release() -> None:
    """Give a share back; the last one ends the thread."""
    with _shared.lock:
        _shared.shares -= 1
        if _shared.shares:
            return
        thread, _shared.thread = _shared.thread, None
    if thread is not None:
        thread.stop()


def connecting() -> threading.Lock:
    """Held while a client makes its connection. Unlike a lock of the client's own it is usable after a fork."""
    return _shared.connecting


async def end_call(call: Any) -> None:
    """Cancel a call that may be under way, and wait until gRPC has said on this loop that it has ended.

    What gRPC has to say to a loop that is closed by then it says to the next one of this process, where that is an
    error, and holds up what comes behind it.
    """
    call.cancel()
    await call.code()
