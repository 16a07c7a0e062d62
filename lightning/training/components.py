"""How the parts of a training are given: as an object, or as something that makes one.

Wherever the trainer or the command line takes a component (strategy, algorithm, agent, adapter, tracer, hook), these
forms mean the same:

| form | example |
|---|---|
| an instance | `ClientServerExecutionStrategy(n_runners=4)` |
| a class, or a callable without arguments | `ClientServerExecutionStrategy` |
| an alias, where there are any | `"cs"` |
| a dotted path to one of the above | `"mypackage.strategies:Slurm"`, `"mypackage.strategies.Slurm"` |
| a dict: `type` is a class, an alias or a path, the rest its arguments | `{"type": "cs", "server_port": 4811}` |
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from lightning.agents import Agent, as_agent
from lightning.store.contract import LightningStore
from lightning.store.forwarding import complete
from lightning.store.open import is_store_url, open_store
from lightning.store.threaded import LightningStoreThreaded

_ADDRESS = re.compile(r"((grpcs?|https?)://)?[^/\s]+:\d+/?")
_NO_ALIASES: Mapping[str, str] = {}
_NO_OPTIONS: Mapping[str, Any] = {}


def build_component(
    parameter: str,
    given: Any,
    base: type,
    *,
    aliases: Mapping[str, str] = _NO_ALIASES,
    options: Mapping[str, Any] = _NO_OPTIONS,
) -> Any:
    """Turn any of the forms above into an instance of `base`.

    Args:
        parameter: What the user calls it, for error messages.
        given: What the user gave.
        base: What it has to be.
        aliases: Dotted paths by short name.
        options: Further arguments for a class; they go before those of a dict. Those that the class does not take
            are left out. An instance and the result of a callable stay as they are.

    Raises:
        TypeError: `given` is none of the forms, makes something else, or its class refuses the arguments.
        ValueError: A path leads nowhere, or a dict has no `type`.
    """
    arguments: Mapping[str, Any] = _NO_OPTIONS
    maker = given
    if isinstance(maker, Mapping):
        arguments = {str(key): value for key, value in maker.items() if key != "type"}
        if "type" not in maker:
            raise ValueError(f"{parameter}={given!r} needs a 'type': {_accepted(base, aliases)}")
        maker = maker["type"]
    if isinstance(maker, str):
        maker = _load_aliased(parameter, maker, base, aliases)
    if isinstance(maker, base) and not arguments:
        return maker
    if not callable(maker) or isinstance(maker, base):
        raise TypeError(f"{parameter}={given!r} is not accepted: {_accepted(base, aliases)}")
    if inspect.isclass(maker):
        arguments = {**arguments, **_taken(maker, options)}
    return _make(parameter, given, maker, base, arguments)


def build_agent(parameter: str, given: Any) -> Agent:
    """As `build_component`, for agents: a function that is none yet is made one.

    Raises:
        TypeError: It can be no agent.
        ValueError: A path leads nowhere.
    """
    if isinstance(given, str):
        given = load_object(parameter, given)
    if isinstance(given, Mapping) or inspect.isclass(given):
        agent: Agent = build_component(parameter, given, Agent)
        return agent
    try:
        return as_agent(given)
    except TypeError as error:
        raise TypeError(f"{parameter}={given!r} is not accepted: {error}") from None


def build_store(parameter: str, given: Any) -> LightningStore:
    """As `build_component`, for stores; an object of another make that has a store's methods is taken for one.

    Raises:
        TypeError: It can be no store.
        ValueError: A path leads nowhere.
    """
    if not callable(given) and hasattr(given, "enqueue_rollout"):
        return complete(given)
    store: LightningStore = build_component(parameter, given, LightningStore)
    return store


def names_store(given: Any) -> bool:
    """Whether `given` is a text that `open_named_store` is for, and not a component.

    Raises:
        ValueError: It is a text that is neither, or an address that cannot be read.
    """
    if not isinstance(given, str) or is_store_url(given):
        return isinstance(given, str)
    if _ADDRESS.fullmatch(given):
        from lightning.rpc.address import parse_endpoint

        parse_endpoint(given)
        return True
    if "." not in given.partition(":")[0]:
        raise ValueError(
            f"store={given!r} is not known: give the address 'host:port' of a server, the URL of a backend such as "
            f"'memory', a path such as 'package.module:Name', or a LightningStore"
        )
    return False


def open_named_store(text: str) -> LightningStore:
    """Open the backend with the URL `text`, or connect to the server at the address `text`. The caller closes it."""
    if is_store_url(text):
        return LightningStoreThreaded(open_store(text))
    from lightning.rpc import LightningStoreClient

    return LightningStoreClient(text)


def load_object(what: str, path: str) -> Any:
    """Import what `path` names.

    Args:
        what: What the user calls it, for error messages.
        path: `package.module:name`, `package.module.name` or `folder/file.py:name`. The file's folder goes to the
            front of `sys.path`, as it does for `python folder/file.py`, so that what the file imports from beside
            it is found, here and in the processes that are started from here.

    Raises:
        ValueError: It is no such path, or there is nothing at its end.
        ImportError: The module exists but cannot be imported.
    """
    module_name, separator, attribute = path.rpartition(":")
    if not separator:
        module_name, _, attribute = path.rpartition(".")
    if not module_name or module_name.startswith(".") or not attribute or path.endswith(".py"):
        raise ValueError(f"{what} {path!r} is no path of the form 'package.module:name' or 'file.py:name'")
    if module_name.endswith(".py"):
        module = _import_file(what, Path(module_name))
    else:
        module = _import_module(what, module_name)
    try:
        return reduce(getattr, attribute.split("."), cast(Any, module))
    except AttributeError:
        close = difflib.get_close_matches(attribute, [name for name in vars(module) if name[0] != "_"], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{what} {path!r}: {module_name!r} has no {attribute!r}{hint}") from None


def _import_module(what: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        # a missing module is the caller's mistake if it lies on the path that was given, else the module's own
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{what}: there is no module {error.name!r}") from None
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}, line {last.lineno}"
        raise ImportError(
            f"{what}: importing {name!r} failed: {type(error).__name__}: {error} ({place})"
        ) from error


def _import_file(what: str, file: Path) -> ModuleType:
    file = file.expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"{what}: there is no file {str(file)!r}")
    folder = str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    importlib.invalidate_caches()
    module = _import_module(what, file.stem)
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve() != file:
        raise ValueError(f"{what}: {file.name!r} has the name of the module {file.stem!r}; rename the file")
    return module


def _load_aliased(parameter: str, name: str, base: type, aliases: Mapping[str, str]) -> Any:
    if name not in aliases and "." not in name and ":" not in name:
        raise ValueError(f"{parameter}={name!r} is not known: {_accepted(base, aliases)}")
    return load_object(parameter, aliases.get(name, name))


def _taken(maker: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that `maker` has a parameter for."""
    signature = _signature(maker)
    if signature is None:
        return {}
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(options)
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in options.items() if name in names}


def _make(
    parameter: str, given: Any, maker: Callable[..., Any], base: type, arguments: Mapping[str, Any]
) -> Any:
    if inspect.isabstract(maker):
        lacks = ", ".join(sorted(getattr(maker, "__abstractmethods__", ())))
        raise TypeError(
            f"{parameter}={given!r} is not accepted: {maker.__name__} is abstract, it lacks {lacks}"
        )
    signature = _signature(maker)
    try:
        if signature is not None:
            signature.bind(**arguments)
    except TypeError as error:
        name = getattr(maker, "__qualname__", repr(maker))
        raise TypeError(f"{parameter}={given!r}: {name} does not take these arguments: {error}") from None
    made = maker(**arguments)
    if not isinstance(made, base):
        raise TypeError(
            f"{parameter}={given!r} makes a {type(made).__name__}, which is no {base.__name__}: "
            f"{_accepted(base, _NO_ALIASES)}"
        )
    return made


def _signature(maker: Callable[..., Any]) -> inspect.Signature | None:
    """None for the few built-in classes that do not tell."""
    try:
        return inspect.signature(maker)
    except ValueError:
        return None


def _accepted(base: type, aliases: Mapping[str, str]) -> str:
    names = ", ".join(repr(name) for name in aliases)
    short = f"one of {names}, " if names else ""
    return (
        f"give {short}an instance or a class of {base.__name__}, a callable that makes one, a path such as "
        f"'package.module:Name', or a dict with its 'type' and arguments"
    )
