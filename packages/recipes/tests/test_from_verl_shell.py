"""Shell scripts are read as bash runs them; bash is the oracle. Nothing of a script runs while it is read."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.shell.script import read_script
from rlcore_recipes.from_verl.word import Unknown

VERL = "python3 -m verl.trainer.main_ppo"
ENVIRONMENT = {"HOME": "/home/me", "PATH": "/usr/bin:/bin", "GIVEN": "from outside", "EMPTY": ""}
VERL = "python3 -m verl.trainer.main_ppo"

SCRIPTS = sorted((Path(__file__).parent / "verl_scripts").glob("*.sh"))
PROGRAM = """#!/bin/bash
[ "$1" = "-c" ] && exit 1
for argument in "$@"; do printf '%s\\0' "$argument"; done >> "$RECORD"
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of programs that write down their arguments."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("python3", "torchrun", "ray"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    return folder


def run_by_bash(script: Path, folder: Path, programs: Path, arguments: list[str]) -> list[str]:
    """The arguments of verl when bash runs the script in ``folder``."""
    record = folder / "record"
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{ENVIRONMENT['PATH']}", "RECORD": str(record)}
    subprocess.run(["bash", script, *arguments], env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    words = record.read_text().split("\0")[:-1]
    return words[next(i for i, word in enumerate(words) if word.startswith("verl.trainer.")) + 1 :]


def write(folder: Path, text: str) -> Path:
    path = folder / "run.sh"
    path.write_text(text)
    return path


def read(path: Path, *arguments: str, **environment: str) -> list[str]:
    script = read_script(path, {**ENVIRONMENT, **environment}, arguments)
    return [word.known() for word in script.launch.arguments]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_read_as_bash_runs_it(path: Path, tmp_path: Path, programs: Path) -> None:
    arguments = ["8", "trainer.nnodes=2", "x y"]
    assert read(path, *arguments) == run_by_bash(path, tmp_path, programs, arguments)


VARIABLES = """A=one
B="two words"
C=
D=(x "y z" "")
F=/p/q.tar.gz
N=7
"""
EXPANSIONS = [
    *(
        "${A}",
        "${B}",
        "${C}",
        "${C:-d}",
        "${C:-d e}",
        "${U:-u}",
        "${U-}",
        "${A:+plus}",
        "${A:+p q}",
        "${F%.*}",
        "${F##*/}",
    ),
    *("${B/ /_}", "${A^^}", "${#B}", "$((N+1))", "$(( N * 2 ))", "$(echo hi)", "$(echo a  b)"),
    *("${D[0]}", "${D[1]}", "${#D[@]}", "${D[@]}", "${D[*]}"),
]
TEXTS = ["a", "b.c=", "-", "/", "=", "1e-6", ":", ",", "[", "]", "+", "@", "%", "\\$", '\\"', "\\\\"]
IN_QUOTES = [*TEXTS, " ", "  ", "x y", "'", "#", ";", "|", "&", "(", ")", "{", "}", "<", ">", "!", "*", "?", "~", "\\n"]


def quoted_text(pick: random.Random) -> str:
    inside = [pick.choice(EXPANSIONS if pick.random() < 0.5 else IN_QUOTES) for _ in range(pick.randint(0, 6))]
    return f'"{"".join(inside)}"'


def made_up_word(pick: random.Random) -> str:
    pieces = ["k="]
    for _ in range(pick.randint(1, 4)):
        others = ["'$A  x'", pick.choice(EXPANSIONS), pick.choice(TEXTS)]
        pieces.append(pick.choice([quoted_text(pick), quoted_text(pick), *others]))
    return "".join(pieces)


def test_made_up_words_are_expanded_as_bash_expands_them(tmp_path: Path, programs: Path) -> None:
    pick = random.Random(0)
    for _ in range(40):
        words = [made_up_word(pick) for _ in range(12)]
        text = f'{VARIABLES}V={quoted_text(pick)}\n{VERL} {" ".join(words)} "$V" $V\n'
        path = write(tmp_path, text)
        (tmp_path / "record").unlink(missing_ok=True)
        assert read(path) == run_by_bash(path, tmp_path, programs, []), text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"\n{VERL} a.b=$NOT_SET", "run.sh:2: NOT_SET is not set; give --env NOT_SET=VALUE"),
        (f"A=$NOT_SET\n{VERL} a.b=${{A}}", "run.sh:1: NOT_SET is not set; give --env NOT_SET=VALUE"),
        (f"{VERL} a.b=$((N * 2))", "run.sh:1: N is not set; give --env N=VALUE"),
        (f"{VERL} a.b=$1", r"run.sh:1: the script's argument \$1 is not given; write it after --"),
        (f"A=$(nvidia-smi -L)\n{VERL} a=$A", r"run.sh:1: \$\(nvidia-smi -L\) is not run"),
        (f"A=$(cat x | wc -l)\n{VERL} a=$A", r"run.sh:1: \$\(cat x \| wc -l\) is not run"),
        (
            f"if nvidia-smi; then A=1; fi\n{VERL} a=$A",
            r"A is set there, but run.sh:1: whether nvidia-smi holds",
        ),
        (f"if nvidia-smi; then {VERL} a=1; fi", "the command of verl at run.sh:1 depends on it"),
        (f"read A\n{VERL} a=$A", "A is read while the script runs; give --env A=VALUE"),
        (f"{VERL} a={{b,c}}", r"run.sh:1: bash makes several words of a=\{b,c\}; put the braces in quotes"),
        (f"{VERL} a.b=1 \\\n  # x\n  c.d=2", "run.sh:3: c.d=2 is no part of verl's command"),
        (f"A=1.5\n{VERL} a=$((A * 2))", "is no integer arithmetic"),
        (f"{VERL} a=$((2 ** 99999999999))", "is too large"),
        (f"A+=x; B=(1); B+=2\n{VERL} a=1", r"run.sh:1: B\+= adds text .* write B\+=\(…\)"),
        (f"if true; then\n{VERL} a=1\n", "bash would not read this: if true; then"),
        ("echo hello", "no command of verl is run, such as python3 -m verl.trainer.main_ppo"),
        ("bash other.sh 1", "run.sh:1 runs the script other.sh: give that one"),
        (f"[ $# -lt 2 ] && exit 1\n{VERL} a=1", "no command of verl is run, .*; it ends at run.sh:1"),
        (f"{VERL} a=1\n{VERL} a=2", r"runs verl 2 times \(run.sh:1, run.sh:2\); give one of the commands after --"),
        (f"while true; do A=1; done\n{VERL} a=$A", "the loop repeats more than 1000 times"),
        (f"A=x; for i in a b c d e f g h i j k l m n o p q r; do A=$A$A; done\n{VERL} a=$A", "run.sh:1: A is too long"),
        (
            f"A=(x); for i in $(echo {'i ' * 20}); do A+=(${{A[@]}}); done\n{VERL} a=$A",
            "run.sh:1: A has too many words",
        ),
        (
            f"W='{'i ' * 100}'; for i in $W; do for j in $W; do for k in $W; do :; done; done; done\n{VERL} a=1",
            "the script runs more than 20000 statements",
        ),
        (f"f() {{ f; }}\nf\n{VERL} a=1", "statements are nested too deeply"),
    ],
)
def test_what_reading_cannot_tell_is_an_error_with_its_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path(), text)
    with pytest.raises((ConfigError, Unknown), match=message):
        read(Path("run.sh"))


def test_what_is_not_known_does_not_matter_where_verl_does_not_need_it(tmp_path: Path) -> None:
    text = f"""STAMP=$(git rev-parse HEAD) LOG=log_$NOT_SET.txt
for gpu in $(nvidia-smi -L); do echo $gpu; done
source /no/such/environment/bin/activate
if nvidia-smi; then GPU=1; else GPU=0; fi
wait $!
mkdir -p $NOT_SET && cd $NOT_SET
pip install verl && {VERL} data.x=1 2>&1 | tee $LOG
"""
    assert read(write(tmp_path, text)) == ["data.x=1"]


def test_given_variables_and_arguments_decide(tmp_path: Path) -> None:
    path = write(tmp_path, f'if [ "$MODE" = big ]; then N=8; else N=$1; fi\n{VERL} data.n=$N "$@"\n')
    assert read(path, MODE="big") == ["data.n=8"]
    assert read(path, "2", "data.x=3", MODE="small") == ["data.n=2", "2", "data.x=3"]


def test_a_function_is_called_with_what_is_not_known(tmp_path: Path) -> None:
    path = write(tmp_path, f'start() {{ {VERL} data.n=$2; }}\nstart "$(hostname -I)" 3\n')
    assert read(path) == ["data.n=3"]


def test_a_file_that_the_script_sources_is_read(tmp_path: Path) -> None:
    (tmp_path / "common.sh").write_text("MODEL=qwen\nbegin() { echo hello; }\n")
    text = f'HERE="$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)"\nsource "$HERE/common.sh"\n{VERL} model=$MODEL'
    assert read(write(tmp_path, text)) == ["model=qwen"]


def test_the_place_of_an_argument_is_the_line_that_it_is_written_in(tmp_path: Path) -> None:
    path = write(tmp_path, f'DATA=(\n  data.x=1\n  data.y=2\n)\n{VERL} \\\n  data.z=3 "${{DATA[@]}}"\n')
    words = read_script(path, ENVIRONMENT).launch.arguments
    assert [word.place.rpartition(":")[2] for word in words] == ["6", "2", "3"]


def test_nothing_in_a_script_is_run(tmp_path: Path) -> None:
    text = f"""touch {tmp_path}/touched; A=$(touch {tmp_path}/substituted); eval "touch {tmp_path}/evaluated"
[ -n "$(touch {tmp_path}/tested)" ] && touch {tmp_path}/after
{VERL} data.x=1 $(touch {tmp_path}/argument) > {tmp_path}/log
"""
    with pytest.raises(Unknown, match="is not run"):
        read(write(tmp_path, text))
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"]


@pytest.mark.parametrize("name", ["no.sh", "folder.sh"])
def test_a_script_that_cannot_be_read_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.sh").mkdir()
    with pytest.raises(ConfigError, match=f"{name}: "):
        read(tmp_path / name)
