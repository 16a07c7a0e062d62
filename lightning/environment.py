"""The check that this package has the import name `lightning` to itself.

PyTorch Lightning's distributions bring a top-level package of the same name. In one environment the two overwrite each
other's files, and the errors that follow point anywhere but here.
"""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

_RIVALS = ("lightning", "pytorch-lightning")
_OWN_PACKAGE = "lightning"


def refuse_rival_package() -> None:
    """Raise `ImportError` if another distribution that provides the package `lightning` is installed beside this one.

    It costs two look-ups in the environment's metadata, about a millisecond.
    """
    for name in _RIVALS:
        try:
            rival = distribution(name)
        except PackageNotFoundError:
            continue
        if _provides_package(rival):
            raise ImportError(
                f"agent-lightning-grpc and {name} {rival.version} (PyTorch Lightning) are installed in the same "
                f"environment, and both provide the package 'lightning': neither works reliably. Use an "
                f"environment of its own for each; to keep only this one: pip uninstall {name} && "
                f"pip install --force-reinstall --no-deps agent-lightning-grpc",
                name=_OWN_PACKAGE,
            )


def _provides_package(rival: Distribution) -> bool:
    """By the list of installed files; a distribution without one is trusted to provide what its name says."""
    files = rival.files
    if files is None:
        return rival.metadata["Name"] == _OWN_PACKAGE
    return any(file.parts[:1] == (_OWN_PACKAGE,) for file in files)
