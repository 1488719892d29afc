"""Checks of the sources that need no import of them: sizes of functions, arrows, cycles, words, docstrings.

    python tests/source_checks.py                   # how many offenders each package has
    python tests/source_checks.py core recipes      # list those of some packages

A *part* is a package's folder name, or the top-level folder of a file that belongs to no package ("." for the root).
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGES = ROOT / "packages"
# import name -> folder below packages/
MODULES = {source.name: source.parents[1].name for source in PACKAGES.glob("*/src/*") if (source / "py.typed").exists()}

CORE, KIT = "rlcore", "rlcore_kit"
# What the sources of a package may import of the others. Recipes name every backend as a plugin only.
MAY_IMPORT: Mapping[str, set[str]] = {
    CORE: set(),
    KIT: {CORE},
    "rlcore_ray": {CORE, KIT},
    "rlcore_inline": {CORE, KIT},
    "rlcore_fsdp": {CORE, KIT},
    "rlcore_megatron": {CORE, KIT},
    "rlcore_vllm": {CORE, KIT},
    "rlcore_sglang": {CORE, KIT},
    "rlcore_http": {CORE, KIT},
    "rlcore_rewards": {CORE, KIT},
    "rlcore_recipes": {CORE, KIT},
    "rlcore_agents": {CORE, KIT},
}
# What their tests may import in addition.
TESTS_MAY_IMPORT = {CORE: {f"{KIT}.testing"}}

MAXIMUM_FUNCTION_LINES = 50
# Words and phrases that have a plainer one; regular expressions. A blank is any white space, also over lines of a
# comment and parts of a string; "_" counts as a blank, so that names are checked too.
BANNED = (
    "at once",
    "anew",
    "mend(?:s|ed|ing)?",
    "(?:stands?|standing|stood) for",
    "of (?:its|their) own",
    "beside",
    "(?:tell|tells|telling|told) of",
    "(?:be|been|being|is|are|was|were) told",
    "who(?:m|se)?ever",
    "(?:no|some|any)body",
    "gives? way",
    "greet(?:s|ed|ing|ings)?",
    "standstills?",
    "patien(?:ce|t|tly)",
)
# At the start of a help text or description: "Maximum", "Minimum" and "Timeout" are what readers search for.
BANNED_AT_START = ("Most", "Least", "Longest", "Shortest", "Fewest")
SHAPELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


class Offence(NamedTuple):
    part: str
    place: str
    """``path:line``, from the root"""
    what: str

    def __str__(self) -> str:
        return f"{self.place} {self.what}"


class Definition(NamedTuple):
    """A function or class of a file, with the classes around it and whether a function is around it."""

    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    classes: tuple[ast.ClassDef, ...]
    inside_function: bool


@cache
def files() -> tuple[Path, ...]:
    """Tracked and new files that git does not ignore, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return tuple(sorted(path for path in map(Path, listed.splitlines()) if (ROOT / path).is_file()))


@cache
def sources() -> Mapping[Path, ast.Module]:
    """The parsed files below ``packages/*/src``."""
    return {
        path: parse(path)
        for path in files()
        if path.suffix == ".py" and path.parts[0] == "packages" and path.parts[2] == "src"
    }


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def part(path: Path) -> str:
    return path.parts[1] if path.parts[0] == "packages" else path.parts[0] if len(path.parts) > 1 else "."


def module_name(path: Path) -> str:
    """Import name of a file below ``packages/*/src``."""
    parts = path.with_suffix("").parts[3:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def definitions(
    node: ast.AST, classes: tuple[ast.ClassDef, ...] = (), inside_function: bool = False
) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield Definition(child, classes, inside_function)
            yield from definitions(child, (), True)
        elif isinstance(child, ast.ClassDef):
            yield Definition(child, classes, inside_function)
            yield from definitions(child, (*classes, child), inside_function)
        else:
            yield from definitions(child, classes, inside_function)


# --- sizes ------------------------------------------------------------------------------------------------------------


def lines_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines from ``def`` to the last statement, comments and blanks included.

    Decorators and the function's own docstring do not count; functions inside of it do.
    """
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function, clean=False) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def long_functions() -> Iterator[Offence]:
    """Functions of more than ``MAXIMUM_FUNCTION_LINES`` lines."""
    for path, tree in sources().items():
        for node, _, _ in definitions(tree):
            if not isinstance(node, ast.ClassDef) and lines_of(node) > MAXIMUM_FUNCTION_LINES:
                yield Offence(part(path), f"{path}:{node.lineno}", f"{node.name} has {lines_of(node)} lines")


# --- imports ----------------------------------------------------------------------------------------------------------


def imports(tree: ast.AST, package: str = "") -> Iterator[tuple[int, str]]:
    """Yield line and full name of every import of a tree, inside functions and ``if TYPE_CHECKING`` too.

    ``from a import b`` is ``a.b``, whether ``b`` is a module or not. Relative imports are resolved against ``package``.
    Calls of ``import_module`` and ``__import__`` count if the name is a constant.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0] if node.args else None
            if called in ("import_module", "__import__", "importorskip") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def against_the_arrows() -> Iterator[Offence]:
    """Imports from a package into one that must not know it, in sources and tests."""
    folders = {folder: module for module, folder in MODULES.items()}
    for path in files():
        if path.suffix != ".py" or path.parts[0] != "packages" or path.parts[1] not in folders:
            continue
        module = folders[path.parts[1]]
        allowed = {module, *MAY_IMPORT[module]}
        allowed |= TESTS_MAY_IMPORT.get(module, set()) if path.parts[2] == "tests" else set()
        for line, name in imports(parse(path)):
            ours = name.split(".")[0] in MAY_IMPORT
            if ours and not any(f"{name}.".startswith(f"{prefix}.") for prefix in allowed):
                yield Offence(part(path), f"{path}:{line}", f"imports {name}")


def import_graph(module: str) -> dict[str, dict[str, int]]:
    """Which modules of a package import which others, and in which line; type-only and late imports count.

    The package that a module is in is no edge of it unless it is imported from.
    """
    trees = {module_name(path): (path, tree) for path, tree in sources().items() if path.parts[3] == module}
    graph: dict[str, dict[str, int]] = {name: {} for name in trees}
    for name, (path, tree) in trees.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for line, imported in imports(tree, package):
            target = imported if imported in trees else imported.rpartition(".")[0]
            if target in trees and target != name:
                graph[name].setdefault(target, line)
    return graph


def components(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            position = stack.index(node)
            if len(stack) - position > 1:
                found.append(sorted(stack[position:]))
            del stack[position:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def import_cycles() -> Iterator[Offence]:
    """Imports inside of a cycle of modules: cutting some of them leaves none."""
    for module, folder in MODULES.items():
        graph = import_graph(module)
        paths = {module_name(path): path for path in sources()}
        for component in components(graph):
            for name in component:
                for other in sorted(set(graph[name]) & set(component)):
                    place = f"{paths[name]}:{graph[name][other]}"
                    yield Offence(folder, place, f"imports {other}, which imports it ({len(component)} modules)")


# --- words ------------------------------------------------------------------------------------------------------------

BLANK = r"""(?:[\s_#]|["']\s*[rf]?["'])+"""
BANNED_WORDS = re.compile(
    rf"(?<![^\W_])(?i:{'|'.join(phrase.replace(' ', BLANK) for phrase in BANNED)})(?![^\W_])"
    rf"|(?<=[\"'])(?:{'|'.join(BANNED_AT_START)})\b"
)
NOT_READ = {Path(name) for name in ("uv.lock", "tests/source_checks.py", "tests/test_architecture.py")}
PROSE = {".py", ".md", ".yaml", ".yml", ".toml", ".sh", ".sbatch"}


def banned_words() -> Iterator[Offence]:
    """Words of the list in any text: names, strings, comments, docstrings, pages, configurations."""
    for path in files():
        if path.suffix not in PROSE or path in NOT_READ:
            continue
        text = (ROOT / path).read_text()
        for found in BANNED_WORDS.finditer(text):
            line = text.count("\n", 0, found.start()) + 1
            context = text.splitlines()[line - 1].strip()
            yield Offence(part(path), f"{path}:{line}", f'"{" ".join(found[0].split())}": {context[:100]}')


# --- docstrings -------------------------------------------------------------------------------------------------------


class Classes:
    """The classes of all packages by name, to see what a method implements."""

    def __init__(self) -> None:
        self.named: dict[str, list[ast.ClassDef]] = defaultdict(list)
        for tree in sources().values():
            for node, _, _ in definitions(tree):
                if isinstance(node, ast.ClassDef):
                    self.named[node.name].append(node)
        self.protocols = [
            node for nodes in self.named.values() for node in nodes if "Protocol" in map(base_name, node.bases)
        ]

    def ancestors(self, node: ast.ClassDef, seen: frozenset[str] = frozenset()) -> Iterator[ast.ClassDef]:
        for name in {base_name(base) for base in node.bases} - seen:
            for base in self.named.get(name, ()):
                yield base
                yield from self.ancestors(base, seen | {name})

    def names(self, node: ast.ClassDef) -> set[str]:
        return {item.name for owner in (node, *self.ancestors(node)) for item in methods(owner)}

    def documents(self, node: ast.ClassDef, method: str) -> bool:
        """Whether a base class, or a protocol all of whose methods the class has, documents ``method``."""
        contracts = list(self.ancestors(node))
        contracts += [protocol for protocol in self.protocols if self.names(protocol) <= self.names(node)]
        return any(item.name == method and ast.get_docstring(item) for base in contracts for item in methods(base))


def base_name(base: ast.expr) -> str:
    base = base.value if isinstance(base, ast.Subscript) else base
    return base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")


def methods(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [item for item in node.body if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef))]


# Methods that a class of another library asks for, which says there what they do.
FOREIGN_HOOKS = {
    "Function": {"forward", "backward", "setup_context"},
    "Module": {"forward"},
    "Thread": {"run"},
    "Group": {"get_command", "list_commands", "resolve_command", "format_help", "parse_args", "invoke", "main"},
    "Command": {"format_help", "parse_args", "invoke", "get_help"},
    "ParamType": {"convert", "get_metavar", "shell_complete"},
    "Path": {"convert"},
    "Handler": {"emit"},
    "BaseHTTPRequestHandler": {"log_message", "do_GET", "do_POST"},
}
WITHOUT_DOCSTRING = {"overload", "override", "field_validator", "model_validator", "setter"}


def undocumented() -> Iterator[Offence]:
    """Public classes, functions and methods without docstring.

    Public is what has no leading underscore in its name, its classes' names and its module's path, and is not inside of
    a function. Left out: methods with two underscores; those whose contract is documented by a base class, by a
    protocol that the class implements, or by another library (``FOREIGN_HOOKS``); pydantic validators, overloads and
    setters; tests of conformance suites, whose names are sentences.
    """
    classes = Classes()
    for path, tree in sources().items():
        if any(name.startswith("_") and name != "__init__" for name in path.with_suffix("").parts[3:]):
            continue
        for node, around, inside_function in definitions(tree):
            names = (node.name, *(owner.name for owner in around))
            if inside_function or any(name.startswith("_") for name in names) or node.name.startswith("test_"):
                continue
            decorators = {base_name(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list}
            if ast.get_docstring(node) or decorators & WITHOUT_DOCSTRING:
                continue
            if around and not isinstance(node, ast.ClassDef):
                bases = {
                    base_name(base) for owner in (around[-1], *classes.ancestors(around[-1])) for base in owner.bases
                }
                if classes.documents(around[-1], node.name) or any(
                    node.name in FOREIGN_HOOKS.get(base, ()) for base in bases
                ):
                    continue
            yield Offence(part(path), f"{path}:{node.lineno}", f"{'.'.join(names[::-1])} has no docstring")


# First words that make a docstring a phrase about the function instead of a sentence of what it does.
NO_VERB = re.compile(
    "an?|the|th(is|at|ese|ose)|its?|wh(at|ich|ere|ether|en|o|y|atever)|how|if|as|at|by|for|from|in|into|of|on|over|per"
    "|to|with|without|under|inside|all|any|each|every|both|one|two|three|no|none|nothing|only|also|same|new",
    re.IGNORECASE,
)


def first_words() -> Iterator[Offence]:
    """Docstrings of functions that do not start with a verb in the imperative, as far as a list of words can tell.

    Properties are named by nouns and left out, and so are tests.
    """
    for path, tree in sources().items():
        for node, _, _ in definitions(tree):
            docstring = None if isinstance(node, ast.ClassDef) else ast.get_docstring(node)
            decorators = {base_name(item.func if isinstance(item, ast.Call) else item) for item in node.decorator_list}
            if not docstring or decorators & {"property", "cached_property", "computed_field"}:
                continue
            word = re.split(r"[^\w'`-]", docstring, maxsplit=1)[0]
            third_person = word.endswith("s") and not word.endswith("ss") and word.isalpha()
            if (NO_VERB.fullmatch(word) or third_person) and not node.name.startswith("test_"):
                yield Offence(part(path), f"{path}:{node.lineno}", f"{node.name}: {docstring.splitlines()[0][:90]}")


CHECKS = {
    "long functions": long_functions,
    "against the arrows": against_the_arrows,
    "import cycles": import_cycles,
    "banned words": banned_words,
    "undocumented": undocumented,
    "docstrings without verb": first_words,
}


@cache
def offences(check: str) -> tuple[Offence, ...]:
    return tuple(CHECKS[check]())


def counts(check: str) -> dict[str, int]:
    """Number of offences by part; parts without are left out."""
    return dict(sorted(Counter(offence.part for offence in offences(check)).items()))


def main(arguments: list[str]) -> None:
    for check in CHECKS:
        print(f"{check}: {counts(check)}")
        for offence in offences(check):
            if offence.part in arguments:
                print(f"  {offence}")


if __name__ == "__main__":
    main(sys.argv[1:])
