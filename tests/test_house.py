"""House rules that no linter checks, tested for every module of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TypeVar

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "distkv_dask"
LINKED = PACKAGE / "kernels", PACKAGE / "graphs"
"""Links to folders next to the package, which ``rglob`` leaves out."""


def found(pattern: str) -> list[Path]:
    """Files of the package, including those of linked folders."""
    return sorted(path for folder in (PACKAGE, *LINKED) for path in folder.rglob(pattern))


MODULES = found("*.py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def reprs_of_errors(tree: ast.Module) -> Iterator[int]:
    """Lines that put the repr of a caught exception into a text: ``TimeoutError()`` says nothing to a user."""
    for handler in ast.walk(tree):
        if not isinstance(handler, ast.ExceptHandler):
            continue
        for one in ast.walk(handler):
            if isinstance(one, ast.FormattedValue) and one.conversion == ord("r"):
                yield from (
                    one.lineno for name in ast.walk(one) if isinstance(name, ast.Name) and name.id == handler.name
                )


Found = TypeVar("Found")


def breaches(rule: Callable[[ast.Module], Iterable[Found]]) -> dict[str, list[Found]]:
    """What breaks a rule, by module; one test covers all modules, because a thousand tests would take seconds."""
    found = {str(path.relative_to(PACKAGE)): [*rule(parsed(path))] for path in MODULES}
    return {module: some for module, some in found.items() if some}


def test_no_message_shows_an_exception_as_python_writes_it() -> None:
    assert breaches(reprs_of_errors) == {}, "say errors.in_words(error)"


# Names of named tuples, ctypes, os and atexit, those that Dask documents for authors of collections, and torch's name
# of flash attention with the log-sum-exp.
PUBLIC = {"_fields", "_replace", "_fields_", "_meta", "_meta_nonempty", "_exit", "_run_exitfuncs"}
PUBLIC |= {"_asdict", "_scaled_dot_product_flash_attention_for_cpu"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined(tree: ast.AST) -> set[str]:
    """Names that a module or class gives to its functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.add(node.name)
            case ast.Name(ctx=ast.Store()):
                found.add(node.id)
            case ast.Attribute(value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                found.add(node.attr)
    return found


def uses_of_others(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Private names of other modules that a module imports, and those of other classes that its code uses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names if is_private(alias.name))
    for top in tree.body:
        own = (defined(top) if isinstance(top, ast.ClassDef) else set()) | PUBLIC
        for node in ast.walk(top):
            match node:
                case ast.Attribute(value=ast.Name(id="self" | "cls")):
                    continue
                case ast.Attribute() if is_private(node.attr) and node.attr not in own:
                    yield node.lineno, ast.unparse(node)


def test_nobody_uses_what_is_private_to_a_class_of_another_module() -> None:
    assert breaches(uses_of_others) == {}, "make it public, or ask for something else"


def imports(node: ast.AST, modules: Collection[str], folder: Sequence[str], typed: bool = False) -> Iterator[str]:
    """Which of ``modules`` a module in ``folder`` imports anywhere; what only type checkers see, only if ``typed``."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not typed:
                yield from (name for other in child.orelse for name in imports(other, modules, folder))
            case ast.Import():
                yield from (alias.name for alias in child.names if alias.name in modules)
            case ast.ImportFrom():
                here = folder[: len(folder) + 1 - child.level] if child.level else ()
                base = ".".join((*here, *filter(None, [child.module])))
                named = [f"{base}.{alias.name}" for alias in child.names]
                yield from (name if name in modules else base for name in named if {name, base} & {*modules})
            case _:
                yield from imports(child, modules, folder, typed)


@cache
def import_graph(*, typed: bool = False) -> dict[str, set[str]]:
    """Which modules each module imports, by their full names; for type checkers, too, if ``typed``."""
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in MODULES}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    return {
        name: set(imports(parsed(path), modules, path.parent.relative_to(PACKAGE.parent).parts, typed))
        for name, path in modules.items()
    }


def test_no_module_imports_itself_in_a_circle() -> None:
    TopologicalSorter(import_graph()).prepare()  # its CycleError names the circle


FOLDERS = sorted({path.parent for path in MODULES})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_rooms_and_modules_side_by_side_import_each_other_one_way(folder: Path) -> None:
    within = (*folder.relative_to(PACKAGE.parent).parts,)
    rooms: dict[str, set[str]] = {}
    for name, imported in import_graph().items():
        parts = [tuple(one.split(".")) for one in (name, *imported)]
        room, *others = (".".join(one[: len(within) + 1]) if one[: len(within)] == within else "" for one in parts)
        if room and room != ".".join(within):  # a package's own __init__ may import its modules
            rooms.setdefault(room, set()).update({*others} - {"", room, ".".join(within)})
    TopologicalSorter(rooms).prepare()  # its CycleError names the circle


MANY_PARTS = {"PreparedAttention", "PreparedLayers"}
"""Classes of the kernels that hold the arguments of a call in C."""


def constructors(tree: ast.Module) -> Iterator[tuple[str, ast.arguments]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield from (
                (node.name, one.args)
                for one in node.body
                if isinstance(one, ast.FunctionDef) and one.name == "__init__"
            )


def large_constructors(tree: ast.Module) -> Iterator[str]:
    """Classes whose constructors take more than five arguments."""
    for name, arguments in constructors(tree):
        if len(arguments.args) + len(arguments.kwonlyargs) - 1 > 5 and name not in MANY_PARTS:
            yield name


def test_no_constructor_takes_more_than_five_things() -> None:
    assert breaches(large_constructors) == {}, "some of them belong together"


LONG = {
    ("machine.py", "_dispatch"),  # one match over all events
    ("triton_jit.py", "attend"), ("triton_jit.py", "_attend_tile"),  # device code
    ("numba_jit.py", "attend_item"),  # a compiled loop that must not call
}  # fmt: skip
"""Functions that may have more than 40 lines."""


def long_functions(tree: ast.Module) -> Iterator[str]:
    """Functions with more than 40 lines after signature and docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            if body and (node.end_lineno or 0) - body[0].lineno >= 40:
                yield node.name


def test_no_function_has_more_than_forty_lines() -> None:
    found = {(Path(path).name, name) for path, names in breaches(long_functions).items() for name in names}
    assert found == LONG, "cut it, or take it from the list"


def test_no_file_has_more_than_three_hundred_lines() -> None:
    sources = [*MODULES, *found("*.cpp"), *found("*.h"), *PACKAGE.parent.joinpath("benchmarks").rglob("*.py")]
    large = {path.name for path in sources if path.read_text().count("\n") > 300}
    assert large == set(), "it holds two ideas: cut it"


MACHINE = "lifecycle", "records", "work", "cache", "moves", "policies", "costs", "ledger"
"""Folders of the scheduler that contain the state machine."""


@pytest.mark.parametrize(
    "path",
    [path for room in MACHINE for path in sorted((PACKAGE / "scheduler" / room).glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_no_part_of_the_state_machine_holds_a_callback(path: Path) -> None:
    tree = parsed(path)
    fields = [node.annotation for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and node.simple]
    kept = [arg.annotation for _, arguments in constructors(tree) for arg in arguments.args if arg.annotation]
    for annotation in fields + kept:
        if "Callable" in (text := ast.unparse(annotation)):
            raise AssertionError(f"{text}: recommend a state instead")


ROOMS = [path for path in found("__init__.py") if path.parent != PACKAGE]


def promised(path: Path) -> tuple[set[str], set[str]]:
    """What the docstring of a package says that its modules may import: at all, and only for types."""
    said = ast.get_docstring(parsed(path)) or ""
    _, _, lines = said.partition("\n\nMay import: ")
    allowed, _, untouched = lines.partition("\nMay not touch: ")
    assert untouched, "what lives here, what it may import, what it may not touch"
    always, _, for_types = allowed.partition("for types only:")
    named, types = (re.findall(r"(?<!`)`(\w+)`(?!`)", part) for part in (always, for_types))
    return {*named}, {*types}


def imported_by(path: Path, *, typed: bool) -> Iterator[tuple[str, str]]:
    """What the modules of a package import from others of the project: a module, and the full name of another."""
    room = ".".join(path.parent.relative_to(PACKAGE.parent).parts)
    for module, imported in import_graph(typed=typed).items():
        if room in (module, module.rpartition(".")[0]):
            yield from ((module, other) for other in imported if not f"{other}.".startswith(f"{room}."))


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_room_says_what_lives_there_and_imports_only_what_it_says(path: Path) -> None:
    always, for_types = promised(path)
    around = {*path.parent.relative_to(PACKAGE.parent).parts[:-1]}
    for typed, named in ((False, always), (True, always | for_types)):
        for module, other in imported_by(path, typed=typed):
            folder = other if PACKAGE.parent.joinpath(*other.split(".")).is_dir() else other.rpartition(".")[0]
            if folder == PACKAGE.name:
                continue
            # of a package around it, only the modules beside it are meant, not other rooms there
            meant = {*other.split(".")} - around | {folder.rpartition(".")[2]}
            assert named & meant, f"{module} imports {other}"


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_room_says_that_it_may_import_what_none_of_its_modules_does(path: Path) -> None:
    always, for_types = promised(path)
    used, seen = (
        {part for _, other in imported_by(path, typed=one) for part in other.split(".")} for one in (False, True)
    )
    project = {part for module in import_graph() for part in module.split(".")}
    assert always & project <= used
    assert for_types <= seen - used
