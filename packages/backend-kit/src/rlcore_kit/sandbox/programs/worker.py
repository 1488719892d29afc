"""The worker of a sandbox: runs Python code piece by piece with one state, or becomes a command.

A request is a line with the length of a JSON object, and that object.
"""

from __future__ import annotations

import ast
import json
import linecache
import os
import sys
import tempfile
import traceback
from io import TextIOWrapper
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

from rlcore_kit.sandbox.programs.plan import Plan


def serve(plan: Plan) -> NoReturn:
    """Answer the requests on standard input until it ends; never returns."""
    requests = os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # standard input of the code
    os.close(nothing)
    os.set_inheritable(plan["report"], False)
    # not the base installation's packages, nor the folder of this module
    sys.path[:] = [
        *(path for path in sys.path if path.startswith(sys.base_prefix + "/lib") and not path.endswith("-packages")),
        *plan["packages"],
    ]
    sys.argv[:] = [""]
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, TextIOWrapper)
        stream.reconfigure(line_buffering=True)  # what was printed is known, also of code that is killed
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    own, number = os.getpid(), 0
    _report(plan, {"ready": True})
    while (request := _next(requests)) is not None:
        if "command" in request:
            _become(request["command"], request["input"])
        number += 1
        ok = run_code(request["code"], main.__dict__, f"<code {number}>")
        if os.getpid() != own:  # a process that the code forked, and that came out of it
            os._exit(0)
        _report(plan, {"done": ok})
    os._exit(0)


def run_code(source: str, state: dict[str, Any], name: str = "<code>") -> bool:
    """Run ``source`` as a notebook does: the value of a last expression is printed. Return whether it succeeded."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for tracebacks
    try:
        tree = ast.parse(source, name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), state)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), state)
            if value is not None:
                print(repr(value))
        ok = True
    except SystemExit as error:
        ok = error.code in (None, 0)
    except BaseException as error:
        _print_error(error)
        ok = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            ok = False
    return ok


def _print_error(error: BaseException) -> None:
    try:
        # without the frame of `run_code`
        traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next, limit=-10)
    except BaseException:
        print(type(error).__name__, file=sys.__stderr__)


def _next(requests: BinaryIO) -> dict[str, Any] | None:
    size = requests.readline()
    return json.loads(requests.read(int(size))) if size else None


def _become(command: list[str], given: str) -> NoReturn:
    with tempfile.TemporaryFile() as file:
        file.write(given.encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


def _report(plan: Plan, report: dict[str, Any]) -> None:
    os.write(plan["report"], json.dumps(report).encode() + b"\n")
