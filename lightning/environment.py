"""The check that this package has the import name `lightning` to itself.

PyTorch Lightning's distributions bring a top-level package of the same name. In one environment the two overwrite each
other's files, and the errors that follow point anywhere but here.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

_RIVALS = ("lightning", "pytorch-lightning")
_OWN_PACKAGE = "lightning"


def refuse_rival_package() -> None:
    """Raise `ImportError` if another distribution that provides the package `lightning` is installed beside this one.

    The command `lightning` ends with the message alone: it cannot catch what happens before it is imported itself.
    It costs two look-ups in the environment's metadata, about a millisecond.

    Raises:
        ImportError: There is one.
        SystemExit: The same, in the command `lightning`.
    """
    for name in _RIVALS:
        try:
            rival = distribution(name)
        except PackageNotFoundError:
            continue
        if _provides_package(rival):
            problem = (
                f"agent-lightning-grpc and {name} {rival.version} (PyTorch Lightning) are installed in the same "
                f"environment, and both provide the package 'lightning': neither works reliably. Use an "
                f"environment of its own for each; to keep only this one: pip uninstall {name} && "
                f"pip install --force-reinstall --no-deps agent-lightning-grpc"
            )
            if _is_own_command():
                sys.exit(f"error: {problem}")
            raise ImportError(problem, name=_OWN_PACKAGE)


def _is_own_command() -> bool:
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what `python -m` puts there until it has found the module
        return _OWN_PACKAGE in sys.orig_argv
    return Path(program).stem == _OWN_PACKAGE


def _provides_package(rival: Distribution) -> bool:
    """By the list of installed files; a distribution without one is trusted to provide what its name says."""
    files = rival.files
    if files is None:
        return rival.metadata["Name"] == _OWN_PACKAGE
    return any(file.parts[:1] == (_OWN_PACKAGE,) for file in files)
