#!/usr/bin/env python3
"""`kernel.py PROGRAM ARGUMENT …`: runs a program as a cell of a notebook, in a real Jupyter kernel.

Looks like the program from outside: what it prints is printed, Ctrl-C interrupts the cell, as the stop button does, and
the exit code is what it would be, also where the kernel is killed. Unlike it, the kernel must be there still when the
cell has ended, whatever came of it, and nothing else of the cell.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from queue import Empty
from typing import Any

from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

START_SECONDS = 60.0
POLL_SECONDS = 0.1
COUNT_CHILDREN = "len(__import__('psutil').Process().children(recursive=True))"


class KernelDied(Exception):
    """It is gone; the signal that killed it is the argument."""


def execute(
    manager: KernelManager, client: BlockingKernelClient, code: str, **options: Any
) -> dict[str, Any]:
    """Run a cell, print what it prints, and return the reply."""
    message_id = client.execute(code, **options)
    idle = False
    while not idle:
        try:
            message = client.get_iopub_msg(timeout=POLL_SECONDS)
        except Empty:
            if not manager.is_alive():
                raise KernelDied(-(manager.provisioner.process.poll() or 0)) from None
            continue
        content = message["content"]
        if (
            message["msg_type"] == "stream"
        ):  # also of processes that the cell has started, whoever their parent is
            stream = sys.stdout if content["name"] == "stdout" else sys.stderr
            print(content["text"], end="", file=stream, flush=True)
        elif message["parent_header"].get("msg_id") == message_id and message["msg_type"] == "status":
            idle = content["execution_state"] == "idle"
    while True:
        message = client.get_shell_msg(timeout=START_SECONDS)
        if message["parent_header"].get("msg_id") == message_id:
            reply: dict[str, Any] = message["content"]
            return reply


def run(manager: KernelManager, program: Path, arguments: list[str]) -> int:
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=START_SECONDS)
        execute(manager, client, f"import sys; sys.argv = {[program.name, *arguments]!r}", silent=True)
        before = children(manager, client)
        # jupyter_client waits for the kernel to react, which must not keep this thread from listening
        signal.signal(
            signal.SIGINT, lambda *_: threading.Thread(target=manager.interrupt_kernel, daemon=True).start()
        )
        reply = execute(manager, client, program.read_text())
        if reply["status"] == "error":
            print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reply["traceback"])), file=sys.stderr, flush=True)
        left = int(children(manager, client)) - int(before)
        if left > 0:
            print(f"the cell left {left} processes behind", file=sys.stderr)
            return 3
    finally:
        client.stop_channels()
    if reply["status"] == "ok":
        return 0
    if reply["ename"] == "SystemExit":
        return int(reply["evalue"])
    return -signal.SIGINT if reply["ename"] == "KeyboardInterrupt" else 1


def children(manager: KernelManager, client: BlockingKernelClient) -> str:
    """How many processes the kernel has started that live."""
    reply = execute(manager, client, "", user_expressions={"children": COUNT_CHILDREN})
    text: str = reply["user_expressions"]["children"]["data"]["text/plain"]
    return text


def main() -> int:
    os.environ.pop(
        "PYTEST_CURRENT_TEST", None
    )  # with it a kernel does not pass on what other processes print
    manager = KernelManager(kernel_name="python3")
    # what it prints comes as messages; it would say some of it twice
    manager.start_kernel(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        code = run(manager, Path(sys.argv[1]), sys.argv[2:])
    except KernelDied as death:
        code = -death.args[0]
    finally:
        manager.shutdown_kernel(now=True)
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main())
