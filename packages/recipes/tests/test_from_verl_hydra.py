"""Overrides of verl's command are read as Hydra reads them; hydra-core is the oracle."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from rlcore.errors import ConfigError
from rlcore_recipes.from_verl.assignment import Assignment
from rlcore_recipes.from_verl.hydra import parse_override
from rlcore_recipes.from_verl.interpolation import resolved

HYDRA = OverridesParser.create()
PREFIXES = {"CHANGE": "", "ADD": "+", "FORCE_ADD": "++", "DEL": "~"}
OVERRIDES = [
    "a.b=1e-6",
    "a=['console','swanlab']",
    "a=[console,wandb]",
    "a=[ 1 , x y ,null]",
    "a=[1,[2,3],{b:c}]",
    "a={a:1,b:[2]}",
    "a={1:2,x:}",
    "a=[]",
    "a={}",
    "a=[a,]",
    "a=null",
    "a=",
    "a= null",
    "~a.b",
    "~a=3",
    "++a=1",
    "+a.b=x",
    "a.0=1",
    "a-b.c=1",
    "$x=1",
    "a@b.c=d",
    "a/b=c",
    "a:b=1",
    "a",
    "a=x=y",
    "a==b",
    "a=1,2",
    "a=choice(1,2)",
    "a=range(1,3)",
    r"a='it\'s'",
    r'a="x\"y"',
    r"a='a\\'",
    r'a="\n"',
    "a=''",
    "a='${x}'",
    "a=\"['x', 'y']\"",
    "a='[\"q\"]'",
    "a='x",
    "a=$HOME/x",
    "a=${b.c}",
    "a=${oc.env:HOME}/x",
    "a=[${x},1]",
    "a=${x",
    *(
        f"a={number}"
        for number in ("0.", "1.", ".5", "-.5e3", "1_000", "010", "0x10", "-1", "+5", "1e3", "1.0e-06", "inf", "NaN")
    ),
    *(f"a={word}" for word in ("True", "tRuE", "FALSE", "None", "a b", "3 4", "a:b", "--x", "x*", "%x", "?", "a|b")),
    *(f"a={path}" for path in ("/x/y-z.parquet", "x@y", "hub:org/name", "C:\\d", "http://x:80/y", "http://x?y=1")),
    *(f"a={escaped}" for escaped in (r"hello\,there", r"\\x", r"\[x\]", r"a\=b", r"x\ ")),
    *(f"a={refused}" for refused in ("(x)", "<path>", "x#y", "~x", "!x", "é", "a;b", "x[0]", "x}", "`x`", "^x")),
]


def theirs(text: str) -> tuple[Any, ...] | None:
    """What Hydra reads; None if it refuses the override, or would start several runs with it."""
    try:
        override = HYDRA.parse_override(text)
    except Exception:
        return None
    if override.is_sweep_override():
        return None
    return override.get_key_element().lstrip("+~"), PREFIXES[override.type.name], repr(plain(override._value))


def plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def ours(text: str) -> tuple[Any, ...] | None:
    try:
        assignment = parse_override(text, "here")
    except ConfigError:
        return None
    return assignment.key, assignment.prefix, repr(assignment.value)


@pytest.mark.parametrize("text", OVERRIDES)
def test_an_override_is_read_as_hydra_reads_it(text: str) -> None:
    assert ours(text) == theirs(text)


def test_made_up_values_are_read_as_hydra_reads_them() -> None:
    pieces = [
        "a",
        "1",
        "-",
        ".",
        "e",
        "'",
        '"',
        "\\",
        ",",
        "[",
        "]",
        "{",
        "}",
        ":",
        "null",
        "true",
        "1e-6",
        "_",
        "x",
        "${a}",
    ]
    pick = random.Random(0)
    texts = ["k=" + "".join(pick.choice(pieces) for _ in range(pick.randint(1, 6))) for _ in range(300)]
    assert {text: ours(text) for text in texts} == {text: theirs(text) for text in texts}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data.x=1,2", r"run.sh:3: data.x=1,2: several values start several runs .*\[a,b\]"),
        ("data.x=choice(1,2)", r"choice\(…\) starts several runs"),
        ("data.x=int(3)", r"write the value itself instead of int\(…\)"),
        ("data.x=<path>", "Hydra does not read '<' in text without quotes; put the value in quotes"),
        ("data.x='a", "the quote ' is not closed"),
        ("data.x=[1", r"a list is not closed with \]"),
        ("data.x={'a':1}", "keys of a dictionary without quotes"),
        ("data.x", "run.sh:3: 'data.x' is no Hydra override; one is written key=value"),
    ],
)
def test_what_hydra_refuses_is_an_error_that_says_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_override(text, "run.sh:3")


def given(*texts: str) -> tuple[Assignment, ...]:
    return tuple(parse_override(text, f"argument {number}") for number, text in enumerate(texts, start=1))


def test_interpolations_are_what_they_refer_to() -> None:
    values = resolved(
        given(
            "data.n=8",
            "data.m=${data.n}",
            "data.path=${oc.env:ROOT}/${.name}.parquet",
            "data.name=train",
            "data.list=[${data.m},x]",
            "data.other=${oc.env:MISSING,5}",
            "trainer.k='${oc.select:actor.k,3}'",
            "trainer.n='${oc.select:data.n,3}'",
        ),
        {"ROOT": "/data"},
    )
    assert [item.value for item in values] == [8, 8, "/data/train.parquet", "train", [8, "x"], 5, 3, 8]


def test_a_reference_to_a_section_is_its_keys() -> None:
    values = resolved(given("a.b={c:1,d:{e:x}}", "f.g=${a.b}", "+h=${oc.select:a.b.d,null}"), {})
    assert {item.key: item.value for item in values} == {
        "a.b.c": 1,
        "a.b.d.e": "x",
        "f.g.c": 1,
        "f.g.d.e": "x",
        "h.e": "x",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.b=${c.d}", r"argument 1: a.b: \$\{c.d\} refers to c.d, which is not given; write the value"),
        ("a.b=${oc.env:NOT_SET}", "the variable NOT_SET is not set; give --env NOT_SET=VALUE"),
        ("a.b=${a.b}", "its value refers to itself"),
        ("a.b=${oc.create:x}", "cannot be computed here"),
    ],
)
def test_an_interpolation_that_leads_nowhere_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(given(text), {})
