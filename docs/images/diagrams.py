"""Draw dataflow.svg, packages.svg and token-tree.svg, which README and documentation show.

    python docs/images/diagrams.py    # writes all into this folder

The text of the diagrams is in `STAGES`, `LAYERS` and `TREE`; everything else is layout. The pictures have a background
and two palettes, so they can be read on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent


class Stage(NamedTuple):
    """A stage of the step: the function to read, what it adds to the batch, and what computes it."""

    title: str
    function: str
    adds: tuple[str, ...]
    by: tuple[str, ...]


STAGES = (
    Stage(
        "generate",
        "rollouts",
        ("tokens, loss_mask", "rollout_logprobs", "token_version", "group"),
        ("rollout engine", "inline, vllm, sglang, http"),
    ),
    Stage("log-probs", "add_logprobs", ("old_logprobs", "ref_logprobs", "entropy"), ("training engines", "actor, ref")),
    Stage("score", "add_scores", ("score",), ("reward processes,", "reward model")),
    Stage("advantages", "add_advantages", ("token_rewards", "advantages"), ("estimators", "grpo, rloo, gae, …")),
    Stage("update", "update_policy", (), ("training engine", "actor")),
    Stage("sync weights", "sync_weights", (), ("weight transfer", "actor → rollout")),
)


class Package(NamedTuple):
    """A package: its folder below packages/, its import name, and what it holds."""

    folder: str
    module: str
    holds: str


# from top to bottom: each layer imports from those below it; the first one finds the second one by plugin name
LAYERS = (
    (
        Package(
            "recipes", "rlcore_recipes", "sft, grpo, ppo, dapo · data · rollouts · checkpoints · trackers · quickstart"
        ),
    ),
    (
        Package("controller-ray", "rlcore_ray", "executor"),
        Package("engines-fsdp", "rlcore_fsdp", "training"),
        Package("engines-megatron", "rlcore_megatron", "training"),
        Package("rollout-inline", "rlcore_inline", "generation"),
        Package("rollout-vllm", "rlcore_vllm", "generation"),
        Package("rollout-sglang", "rlcore_sglang", "generation"),
        Package("rollout-http", "rlcore_http", "generation"),
        Package("rewards", "rlcore_rewards", "scoring"),
        Package("agents", "rlcore_agents", "episodes"),
    ),
    (
        Package(
            "backend-kit",
            "rlcore_kit",
            "weight transfer · serving · model folders · rank checkpoints · conformance suites",
        ),
    ),
    (
        Package(
            "core",
            "rlcore",
            "batch · algorithms · engine contracts · controller · configuration · plugins · command line",
        ),
    ),
)


class TreeSegment(NamedTuple):
    """A segment of a token tree: its place (column and row of the picture), the column where it ends, and its text."""

    row: int
    start: float
    end: float
    origin: str
    text: str
    sampled: bool = False


TREE = (
    TreeSegment(0, 0, 2, "prompt", "system, tools · user: 17·23?"),
    TreeSegment(0, 2, 4, "sampled", "<think>…</think> call 17·23", True),
    TreeSegment(0, 4, 5, "result", "391"),
    TreeSegment(0, 5, 7, "sampled", "<think>…</think> 391.", True),
    TreeSegment(1, 2, 4, "rendered", "call · 391 · 391. · user: 19·29?"),
    TreeSegment(1, 4, 6, "sampled", "<think>…</think> 551.", True),
    TreeSegment(2, 2, 4, "sampled", "391, I believe.", True),
)
"""The first conversation, one whose template removes the reasoning before a new question, and a second reply."""

LIGHT = {"panel": "#ffffff", "edge": "#d1d9e0", "box": "#f6f8fa", "line": "#818b98", "ink": "#1f2328",
         "muted": "#59636e", "accent": "#0969da", "tint": "#ddf4ff"}  # fmt: skip
DARK = {"panel": "#0d1117", "edge": "#3d444d", "box": "#151b23", "line": "#9198a1", "ink": "#f0f6fc",
        "muted": "#b1bac4", "accent": "#79c0ff", "tint": "#13233a"}  # fmt: skip


def style(palette: Mapping[str, str]) -> str:
    """Return the CSS rules that depend on the palette."""
    return (
        ".panel{{fill:{panel};stroke:{edge}}} .box{{fill:{box};stroke:{line}}} .step{{fill:{tint};stroke:{accent}}} "
        ".title{{fill:{ink}}} .code{{fill:{accent}}} .note{{fill:{muted}}} "
        ".arrow{{stroke:{line}}} .head{{fill:{line}}} .loop{{stroke:{accent}}} .loophead{{fill:{accent}}}"
    ).format(**palette)


def svg(width: int, height: int, title: str, body: Iterable[str], light: Mapping[str, str] = LIGHT) -> str:
    """Return a complete picture on a panel."""
    fonts = (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,'DejaVu Sans',sans-serif;font-size:13px;"
        "text-anchor:middle} .title{font-weight:600;font-size:15px} .small{font-size:12px} "
        ".code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12px} "
        ".left{text-anchor:start} .arrow,.loop{fill:none;stroke-width:1.5} .dashed{stroke-dasharray:4 4}"
    )
    dark = f"@media (prefers-color-scheme:dark){{{style(DARK)}}}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' role="img">',
        f"<title>{escape(title)}</title>",
        f"<style>\n{fonts}\n{style(light)}\n{dark}\n</style>",
        f'<rect class="panel" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10"/>',
        *body,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(content)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str = "box") -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def arrow(points: Iterable[tuple[float, float]], kind: str = "arrow") -> str:
    """Return a line through ``points`` with a head at its end; its last part is horizontal or vertical."""
    path = list(points)
    (x0, y0), (x, y) = path[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    line = " ".join(f"{'L' if number else 'M'}{px:g} {py:g}" for number, (px, py) in enumerate(path))
    head = f"M{x:g} {y:g} l{-8 * dx - 4 * dy:g} {-8 * dy - 4 * dx:g} l{8 * dy:g} {8 * dx:g} z"
    return f'<path class="{kind}" d="{line}"/><path class="{kind.split()[0].replace("arrow", "")}head" d="{head}"/>'


def dataflow(light: Mapping[str, str] = LIGHT) -> str:
    """Draw one step of a recipe: functions from left to right, columns of the batch, and what computes them."""
    width, gap, left, top = 138, 20, 34, 80
    columns, by, bottom = top + 90, top + 202, top + 282
    first, last = left + width / 2, left + 5 * (width + gap) + width / 2
    body = [
        text(left, 32, "One step of a recipe", "title left"),
        text(
            left,
            54,
            "From left to right; rewards are computed while the first two run. PPO adds add_values and update_critic.",
            "note left",
        ),
        text(left, columns, "adds to the batch", "note left"),
        text(left, by - 10, "computed by", "note left"),
    ]
    for number, stage in enumerate(STAGES):
        x = left + number * (width + gap)
        middle = x + width / 2
        body += [
            box(x, top, width, 62, "step"),
            text(middle, top + 27, stage.title, "title"),
            text(middle, top + 48, stage.function, "code"),
            *(text(middle, columns + 20 + 18 * row, name, "code") for row, name in enumerate(stage.adds)),
            box(x, by, width, 54),
            *(text(middle, by + 22 + 19 * row, name, "note") for row, name in enumerate(stage.by)),
        ]
        if number:
            body.append(arrow([(x - gap, top + 31), (x - 1, top + 31)]))
    body += [
        arrow([(last, by + 54), (last, bottom), (first, bottom), (first, by + 56)], "loop"),
        text((first + last) / 2, bottom - 9, "weights of the next version", "note"),
    ]
    return svg(left * 2 + 6 * width + 5 * gap, bottom + 20, "Dataflow of one training step", body, light)


def packages(light: Mapping[str, str] = LIGHT) -> str:
    """Draw the packages in layers, with the direction of imports."""
    left, wide, height, gap, space = 34, 930, 66, 10, 50
    right = left + wide
    rows = [76 + number * (height + space) for number in range(len(LAYERS))]
    body = [
        text(left, 32, "Packages", "title left"),
        text(
            left,
            54,
            "Solid arrows are imports, from any layer below. Dashed arrows are plugins, found by name.",
            "note left",
        ),
        arrow(
            [(right, rows[0] + 33), (right + 20, rows[0] + 33), (right + 20, rows[2] + 33), (right + 1, rows[2] + 33)]
        ),
    ]
    for row, (y, layer) in enumerate(zip(rows, LAYERS)):
        width = (wide - gap * (len(layer) - 1)) / len(layer)
        for column, package in enumerate(layer):
            x = left + column * (width + gap)
            middle = x + width / 2
            body += [
                box(x, y, width, height, "box" if row == 1 else "step"),
                text(middle, y + 23, package.folder, "title small" if row == 1 else "title"),
                text(middle, y + 41, package.module, "code"),
                text(middle, y + 58, package.holds, "note"),
            ]
            if row == 1:
                body.append(arrow([(middle, y - space), (middle, y - 1)], "arrow dashed"))
            if row in (1, 2):
                body.append(arrow([(middle, y + height), (middle, y + height + space - 1)]))
    return svg(right + 40, rows[-1] + height + 24, "Packages and the direction of imports", body, light)


def token_tree(light: Mapping[str, str] = LIGHT) -> str:
    """Draw a tree of segments with the rows that its leaves become."""
    left, unit, top, height, space = 34, 126, 82, 50, 34
    body = [
        text(left, 32, "A token tree", "title left"),
        text(
            left,
            54,
            "Coloured segments were sampled and are trained on. Every leaf ends a row of the batch.",
            "note left",
        ),
    ]
    leaves = 0
    for segment in TREE:
        x, y = left + segment.start * unit, top + segment.row * (height + space)
        width = (segment.end - segment.start) * unit - 8
        body += [
            box(x, y, width, height, "step" if segment.sampled else "box"),
            text(x + width / 2, y + 20, segment.origin, "title small"),
            text(x + width / 2, y + 38, segment.text, "code" if segment.sampled else "note"),
        ]
        if segment.row and segment.start == 2:
            body.append(arrow([(x - 22, top + height), (x - 22, y + height / 2), (x - 1, y + height / 2)]))
        if not any(other.row == segment.row and other.start == segment.end for other in TREE):
            leaves += 1
            body.append(text(x + width + 12, y + height / 2 + 5, f"row {leaves}", "note left"))
    bottom = top + 3 * (height + space)
    return svg(left + 7 * unit + 70, bottom, "A tree of segments and the rows of its leaves", body, light)


DRAWINGS = {"dataflow.svg": dataflow, "packages.svg": packages, "token-tree.svg": token_tree}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw())
