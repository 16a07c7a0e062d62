"""What `import lightning` gives, and when it refuses."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning
from lightning.environment import refuse_rival_package

CONTRACT_NAMES = [
    "Rollout",
    "AttemptedRollout",
    "Attempt",
    "RolloutConfig",
    "EnqueueRolloutRequest",
    "Worker",
    "Span",
    "SpanContext",
    "TraceStatus",
    "Event",
    "Link",
    "OtelResource",
    "ResourcesUpdate",
    "Resource",
    "LLM",
    "PromptTemplate",
    "NamedResources",
    "PaginatedResult",
    "UNSET",
    "LightningStore",
    "InMemoryLightningStore",
    "LightningStoreThreaded",
    "SQLiteLightningStore",
    "MongoLightningStore",
    "LightningStoreServer",
    "LightningStoreClient",
    "ExecutionStrategy",
    "SharedMemoryExecutionStrategy",
    "ClientServerExecutionStrategy",
    "ExecutionEvent",
    "ThreadingEvent",
    "MultiprocessingEvent",
    "AgentRunner",
    "Hook",
    "system_snapshot",
    "Trainer",
    "Algorithm",
    "Adapter",
    "rollout",
    "emit_reward",
    "find_final_reward",
    "OtelTracer",
]


@pytest.mark.parametrize("name", sorted({*CONTRACT_NAMES, *lightning.__all__}))
def test_every_public_name_is_there(name: str) -> None:
    assert name in lightning.__all__
    assert getattr(lightning, name) is not None
    assert name in dir(lightning)


def test_checkers_and_programs_see_the_same_names_from_the_same_places() -> None:
    [block] = [
        node for node in ast.parse(Path(lightning.__file__).read_text()).body if isinstance(node, ast.If)
    ]
    imported = {
        alias.name: statement.module
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(imported) == sorted(lightning.__all__)
    for name, module in imported.items():
        assert module is not None
        assert getattr(importlib.import_module(module), name) is getattr(lightning, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'lightning' has no attribute 'Rollouts'"):
        lightning.Rollouts  # noqa: B018


def run_python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, with `folders` on its path."""
    setup = "import sys; sys.path[:0] = " + repr([str(folder) for folder in folders])
    return subprocess.run(
        [sys.executable, "-c", f"{setup}\n{code}"], capture_output=True, text=True, timeout=50, check=False
    )


def test_the_import_loads_no_more_than_it_needs() -> None:
    heavy = ["grpc", "opentelemetry.sdk", "pydantic", "typer", "numpy", "psutil"]
    code = f"import lightning; print([name for name in {heavy!r} if name in sys.modules])"
    outcome = run_python(code)
    assert outcome.stdout.strip() == "[]", outcome.stderr


def install(folder: Path, name: str, *files: str, record: bool = True) -> None:
    """The metadata of a distribution, as an installer leaves it."""
    info = folder / f"{name.replace('-', '_')}-2.5.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.5\n")
    if record:
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_a_rival_package_makes_the_import_fail_at_once(tmp_path: Path, name: str) -> None:
    install(tmp_path, name, "lightning/__init__.py", "lightning/pytorch/__init__.py")
    outcome = run_python("import lightning", tmp_path)
    assert outcome.returncode == 1
    last = outcome.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "ImportError: agent-lightning-grpc and " + name + " 2.5 (PyTorch Lightning) are installed"
    )
    assert f"pip uninstall {name}" in last


@pytest.mark.parametrize("command", [["lightning"], ["python", "-m", "lightning"]])
def test_beside_a_rival_package_the_command_says_so_in_one_line(tmp_path: Path, command: list[str]) -> None:
    install(tmp_path, "lightning", "lightning/__init__.py")
    program = str(Path(sys.executable).parent / command[0])
    outcome = subprocess.run(
        [program, *command[1:], "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr.startswith("error: agent-lightning-grpc and lightning 2.5 (PyTorch Lightning)")
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "files", "record"),
    [
        ("pytorch-lightning", ["pytorch_lightning/__init__.py"], True),
        ("pytorch-lightning", [], False),
        ("lightning", ["other_package/__init__.py"], True),
        ("lightning-utilities", ["lightning_utilities/__init__.py"], True),
    ],
)
def test_distributions_without_the_package_are_fine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, files: list[str], record: bool
) -> None:
    install(tmp_path, name, *files, record=record)
    monkeypatch.syspath_prepend(tmp_path)
    refuse_rival_package()


def test_a_rival_without_a_list_of_files_is_judged_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "lightning", record=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"pip uninstall lightning"):
        refuse_rival_package()
