"""From the keys of a verl command to the configuration of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Assignment, Translation, Untranslated, VerlCommand
from rlcore_recipes.from_verl.differences import differences, fixed_settings
from rlcore_recipes.from_verl.keys.entries import NoEquivalent, NothingToSet, Several
from rlcore_recipes.from_verl.keys.table import Table, table_of

NOTHING_TO_SET = "nothing to set"
"""How the reason of a key begins that rlcore follows without a setting."""

SECTIONS = (
    "model",
    "data",
    "actor",
    "critic",
    "ref",
    "rollout",
    "reward",
    "reward_model",
    "algorithm",
    "async",
    "trainer",
    "controller",
    "weight_sync",
)
"""Order of the sections of a recipe's configuration."""


def translate(command: VerlCommand) -> Translation:
    """Return the recipe and the configuration that do what ``command`` does.

    Every assignment of ``command`` is in a comment of the configuration or among the untranslated ones. Defaults of
    verl that differ from rlcore's are written out.

    Raises:
        ConfigError: the command trains nothing, or a number is none.
    """
    table = table_of(command.entry)
    assignments, lost = _effective(command.assignments, table)
    verl = table.view(command.entry, {name: a.value for name, a in assignments.items()})
    found = _Found()
    for settings, comment in fixed_settings(verl):
        found.add(settings, comment)
    for entry in table:
        if entry.written and not verl.given(entry.name):
            try:
                values = _settings(entry.ours, entry.convert(verl.get(entry.name), verl), entry.name, entry.name)
            except NoEquivalent:
                continue
            found.add(values, f"verl's default of {entry.name}")
    given: set[str] = set()
    for name, assignment in assignments.items():
        known = table.find(name)
        if known is None and assignment.value in (None, {}) and table.has_section(name):
            lost.append(Untranslated(assignment, f"{NOTHING_TO_SET}: the section is empty", understood=True))
            continue
        if known is None:
            lost.append(Untranslated(assignment, _unknown(name, table), understood=False))
            continue
        try:
            values = _settings(known.ours, known.convert(verl.get(name), verl), name, known.name)
        except NothingToSet as reason:
            lost.append(Untranslated(assignment, f"{NOTHING_TO_SET}: {reason}", understood=True))
        except NoEquivalent as reason:
            lost.append(Untranslated(assignment, str(reason), understood=True))
        except ConfigError as error:
            raise ConfigError(str(error) if name in str(error) else f"{name}: {error}") from None
        else:
            found.add(values, assignment.key, joined=given)
    order = {id(a): place for place, a in enumerate(command.assignments)}
    lost.sort(key=lambda u: order.get(id(u.assignment), len(order)))
    return Translation(verl.recipe, found.nested(_order(table)), found.comments, tuple(lost), tuple(differences(verl)))


@dataclass
class _Found:
    """Values of rlcore's keys, and where they come from."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)

    def add(self, settings: Mapping[str, Any], source: str, joined: set[str] | None = None) -> None:
        """Add ``settings`` of ``source``.

        Args:
            joined: keys that earlier sources of the same kind have set; their comments name all sources.
        """
        for name, value in settings.items():
            # null for a section, and keys of that section: the later ones count
            for other in [o for o in self.values if o.startswith(f"{name}.") or name.startswith(f"{o}.")]:
                del self.values[other], self.comments[other]
            if joined is not None and name in joined and name in self.comments:
                self.comments[name] += f", {source}"
            else:
                self.comments[name] = source
            self.values[name] = value
            if joined is not None:
                joined.add(name)

    def nested(self, order: Mapping[str, int]) -> dict[str, Any]:
        """Return the values as in a file, sections in their usual order and keys by ``order``."""

        def place(name: str) -> tuple[int, int]:
            section = name.partition(".")[0]
            return SECTIONS.index(section) if section in SECTIONS else -1, order.get(name, len(order))

        tree: dict[str, Any] = {}
        for name, value in sorted(self.values.items(), key=lambda item: place(item[0])):
            *sections, last = name.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return tree


def _order(table: Table) -> dict[str, int]:
    """Return the place of each key of rlcore in the order of ``table``."""
    return {name: place for place, name in enumerate(dict.fromkeys(n for entry in table for n in entry.ours))}


def _settings(ours: tuple[str, ...], converted: Any, name: str, entry: str) -> Mapping[str, Any]:
    if isinstance(converted, Several):
        return converted
    target = ours[0]
    if target.endswith(".*"):  # `name` may have another prefix than `entry`: old names of the section
        rest = name.removeprefix(entry.removesuffix("*"))
        return {f"{target.removesuffix('*')}{rest}": converted}
    return {target: converted}


def _effective(given: tuple[Assignment, ...], table: Table) -> tuple[dict[str, Assignment], list[Untranslated]]:
    """Return the assignment that counts for each key, dictionaries taken apart; and those without effect."""
    lost: list[Untranslated] = []
    found: dict[str, Assignment] = {}
    for assignment in given:
        if assignment.prefix == "~":
            reason = f"{NOTHING_TO_SET}: it deletes the key, and rlcore's default applies"
            lost.append(Untranslated(assignment, reason, understood=table.find(assignment.key) is not None))
            found.pop(table.canonical(assignment.key), None)
            continue
        for part in _parts(assignment, table):
            name = table.canonical(part.key)
            if name in found:
                earlier, later = found.pop(name), part
                if _is_left_out(later, earlier, table):
                    earlier, later = later, earlier
                reason = f"{NOTHING_TO_SET}: {later.key} at {later.place} overrides it"
                lost.append(Untranslated(earlier, reason, understood=True))
                part = later
            found[name] = part
    return found, lost


def _is_left_out(later: Assignment, earlier: Assignment, table: Table) -> bool:
    """Return whether ``later`` is a second name of the same key that has its default only.

    A complete configuration of verl has all names of a key, of which its user sets one.
    """
    if later.key == earlier.key or earlier.value is None:
        return False
    known = table.find(later.key)
    return later.value is None or (known is not None and later.value == known.default)


def _parts(assignment: Assignment, table: Table) -> Iterator[Assignment]:
    """Yield ``assignment``, or one for each key in it if its value is a section."""
    if not isinstance(assignment.value, dict) or table.find(assignment.key) is not None or not assignment.value:
        yield assignment
        return
    for name, value in assignment.value.items():
        yield from _parts(replace(assignment, key=f"{assignment.key}.{name}", value=value), table)


def _unknown(name: str, table: Table) -> str:
    close = get_close_matches(name, table.names, n=2, cutoff=0.8)
    return "is not a key of verl that is known" + (f"; did you mean {' or '.join(close)}?" if close else "")
