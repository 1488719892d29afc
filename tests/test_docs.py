"""Every code block of the documentation: Python runs, configurations and commands are valid as they are printed.

Blocks of a page run in the page's order, in one folder that has the files they speak of. What is run elsewhere:
``examples/README.md`` by ``test_examples.py``, the core package's Python by ``test_batch_readme.py``.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import runpy
import shlex
import textwrap
import tomllib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import click
import pytest
import yaml
from click.testing import CliRunner

from rlcore import plugins
from rlcore.cli import recipes
from rlcore.cli.command_tree import cli
from rlcore.config import validate_config
from rlcore.config.keys import sections
from rlcore.engines import RolloutEngine, RolloutSpec
from rlcore.errors import ConfigError, RlcoreError
from rlcore_kit.testing.tiny_model import tiny_model
from rlcore_recipes.python.train import train
from source_checks import MAY_IMPORT, MODULES, module_name, parse, sources

ROOT = Path(__file__).parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("packages/*/README.md"))]
}
ENTRY_POINT_GROUPS = {*plugins.GROUPS, "rlcore.algorithms", "rlcore.commands", "rlcore.functions", "rlcore.data_sets"}
RECIPES = ("grpo", "ppo", "dapo", "raft", "prime", "self_play", "distill", "sft", "dpo", "online_dpo", "spin", "rm")
WITHOUT_ROLLOUTS = ("sft", "dpo", "rm")
# What a command, or a part of a configuration, leaves out where it says "…".
LEFT_OUT: Mapping[str, Any] = {
    "model": {"path": "my-model"},
    "data": {"train_files": ["a.parquet"], "val_files": ["b.parquet"]},
    "trainer": {"out_dir": "runs/a"},
}
FOR_REINFORCEMENT: Mapping[str, Any] = {
    "data": {"max_prompt_length": 512, "max_response_length": 1024},
    "reward": {"name": "gsm8k"},
}


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: str) -> Iterator[Block]:
    """Fenced blocks, and indented ones: Python below a comment with a file's name, shell commands otherwise."""
    text = PAGES[page]
    fenced = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
    for found in fenced.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start(2)))
    without = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"(?<=\n\n)(?:    .*\n)+", without):
        content = textwrap.dedent(found[0])
        language = "python" if re.match(r"# \w+\.py\n", content) else "bash"
        yield Block(language, content, without.count("\n", 0, found.start()))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and without what follows a pipe."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = list(itertools.takewhile(lambda word: word not in ("|", ">", "&&"), shlex.split(line, comments=True)))
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, later ones over earlier ones."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both else value
    return result


@cache
def configuration_of(recipe: str) -> Any:
    return plugins.get(recipes.GROUP, recipe).config_class()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "my-model", max_position_embeddings=4096)


@pytest.fixture
def folder(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that pages name: a model, a reward, and the configurations that two of the pages print."""
    (tmp_path / "my-model").symlink_to(model)
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    for page, language, name in (
        ("README.md", "python", "my_reward.py"),
        ("docs/configuration.md", "yaml", "my.yaml"),
        ("docs/real-input.md", "yaml", "gsm8k.yaml"),
    ):
        (tmp_path / name).write_text(next(block.text for block in blocks(page) if block.language == language))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inline engine in the place of inference servers; no algorithm stays registered; short runs."""
    from rlcore.algorithms.registries import advantages, policy_losses, preference_losses
    from rlcore.plugins import import_algorithms
    from rlcore_inline.engine import build
    from rlcore_inline.settings import InlineSettings

    one_by_one = Lock()  # threads cannot load models at the same time

    def inline(spec: RolloutSpec) -> RolloutEngine:
        with one_by_one:
            return build(replace(spec, options=InlineSettings(), max_model_len=64))

    for module in ("rlcore_vllm.engine", "rlcore_sglang.engine", "rlcore_http.engine"):
        monkeypatch.setattr(f"{module}.build", inline)
    import_algorithms()  # those of installed packages are no part of a page, and stay registered after it
    for registry in (advantages, policy_losses, preference_losses):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr("rlcore_recipes.python.train.train", train_a_little)


def train_a_little(recipe: str, overrides: Mapping[str, Any] | None = None, **given: Any) -> Any:
    """Run `rlcore.train` with sizes for a test."""
    sizes = {"data.train_batch_size": 2, "trainer.total_steps": min((overrides or {}).get("trainer.total_steps", 2), 2)}
    if recipe not in WITHOUT_ROLLOUTS:
        sizes |= {"data.max_response_length": 8, "rollout.n": 2, "reward.workers": 1}
    return train(recipe, overrides={**(overrides or {}), **sizes}, **given)


def pages_with(*languages: str) -> list[str]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != "packages/core/README.md"])
def test_python_runs_from_top_to_bottom(page: str, folder: Path, stand_ins: None) -> None:
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, page, "exec"), names)  # errors point at the page's lines


def public_modules() -> set[str]:
    """Those that ``docs/api.md`` names in its table (where `its` parts follow a package) or documents."""
    text = PAGES["docs/api.md"]
    found = set(re.findall(r"^\.\. automodule:: (\S+)", text, re.MULTILINE))
    members = re.findall(r"^\.\. auto(?:class|function):: (\S+)", text, re.MULTILINE)
    found |= {name.rpartition(".")[0] for name in members}
    for row in re.findall(r"^\|.*\|$", text, re.MULTILINE):
        package = ""
        for name in re.findall(r"`([\w.]+)`", row):
            package = name if name.startswith("rlcore") else package
            found.add(name if name is package else f"{package}.{name}")
    return found


def test_pages_for_plugin_authors_import_public_modules_alone() -> None:
    public = public_modules() | {"rlcore_recipes.settings"}
    pages = ["docs/algorithms.md", "docs/writing-a-recipe.md", "docs/writing-a-training-engine.md"]
    imported = {
        name
        for page in pages
        for block in blocks(page)
        if block.language == "python"
        for name in re.findall(r"^from (rlcore[\w.]*) import", block.text, re.MULTILINE)
    }
    assert len(imported) > 15
    assert imported <= public
    assert {name for name in public if find_spec(name) is None} == set()


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_configurations_are_valid(page: str, folder: Path) -> None:
    for block in blocks(page):
        if block.language != "yaml":
            continue
        values = yaml.safe_load(block.text)
        values.pop("defaults", None)
        problems = []
        for recipe in RECIPES:
            filled = merged(LEFT_OUT, {} if recipe in WITHOUT_ROLLOUTS else FOR_REINFORCEMENT, values)
            try:
                validate_config(configuration_of(recipe), filled)
                break
            except ConfigError as error:
                problems.append(f"{recipe}: {error}")
        else:
            pytest.fail(f"{page}:{block.line}: no recipe takes it:\n{block.text}\n{problems[0]}")


@pytest.mark.parametrize("page", pages_with("toml"))
def test_entry_points_name_groups_that_exist(page: str) -> None:
    for block in blocks(page):
        if block.language == "toml":
            assert set(tomllib.loads(block.text)["project"]["entry-points"]) <= ENTRY_POINT_GROUPS


@pytest.mark.parametrize("page", pages_with("bash", "sh"))
def test_commands_are_valid(page: str, folder: Path) -> None:
    for block in blocks(page):
        if name := re.match(r"# (\w+\.py)\n", block.text):
            (folder / name[1]).write_text(block.text)
        if block.language not in ("bash", "sh"):
            continue
        for words in commands(block):
            try:
                check(words)
            except (RlcoreError, click.ClickException) as error:
                pytest.fail(f"{page}:{block.line}: {shlex.join(words)}\n{error}")


@pytest.mark.parametrize("page", pages_with("text"))
def test_commands_print_what_is_shown(page: str, folder: Path) -> None:
    for block in blocks(page):
        command, _, shown = block.text.partition("\n")
        if block.language == "text" and command.startswith("$ rlcore ") and "plan" not in command:
            result = CliRunner().invoke(cli, shlex.split(command)[2:])
            assert result.output.split() == shown.split()


EXTRAS = {
    project["name"]: set(project.get("optional-dependencies", ()))
    for project in (tomllib.loads(path.read_text())["project"] for path in ROOT.glob("packages/*/pyproject.toml"))
}


def check(words: list[str]) -> None:
    """Check one command: what it installs exists, and its configuration or its options are valid."""
    words = ["rlcore", "gate", *words[1:]] if words[0] == "rlcore-gate" else words
    module = re.fullmatch(r"rlcore_recipes\.(\w+)", words[words.index("-m") + 1]) if "-m" in words else None
    if words[:2] == ["pip", "install"] or words[:3] == ["uv", "pip", "install"]:
        for name, extras in re.findall(r"(rlcore[\w-]*)(?:\[([\w,]+)\])?", " ".join(words)):
            assert set(extras.split(",")) - {""} <= EXTRAS[name], f"extras of {name}: {sorted(EXTRAS[name])}"
    elif module is not None:
        check_configuration(module[1], words[words.index("-m") + 2 :])
    elif words[0] == "rlcore" and words[1] in ("run", "plan", "config") and "schema" not in words and len(words) > 2:
        recipe, *arguments = words[2:] if words[1] != "config" else words[3:]
        check_configuration(recipe, arguments)
    elif words[0] == "rlcore":
        check_options(cli, words[1:])


def check_configuration(recipe: str, arguments: list[str]) -> None:
    """Load the configuration; "…" leaves out keys that every run needs."""
    if "--help" in arguments:
        return
    file = arguments[arguments.index("--config") + 1] if "--config" in arguments else None
    overrides = [word for word in arguments if "=" in word]
    if "…" in arguments:
        file = None if file == "…" else file
        needed = [] if recipe in WITHOUT_ROLLOUTS or file else list(flat(FOR_REINFORCEMENT))
        given = {override.split(".")[0] for override in overrides}
        overrides[:0] = [item for item in [*flat(LEFT_OUT), *needed] if item.split(".")[0] not in given - {"trainer"}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recipes.load(plugins.get(recipes.GROUP, recipe), file, tuple(overrides))


def check_options(command: click.Command, arguments: list[str]) -> None:
    """Parse the arguments of a command, of which no other check knows more."""
    context = click.Context(command)
    while isinstance(command, click.Group) and arguments and (inner := command.get_command(context, arguments[0])):
        command, arguments = inner, arguments[1:]
    if not isinstance(command, click.Group):
        command.make_context(command.name, arguments)


def flat(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}={value if isinstance(value, str) else json.dumps(value)}"


def test_page_of_other_frameworks_has_their_keys() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "framework_keys.py"))["page"]()
    for row in (
        "| `num_generations` | `rollout.n` |  |",
        "| `n_samples_per_prompt` | `rollout.n` |  |",
        "| `actor_rollout_ref.actor.ppo_mini_batch_size` | `actor.mini_batch_size` | prompts in both |",
    ):
        assert row in page


def test_page_of_configuration_keys_has_every_key() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "configuration_keys.py"))["page"]()
    for recipe in RECIPES:
        for section in sections(configuration_of(recipe)):
            assert section.model is not None, f"{section.path}: {section.description}"
            for key in section.keys:
                name = f"{section.path}.{key.name}".lstrip(".")
                assert f"\n`{name}`\n: " in page
    for name in (
        "actor.fsdp.",
        "actor.megatron.",
        "rollout.inline.",
        "rollout.vllm.",
        "rollout.sglang.",
        "rollout.http.",
    ):
        assert f"\n`{name}" in page


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of ours, or a name in one; found by reading the sources."""
    parts = name.split(".")
    files = {module_name(path): tree for path, tree in sources().items()}
    known = [count for count in range(1, len(parts) + 1) if ".".join(parts[:count]) in files]
    if not known:
        return False
    scope: list[ast.stmt] = files[".".join(parts[: known[-1]])].body
    for part in parts[known[-1] :]:
        found = next((node for node in scope if part in names_of(node)), None)
        if found is None:
            return False
        scope = found.body if isinstance(found, ast.ClassDef) else []
    return True


def names_of(node: ast.stmt) -> set[str]:
    """What a statement of a module or class defines or imports."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.ImportFrom(names=names):
            return {alias.asname or alias.name for alias in names}
        case ast.If(body=body):
            return {name for inner in body for name in names_of(inner)}
    return set()


@pytest.mark.parametrize("page", PAGES)
def test_names_on_pages_exist(page: str) -> None:
    names = set(re.findall(r"`(rlcore(?:_\w+)?(?:\.\w+)+)(?:\(\))?`", PAGES[page])) - ENTRY_POINT_GROUPS
    assert [name for name in sorted(names) if not resolves(name)] == []


def test_where_names_one_place_to_open_and_two_more_for_each_question() -> None:
    questions = re.split(r"^## ", PAGES["docs/where.md"], flags=re.MULTILINE)[1:]
    assert len(questions) >= 10
    for question in questions:
        opened = re.findall(r"^- Open (.+)$", question, re.MULTILINE)
        following = re.findall(r"^- Then `([^`]+)` and `([^`]+)`$", question, re.MULTILINE)
        assert len(opened) == len(following) == 1, question
        names = [*re.findall(r"`([^`]+)`", opened[0]), *following[0]]
        assert [name for name in names if not resolves(name)] == []


def test_pictures_are_what_their_script_draws() -> None:
    folder = ROOT / "docs" / "images"
    for name, draw in diagrams()["DRAWINGS"].items():
        assert (folder / name).read_text() == draw(), f"run python docs/images/diagrams.py: {name} is out of date"


def test_dataflow_is_that_of_grpo() -> None:
    tree = parse(Path("packages/recipes/src/rlcore_recipes/grpo.py"))
    step = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "step")
    calls = [node for node in ast.walk(step) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    called = [node.func.id for node in sorted(calls, key=lambda node: node.lineno) if isinstance(node.func, ast.Name)]
    functions = [stage.function for stage in diagrams()["STAGES"]]
    assert [name for name in called if name in functions] == functions


def test_package_diagram_has_every_package_and_its_imports() -> None:
    layers = [{package.module for package in layer} for layer in diagrams()["LAYERS"]]
    assert set.union(*layers) == set(MODULES)
    recipes, plugins, *below = layers
    for module in recipes | plugins:
        assert MAY_IMPORT[module] == set.union(*below)
    for number, layer in enumerate(below):
        assert all(MAY_IMPORT[module] == set().union(*below[number + 1 :]) for module in layer)


def diagrams() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "images" / "diagrams.py"))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "examples/README.md"])
def test_links_lead_to_files(page: str) -> None:
    """Of relative links; the pages of keys are generated by the documentation's build."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    files = [link for link in links if "://" not in link and not link.startswith("generated/")]
    assert [link for link in files if not (ROOT / page).parent.joinpath(link).exists()] == []
