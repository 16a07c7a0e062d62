"""What the machine is and how busy it is, as JSON values: the measurements in a worker's heartbeat."""

from __future__ import annotations

import importlib
import logging
import platform
import socket
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

logger = logging.getLogger(__name__)


def system_snapshot(include_gpu: bool = False) -> dict[str, Any]:
    """Measure this machine.

    Sizes are bytes, loads are percent; network counters run since boot. The CPU's load is that since the last call in
    this process. May take some milliseconds, and hang as long as a file system does.

    Args:
        include_gpu: Whether to ask NVML for GPUs; the list is empty where it, or `pynvml`, is missing.
    """
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(Path(sys.prefix).anchor)
    network = psutil.net_io_counters()
    snapshot: dict[str, Any] = {
        "host": _host(),
        "cpu": {**_cpu(), "usage_percent": psutil.cpu_percent(interval=None)},
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "used_bytes": memory.used,
            "usage_percent": memory.percent,
        },
        "disk": {
            "total_bytes": disk.total,
            "free_bytes": disk.free,
            "used_bytes": disk.used,
            "usage_percent": disk.percent,
        },
        # None where the kernel does not tell, as in some containers
        "network": None
        if network is None
        else {"sent_bytes": network.bytes_sent, "received_bytes": network.bytes_recv},
    }
    if include_gpu:
        snapshot["gpus"] = _gpus()
    return snapshot


@lru_cache(maxsize=1)
def _host_fields() -> tuple[tuple[str, str], ...]:
    return (
        ("name", socket.gethostname()),
        ("os", platform.system()),
        ("os_release", platform.release()),
        ("os_version", platform.version()),
        ("architecture", platform.machine()),
        ("python", platform.python_version()),
    )


def _host() -> dict[str, Any]:
    return {**dict(_host_fields()), "boot_time": psutil.boot_time()}


@lru_cache(maxsize=1)
def _cpu_fields() -> tuple[tuple[str, Any], ...]:
    return (
        ("name", _cpu_name()),
        ("cores", psutil.cpu_count(logical=False)),
        ("threads", psutil.cpu_count(logical=True)),
    )


def _cpu() -> dict[str, Any]:
    return dict(_cpu_fields())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        logger.debug("no GPUs: %s", error)
        return []
    try:
        return [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as error:
        logger.warning("GPUs cannot be measured: %s", error)
        return []
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:
    device = nvml.nvmlDeviceGetHandleByIndex(index)
    name = nvml.nvmlDeviceGetName(device)
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    load = nvml.nvmlDeviceGetUtilizationRates(device)
    return {
        "index": index,
        "name": name.decode() if isinstance(name, bytes) else name,
        "memory_total_bytes": memory.total,
        "memory_used_bytes": memory.used,
        "usage_percent": load.gpu,
        "temperature_celsius": nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
    }
