"""Help on the keys of a configuration: an overview, one section, every key, or those with a word in their name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlcore.config import Config
from rlcore.config.hints import Hints
from rlcore.config.keys import Key, Section, required, sections
from rlcore.errors import ConfigError

ALL = "all"
_WIDE = 110  # columns from which on descriptions stand to the right of their keys
_LONGEST_DEFAULT = 48


@dataclass(frozen=True)
class _Place:
    """A key and the section that it is in."""

    section: Section
    key: Key

    @property
    def name(self) -> str:
        return _join(self.section.path, self.key.name)


class KeyHelp:
    """Prints help on the keys of ``model``. ``command`` is how this help is asked for, for the hints in it."""

    def __init__(self, console: Console, model: type[Config], command: str) -> None:
        self._console = console
        self._model = model
        self._command = command
        self._sections = list(sections(model))
        self._paths = {section.path for section in self._sections}

    def print(self, topic: str) -> None:
        """Print the keys of ``topic``: a section, a word in the names of keys, `ALL`, or "" for the overview.

        Raises:
            ConfigError: nothing is called so.
        """
        topic = topic.partition("=")[0].rstrip(".…*")
        if not topic:
            self._print_overview()
        elif topic == ALL:
            self._print_all()
        elif any(section.path == topic for section in self._sections):
            self._print_section(topic)
        else:
            self._print_found(topic)

    def _print_overview(self) -> None:
        self._title("Required keys")
        needed = set(required(self._model))
        places = (_Place(section, key) for section in self._sections for key in section.keys)
        self._keys(place for place in places if place.name in needed)
        self._title("Sections")
        self._collapsed("")
        top = [key.name for key in self._sections[0].keys if key.name not in self._paths]
        if top:
            self._console.print(Text(f"  and the keys {', '.join(top)}"))
        self._console.print()
        for topic, what in (
            ("SECTION", "the keys of a section (actor.optim)"),
            ("WORD", "keys with a word in their name (length)"),
            (ALL, "every key"),
        ):
            self._console.print(Text(f"  {self._command} {topic:<8} {what}"))

    def _print_section(self, path: str) -> None:
        parent, _, name = path.rpartition(".")
        itself = [(section, key) for section in self._sections for key in section.keys if section.path == parent]
        self._keys(_Place(section, key) for section, key in itself if key.name == name)
        for section in self._sections:
            if section.path == path:
                self._title(f"{path}.…", section.description)
                self._keys(_Place(section, key) for key in section.keys)
        if self._children(path):
            self._title("Sections below")
            self._collapsed(path)

    def _print_all(self) -> None:
        printed: dict[type[Config], Section] = {}
        for section in self._sections:
            if not section.keys and section.model is not None:
                continue
            self._title(f"{section.path}.…" if section.path else "(top level)", section.description)
            first = printed.get(section.model) if section.model is not None else None
            if first is not None and len(first.keys) == len(section.keys) > 0:
                self._console.print(Text(f"  {_same(section, first)}"))
                continue
            if section.model is not None:
                printed[section.model] = section
            self._keys(_Place(section, key) for key in section.keys)

    def _print_found(self, word: str) -> None:
        found = [
            _Place(section, key)
            for section in self._sections
            for key in section.keys
            if word.lower() in _join(section.path, key.name).lower()
        ]
        if not found:
            *place, last = word.split(".")
            hint = Hints(self._model).key((*place, last), [section.path for section in self._children("")])
            raise ConfigError(f"no section is called {word!r}, and no key has it in its name; {hint}")
        self._title(f"Keys with {word} in their name")
        self._keys(found)

    def _title(self, title: str, description: str = "") -> None:
        self._console.print()
        self._console.print(Text.assemble((title, "bold cyan"), f"  {description}" if description else ""))

    def _keys(self, places: Iterable[_Place]) -> None:
        rows = [(_assignment(place), _meaning(place)) for place in places]
        width = self._console.width
        if width < _WIDE:
            for assignment, meaning in rows:
                self._console.print(Padding(assignment, (0, 0, 0, 2)))
                self._console.print(Padding(meaning, (0, 0, 0, 6)))
            return
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), expand=True)
        table.add_column(width=min(max((len(row) for row, _ in rows), default=0) + 2, width * 2 // 5), overflow="fold")
        table.add_column(ratio=1)
        for assignment, meaning in rows:
            table.add_row(Padding(assignment, (0, 0, 0, 2)), meaning)
        self._console.print(table)

    def _children(self, path: str) -> list[Section]:
        """Return the sections directly below ``path``, the parameters of an algorithm counted once."""
        found: dict[str, Section] = {}
        for section in self._sections:
            inside = section.path != path and section.path.startswith(f"{path}." if path else "")
            if inside and not any(_within(section.path, name) for name in found):
                found[section.path] = section
        return list(found.values())

    def _collapsed(self, path: str) -> None:
        """Return a line per section below ``path``: how many keys it has, and what it is."""
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, style="bold")
        table.add_column(no_wrap=True, justify="right", style="green")
        table.add_column()
        for child in self._children(path):
            inside = [section for section in self._sections if _within(section.path, child.path)]
            count = sum(len(section.keys) for section in inside)
            broken = not count and any(section.model is None for section in inside)
            table.add_row(f"  {child.path}", "broken" if broken else _counted(count), Text(child.description))
        self._console.print(table)


def _assignment(place: _Place) -> Text:
    """``key=default``, as an override is written."""
    key = place.key
    text = Text(place.name, "bold")
    if key.default is None:
        text.append("=…", "bold red")
    elif key.default:
        cut = key.default if len(key.default) <= _LONGEST_DEFAULT else f"{key.default[: _LONGEST_DEFAULT - 1]}…"
        text.append(f"={cut}", "green")
    return text


def _meaning(place: _Place) -> Text:
    text = Text.assemble((place.key.type, "magenta"), f"  {place.key.description}".rstrip())
    model = place.section.model
    for name, form in model.short_forms.items() if model is not None and place.key.default is None else ():
        if place.key.name in form.sets:
            text.append(f" Or give {_join(place.section.path, name)}.")
    return text


def _same(section: Section, first: Section) -> str:
    """Return a line saying that ``section`` has the keys of ``first``, and which defaults differ."""
    others = [
        f"{key.name}={key.default}"
        for key, other in zip(section.keys, first.keys)
        if key.default != other.default and key.default is not None
    ]
    return f"as {first.path} ({_counted(len(section.keys))})" + (f", with {', '.join(others)}" if others else "")


def _counted(keys: int) -> str:
    return f"{keys} key{'s' * (keys > 1)}" if keys else "no keys"


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _within(path: str, section: str) -> bool:
    """Return whether ``path`` is ``section`` or below it."""
    return path == section or path.startswith((f"{section}.", f"{section}["))
