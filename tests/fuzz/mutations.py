"""Ways to damage a file."""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Mutation = Callable[[Path], None]
"""Changes the file at a path, or puts something else there."""

HUGE = 10**30
DEEP = 100_000
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256)) * 8
PICKLE = b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07hostile\x94."
ODD_JSON: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "huge": HUGE,
    "infinite": float("inf"),
    "nan": float("nan"),
    "text": "x",
    "no text": "",
    "surrogate": "\ud800",
    "list": [],
    "object": {},
    "nested": [[{"a": [None]}]],
}
MOST_CHILDREN = 3
"""Of a long list or object, only so many members are visited."""
LIES = (
    "a header of 2**63 bytes",
    "no header",
    "a header that is a list",
    "an unknown dtype",
    "a dtype of another size",
    "a shape of another size",
    "a negative shape",
    "a huge shape",
    "offsets behind the end",
    "offsets backwards",
    "no tensors",
    "a tensor without its bytes",
)
"""Mutations of a safetensors file's header (see `safetensors_mutations`)."""


MISFITS = ("a tensor left out", "a tensor renamed", "a tensor too many", "a larger tensor", "a flat tensor", "integers")
"""Mutations of a safetensors file's tensors (see `tensor_mutations`)."""


def write(content: bytes) -> Mutation:
    def mutate(path: Path) -> None:
        path.write_bytes(content)

    return mutate


def edit(change: Callable[[bytes], bytes]) -> Mutation:
    def mutate(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return mutate


def kinds() -> dict[str, Mutation]:
    """Something else where a regular file is expected."""

    def replaced(make: Callable[[Path], object]) -> Mutation:
        def mutate(path: Path) -> None:
            path.unlink(missing_ok=True)
            make(path)

        return mutate

    return {
        "removed": replaced(lambda path: None),
        "a folder": replaced(lambda path: path.mkdir()),
        "a FIFO": replaced(os.mkfifo),
        "endless": replaced(lambda path: path.symlink_to("/dev/zero")),
        "a link to itself": replaced(lambda path: path.symlink_to(path.name)),
        "a dangling link": replaced(lambda path: path.symlink_to("nowhere")),
    }


def contents() -> dict[str, Mutation]:
    """Content that no reader of any format understands."""
    return {
        "empty": write(b""),
        "a picture": write(PNG),
        "a pickle": write(PICKLE),
        "only NUL": write(bytes(4096)),
        "brackets": write(b"[" * DEEP),
        "braces": write(b'{"a":' * DEEP),
    }


def damage() -> dict[str, Mutation]:
    """Damage that leaves most of a file as it was; a text may still be valid afterwards."""

    def flipped(data: bytes, place: float) -> bytes:
        index = int(len(data) * place)
        return data[:index] + bytes([data[index] ^ 0x24]) + data[index + 1 :]

    def inserted(data: bytes, what: bytes) -> bytes:
        middle = len(data) // 2
        return data[:middle] + what + data[middle:]

    flips = {f"flipped at {place}": edit(lambda data, p=place: flipped(data, p)) for place in (0, 0.1, 0.3, 0.5, 0.9)}
    return {
        **flips,
        "a byte that is no UTF-8": edit(lambda data: inserted(data, b"\xff")),
        "a NUL inside": edit(lambda data: inserted(data, b"\0")),
        "a byte order mark": edit(lambda data: b"\xef\xbb\xbf" + data),
        "as UTF-16": edit(lambda data: data.decode("latin-1").encode("utf-16")),
        "more at the end": edit(lambda data: data + b"\x00garbage"),
        "twice": edit(lambda data: data + data),
    }


def cuts() -> dict[str, Mutation]:
    """Files that end too early."""
    return {
        f"cut at {share}": edit(lambda data, s=share: data[: int(len(data) * s)]) for share in (0.02, 0.25, 0.5, 0.9)
    } | {"cut by 2 bytes": edit(lambda data: data.rstrip()[:-2])}


def json_values(document: Any) -> Iterator[tuple[str, Any]]:
    """``document`` with one value each replaced by an odd one or left out, and odd documents."""
    for name, odd in ODD_JSON.items():
        yield f"$ is {name}", odd
    for path in _paths(document):
        place = "$." + ".".join(map(str, path))
        for name, odd in ODD_JSON.items():
            yield f"{place} is {name}", _with(document, path, odd)
        yield f"{place} left out", _without(document, path)


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def json_mutations(path: Path) -> dict[str, Mutation]:
    """`json_values` of the JSON file at ``path``."""
    return {name: write(as_json(document)) for name, document in json_values(json.loads(path.read_text()))}


def tensor_mutations(path: Path) -> dict[str, Mutation]:
    """The safetensors file at ``path`` with tensors that do not fit the model; see `MISFITS`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name, first = next((name, tensor) for name, tensor in sorted(tensors.items()) if tensor.dim() == 2)
    others = {other: tensor for other, tensor in tensors.items() if other != name}

    def file(**changed: Any) -> Mutation:
        return lambda path: save_file({**others, **changed}, path, metadata={"format": "pt"})

    files = (
        file(),
        file(**{f"{name}.x": first}),
        file(**{name: first, "model.layers.0.more.weight": first.clone()}),
        file(**{name: first.repeat(2, 1)}),
        file(**{name: first.flatten().contiguous()}),
        file(**{name: first.long()}),
    )
    return dict(zip(MISFITS, files, strict=True))


def _paths(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    if len(items) > 40:
        items = items[:MOST_CHILDREN]
    for key, child in items:
        yield (*path, key)
        yield from _paths(child, (*path, key))


def _with(document: Any, path: tuple[str | int, ...], value: Any) -> Any:
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def _without(document: Any, path: tuple[str | int, ...]) -> Any:
    changed = copy.deepcopy(document)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


def safetensors_mutations(path: Path) -> dict[str, Mutation]:
    """A safetensors file with a header that lies."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    first = next(name for name in header if name != "__metadata__")

    def file(changed: Any, payload: bytes = tensors) -> Mutation:
        text = as_json(changed)
        return write(struct.pack("<Q", len(text)) + text + payload)

    def entry(**fields: Any) -> Mutation:
        return file({**header, first: {**header[first], **fields}})

    start, end = header[first]["data_offsets"]
    lies = (
        write(struct.pack("<Q", 1 << 63) + data[8:]),
        write(struct.pack("<Q", 0) + data[8:]),
        file([header]),
        entry(dtype="F99"),
        entry(dtype="F64"),
        entry(shape=[1, 2, 3]),
        entry(shape=[-1, -2]),
        entry(shape=[2**62, 2**62]),
        entry(data_offsets=[start, end + len(tensors)]),
        entry(data_offsets=[end, start]),
        file({}, b""),
        file(header, tensors[:-64]),
    )
    return dict(zip(LIES, lies, strict=True))
