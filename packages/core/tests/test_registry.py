import pytest

from rlcore.config import Config
from rlcore.config.registry import NoParams, Registry, registry_of_kind
from rlcore.errors import BatchError, PluginError


@pytest.fixture
def shapes() -> Registry:
    registry: Registry = Registry("shape", columns=True, units=True)

    class SquareParams(Config):
        side: int = 1

    @registry.register("square", params=SquareParams, required_columns={"corners"})
    def square(params):
        """Four sides.

        More about it.
        """

    @registry.register("circle")
    def circle(params): ...

    return registry


def test_entry_holds_what_was_registered(shapes):
    entry = shapes.get("square")
    assert (entry.kind, entry.name, entry.required_columns, entry.summary) == (
        "shape",
        "square",
        frozenset({"corners"}),
        "Four sides.",
    )
    assert entry.params().side == 1
    assert shapes.get("circle").params is NoParams
    assert shapes.get("circle").summary == ""


def test_declared_columns_are_checked(shapes):
    with pytest.raises(BatchError, match=r"the shape 'square' needs the column 'corners', which .* it has area, edges"):
        shapes.get("square").check_columns(["edges", "area"])
    shapes.get("square").check_columns(["edges", "corners"])
    shapes.register("mosaic", required_columns={"corners"}, together="tile")(lambda params: None)
    assert shapes.get("mosaic").required_columns == {"corners", "tile"}
    assert shapes.get("mosaic").together == "tile"


@pytest.mark.parametrize("declared", [{"required_columns": {"corners"}}, {"together": "tile"}], ids=str)
def test_a_declaration_without_effect_is_refused(declared):
    with pytest.raises(PluginError, match=r"line 'x' declares .*, which functions of this kind do not get"):
        Registry("line").register("x", **declared)


def test_iterates_by_name(shapes):
    assert [entry.name for entry in shapes] == ["circle", "square"]


def test_unknown_name(shapes):
    with pytest.raises(PluginError, match=r"unknown shape 'sqare'; did you mean 'square'\?"):
        shapes.get("sqare")
    with pytest.raises(PluginError, match="unknown shape 'xyz'; known: circle, square"):
        shapes.get("xyz")


def test_name_of_another_module_is_not_taken_over(shapes):
    def impostor(params): ...

    impostor.__module__ = "acme"
    with pytest.raises(PluginError, match=r"shape 'square' is already registered by .*test_registry"):
        shapes.register("square")(impostor)


def test_module_may_register_again_when_it_is_reloaded(shapes):
    def square(params): ...

    shapes.register("square")(square)
    assert shapes.get("square").function is square


def test_found_by_kind(shapes):
    assert registry_of_kind("shape") is shapes


def test_an_unknown_trait_is_refused(shapes):
    with pytest.raises(PluginError, match=r"'x' has unknown traits: vanishes_with_advantages; known: compares_group, "):
        shapes.register("x", traits={"vanishes_with_advantages"})
