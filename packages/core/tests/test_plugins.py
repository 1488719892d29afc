import pytest

from rlcore import plugins
from rlcore.cli.plugins import Installed, installed
from rlcore.errors import PluginError, RlcoreWarning
from rlcore.plugins import Plugin

ENGINES = "rlcore.train_engines"
PLUGIN = """
from rlcore.config import Config
from rlcore.plugins import Plugin

class Settings(Config):
    depth: int = 1

def build(*args, **kwargs):
    return args, kwargs

engine = Plugin(interface=INTERFACE, config="MODULE:Settings", factory="MODULE:build", summary="A test engine.")
"""


def source(module: str, interface: int = 1) -> str:
    return PLUGIN.replace("MODULE", module).replace("INTERFACE", str(interface))


def test_third_party_plugin_is_found_configured_and_built(distribution):
    distribution("acme-engines", {ENGINES: {"acme": "acme_plugin:engine"}}, {"acme_plugin": source("acme_plugin")})
    assert "acme" in plugins.names(ENGINES)
    plugin = plugins.get(ENGINES, "acme")
    assert plugin.config_class()(depth=3).model_dump() == {"depth": 3}
    assert plugin.build(1, two=2) == ((1,), {"two": 2})
    assert plugins.origin(ENGINES, "acme") == "acme-engines 1.5"


def test_listing_names_does_not_import_them(distribution):
    distribution(
        "acme-engines", {ENGINES: {"acme": "acme_broken:engine"}}, {"acme_broken": "raise SystemExit('imported')"}
    )
    assert "acme" in plugins.names(ENGINES)


def test_unknown_name_suggests_close_ones(distribution):
    distribution("acme-engines", {ENGINES: {"acmestyle": "acme_plugin:engine"}}, {"acme_plugin": source("acme_plugin")})
    with pytest.raises(PluginError, match=r"unknown training engine 'acmestlye'; did you mean 'acmestyle'\?"):
        plugins.get(ENGINES, "acmestlye")


def test_unknown_name_without_close_ones_lists_what_is_installed(distribution):
    distribution("acme-engines", {ENGINES: {"acme": "acme_plugin:engine"}}, {"acme_plugin": source("acme_plugin")})
    with pytest.raises(PluginError, match=r"unknown training engine 'qqqqqq'; installed: .*acme"):
        plugins.get(ENGINES, "qqqqqq")


def test_missing_package_of_ours_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(plugins, "_points", lambda group: {})
    with pytest.raises(
        PluginError, match=r"training engine 'fsdp' is not installed; run: pip install 'rlcore\[fsdp\]'"
    ):
        plugins.get(ENGINES, "fsdp")


def test_close_match_may_be_one_of_ours_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(plugins, "_points", lambda group: {})
    with pytest.raises(PluginError, match="did you mean 'megatron'"):
        plugins.get(ENGINES, "megatorn")


def test_wrong_interface_version_names_both(distribution):
    distribution("acme-engines", {ENGINES: {"acme": "acme_old:engine"}}, {"acme_old": source("acme_old", interface=7)})
    with pytest.raises(
        PluginError, match=r"\(acme-engines 1\.5\) was written for interface 7, but this rlcore supports 1"
    ):
        plugins.get(ENGINES, "acme")


def test_import_failure_says_whose_and_why(distribution):
    distribution("acme-engines", {ENGINES: {"acme": "acme_plugin:engine"}}, {"acme_plugin": "import not_there"})
    with pytest.raises(PluginError, match=r"\(acme-engines 1\.5\) cannot be imported: ModuleNotFoundError: ") as raised:
        plugins.get(ENGINES, "acme")
    assert isinstance(raised.value.__cause__, ModuleNotFoundError)


def test_entry_point_that_is_no_plugin(distribution):
    distribution("acme-engines", {ENGINES: {"acme": "acme_plugin:engine"}}, {"acme_plugin": "engine = 3"})
    with pytest.raises(PluginError, match=r"acme_plugin:engine is not an rlcore\.plugins\.Plugin"):
        plugins.get(ENGINES, "acme")


def test_name_offered_twice_names_both_packages(distribution):
    for name in ("acme-one", "acme-two"):
        module = name.replace("-", "_")
        distribution(name, {ENGINES: {"acme": f"{module}:engine"}}, {module: source(module)})
    with pytest.raises(PluginError, match=r"offered by acme-(one|two) 1\.5 and acme-(one|two) 1\.5; uninstall"):
        plugins.get(ENGINES, "acme")


@pytest.mark.parametrize("attribute", ["config", "factory"])
def test_backend_that_cannot_be_imported_is_a_plugin_error(attribute):
    paths = {
        "config": "rlcore.config.registry:NoParams",
        "factory": "rlcore.config.registry:NoParams",
        attribute: "no_such_backend:x",
    }
    plugin = Plugin(interface=1, **paths)
    with pytest.raises(PluginError, match="no_such_backend:x cannot be imported: ModuleNotFoundError"):
        plugin.config_class() if attribute == "config" else plugin.build()


def test_errors_inside_a_factory_are_not_touched():
    with pytest.raises(ZeroDivisionError):
        Plugin(interface=1, config="", factory="operator:truediv").build(1, 0)


def listed(group: str) -> dict[str, Installed]:
    return {item.name: item for item in installed() if item.group == group}


def test_listing_imports_what_plugins_name_and_one_broken_plugin_costs_only_itself(distribution, monkeypatch):
    group = "rlcore.test_engines"  # not the backends and commands installed here
    monkeypatch.setattr(plugins, "GROUPS", {group: ("training engine", 1)})
    monkeypatch.setattr(plugins, "COMMANDS", "rlcore.test_commands")
    template = source("acme_plugin")
    needy = "    def packages(self):\n        yield '', Package('no_such_package', 'some[thing]')\n"
    modules = {
        "acme_plugin": template,
        "acme_bad": "1 / 0",
        "acme_exits": "raise SystemExit(3)",
        "acme_factory": template.replace('factory="acme_plugin:build"', 'factory="acme_backend:build"'),
        "acme_uncallable": template.replace("acme_plugin", "acme_uncallable").replace(":build", ":number")
        + "number = 3",
        "acme_config": template.replace('config="acme_plugin:Settings"', 'config="acme_gone:Settings"'),
        "acme_no_config": template.replace("acme_plugin:Settings", "acme_plugin:build"),
        "acme_configs": template.replace('summary="', 'configs="acme_gone", summary="'),
        "acme_raises": template.replace("acme_plugin", "acme_raises").replace(
            "    depth: int = 1", "    def problems(self):\n        return 1 / 0"
        ),
        "acme_needy": template.replace("acme_plugin:Settings", "acme_needy:Settings")
        .replace("import Plugin", "import Plugin\nfrom rlcore.packages import Package")
        .replace("    depth: int = 1", needy),
    }
    points = {
        group: {name.removeprefix("acme_"): f"{name}:engine" for name in modules},
        "rlcore.algorithms": {"acme": "acme_bad"},
    }
    distribution("acme-engines", points, modules)
    found = listed(group)
    assert (found["plugin"].problem, found["plugin"].missing) == ("", ())
    assert found["plugin"].distribution == "acme-engines 1.5"
    for name, words in {
        "bad": "ZeroDivisionError",
        "exits": "cannot be imported: SystemExit: 3",
        "factory": "factory acme_backend:build cannot be imported: ModuleNotFoundError",
        "uncallable": "factory acme_uncallable:number is not callable: it is of type int",
        "config": "configuration acme_gone:Settings cannot be imported",
        "no_config": "configuration acme_plugin:build is not a subclass of rlcore.config.Config",
        "configs": "configurations acme_gone cannot be found",
        "raises": "the defaults of acme_raises:Settings cannot be used: ZeroDivisionError",
    }.items():
        assert words in found[name].problem, name
    assert [package.install for package in found["needy"].missing] == ["some[thing]"]
    assert "ZeroDivisionError" in listed("rlcore.algorithms")["acme"].problem


def test_algorithms_of_other_packages_are_imported_once_and_failures_named(distribution):
    distribution(
        "acme-algorithms",
        {"rlcore.algorithms": {"acme": "acme_algorithms"}},
        {
            "acme_algorithms": "from rlcore.algorithms.registries import advantages\n"
            "@advantages.register('acme_advantage')\ndef acme(batch, params):\n    '''Acme's.'''\n"
        },
    )
    from rlcore.algorithms.registries import advantages

    try:
        assert advantages.get("acme_advantage").summary == "Acme's."
    finally:
        advantages._entries.pop("acme_advantage", None)


def test_a_broken_algorithms_package_costs_only_itself(distribution):
    distribution("acme-algorithms", {"rlcore.algorithms": {"acme": "acme_algorithms"}}, {"acme_algorithms": "1 / 0"})
    from rlcore.algorithms.registries import advantages

    words = r"algorithms 'acme' \(acme-algorithms 1\.5\) cannot be imported: ZeroDivision"
    with pytest.warns(RlcoreWarning, match=words):
        assert advantages.get("grpo").name == "grpo"
    with pytest.raises(PluginError, match=rf"unknown advantage estimator 'acme_advantage'; .*; {words}"):
        advantages.get("acme_advantage")
