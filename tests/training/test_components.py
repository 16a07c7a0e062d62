"""Components in every form, and what is said about those that are none."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from lightning.training.components import build_component, load_object

ALIASES = {"plain": "collections:OrderedDict", "box": f"{__name__}:Box"}


class Box:
    """What the components of these tests have to be."""

    def __init__(self, size: int = 1, colour: str = "red") -> None:
        self.size = size
        self.colour = colour


class BigBox(Box):
    """A subclass that takes anything."""

    def __init__(self, **options: Any) -> None:
        super().__init__(options.get("size", 100))
        self.options = options


READY = Box(7)


def make_box() -> Box:
    """A callable without arguments."""
    return Box(5)


@pytest.fixture(autouse=True)
def this_module_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's import mode does not promise it."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Box.__module__])


@pytest.fixture
def folder(tmp_path: Path) -> Generator[Path, None, None]:
    """A folder whose modules are forgotten afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (READY, 7),
        (Box, 1),
        (make_box, 5),
        (lambda: Box(6), 6),
        ("box", 1),
        (f"{__name__}:Box", 1),
        (f"{__name__}.Box", 1),
        (f"{__name__}:READY", 7),
        (f"{__name__}:make_box", 5),
        ({"type": "box", "size": 3}, 3),
        ({"type": Box, "size": 3}, 3),
        ({"type": f"{__name__}.BigBox", "size": 3}, 3),
        ({"type": "box"}, 1),
    ],
)
def test_every_form_makes_the_component(given: Any, size: int) -> None:
    assert build_component("box", given, Box, aliases=ALIASES).size == size


def test_an_instance_is_taken_as_it_is() -> None:
    assert build_component("box", READY, Box) is READY
    assert build_component("box", f"{__name__}:READY", Box) is READY


def test_options_go_before_those_of_a_dict_and_only_to_classes_that_take_them() -> None:
    options = {"size": 9, "weight": 2}
    assert build_component("box", {"type": "box", "size": 3}, Box, aliases=ALIASES, options=options).size == 9
    assert build_component("box", {"type": Box, "colour": "blue"}, Box, options=options).colour == "blue"
    assert build_component("box", make_box, Box, options=options).size == 5
    big = build_component("box", BigBox, Box, options=options)
    assert isinstance(big, BigBox)
    assert big.options == options


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (3, TypeError, r"^box=3 is not accepted: give one of 'plain', 'box', an instance or a class of Box"),
        ("crate", ValueError, r"^box='crate' is not known: give one of 'plain', 'box'"),
        ("plain", TypeError, r"^box='plain' makes a OrderedDict, which is no Box"),
        ("no.such.module:Box", ValueError, r"^box: there is no module 'no'"),
        ("os.path:jion", ValueError, r"^box 'os.path:jion': 'os.path' has no 'jion'; did you mean 'join'\?$"),
        ({"size": 3}, ValueError, r"^box=\{'size': 3\} needs a 'type'"),
        ({"type": "box", "sizes": 3}, TypeError, r"Box does not take these arguments: .*'sizes'"),
        ({"type": READY, "size": 3}, TypeError, r"is not accepted"),
        (lambda size: Box(size + 1), TypeError, r"does not take these arguments: missing .*'size'"),
        ("", ValueError, r"^box='' is not known"),
        (None, TypeError, r"^box=None is not accepted"),
    ],
)
def test_what_is_no_component_is_refused_by_name(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_component("box", given, Box, aliases=ALIASES)


@pytest.mark.parametrize(
    "path", ["agent", ":agent", "module:", ".", ".module:agent", "agents.py", "a/agents.py:"]
)
def test_what_is_no_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"is no path of the form 'package.module:name' or 'file.py:name'"):
        load_object("agent", path)


def test_a_file_is_imported_with_what_stands_beside_it(folder: Path) -> None:
    (folder / "beside_it.py").write_text("value = 4\n")
    (folder / "my_agents.py").write_text(
        "from beside_it import value\nclass Holder:\n    inner = value + 1\n"
    )
    assert load_object("agent", f"{folder / 'my_agents.py'}:Holder.inner") == 5


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"agent: there is no file '.*absent\.py'"):
        load_object("agent", f"{folder / 'absent.py'}:agent")


def test_a_file_named_like_a_module_is_refused(folder: Path) -> None:
    (folder / "json.py").write_text("agent = 1\n")
    with pytest.raises(ValueError, match=r"'json\.py' has the name of the module 'json'; rename the file"):
        load_object("agent", f"{folder / 'json.py'}:agent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "x = 1\ny = undefined\n",
            r"NameError: name 'undefined' is not defined \(broken_agents\.py, line 2\)",
        ),
        (
            "import not_installed_anywhere\n",
            r"No module named 'not_installed_anywhere' \(broken_agents\.py, line 1\)",
        ),
        ("def f(:\n", r"SyntaxError"),
    ],
)
def test_a_module_that_fails_is_told_from_one_that_is_missing(folder: Path, text: str, message: str) -> None:
    (folder / "broken_agents.py").write_text(text)
    with pytest.raises(ImportError, match=message):
        load_object("agent", f"{folder / 'broken_agents.py'}:agent")
