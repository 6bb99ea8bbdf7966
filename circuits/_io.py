"""Files that are either whole or absent, their hashes, and strict JSON for frozen dataclasses."""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import stat
import types
import typing
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Union

from circuits.errors import BadInput, CorruptRun, StorageError, UnknownName

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Run a block that writes to ``path``.

    Raises:
        StorageError: in place of any ``OSError`` of the block.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space, or choose another output directory" if full else "choose another output directory"
        raise StorageError(f"cannot write {path}: {error.strerror or error}: {remedy}") from error


def file_size(path: Path | str) -> int | None:
    """Return the size of a file in bytes, None where there is no file.

    Raises:
        StorageError: that cannot be told, as a directory above it may not be searched or its name is too long.
    """
    # Path.is_file and Path.exists raise a bare OSError there up to Python 3.13 and say no from 3.14 on
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot look for {path}: {reason}: choose another directory") from error
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def is_file(path: Path | str) -> bool:
    """Return whether there is a file.

    Raises:
        StorageError: that cannot be told, as for ``file_size``.
    """
    return file_size(path) is not None


def make_directory(path: Path | str) -> Path:
    """Return ``path`` as a directory that exists.

    Raises:
        StorageError: it cannot be made.
    """
    with storage_errors(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def atomic_write(path: Path | str, data: bytes) -> str:
    """Write a file so that any crash leaves either the old one or the new one, and return its sha256.

    Raises:
        StorageError: the directory cannot be written, or is full; the old file is intact then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        try:
            with temporary.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    return sha256_bytes(data)


def _sync_directory(path: Path) -> None:
    """Make a rename last through a power cut, where the system lets a directory be opened for that."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_bytes(data: bytes) -> str:
    """Return the sha256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Return the sha256 of a file in hexadecimal.

    Raises:
        CorruptRun: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CorruptRun(f"cannot read {path}: {error.strerror or error}") from error


def read_bytes(path: Path | str, *, sha256: str | None = None) -> bytes:
    """Return the content of a file, which must have the given hash.

    Raises:
        CorruptRun: the file cannot be read, or has another hash.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CorruptRun(f"cannot read {path}: {error.strerror or error}") from error
    if sha256 is not None and sha256_bytes(data) != sha256:
        raise CorruptRun(f"{path} was altered: its sha256 differs from the recorded {sha256[:12]}...; make it anew")
    return data


def parse_json(data: bytes | str, where: Path | str) -> Any:
    """Return the value of strict JSON (no NaN, no repeated key) found at ``where``.

    Raises:
        CorruptRun: it is not that.
    """
    try:
        return json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CorruptRun(f"{where} is not valid JSON: {error}") from error


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        raise ValueError(f"a key is repeated among {', '.join(key for key, _ in pairs)}")
    return keys


def read_json(path: Path | str, *, sha256: str | None = None) -> Any:
    """Return what a JSON file holds.

    Raises:
        CorruptRun: it cannot be read, has another hash or is not valid JSON.
    """
    return parse_json(read_bytes(path, sha256=sha256), path)


def write_json(path: Path | str, obj: Any) -> str:
    """Write ``to_json(obj)`` for people to read, atomically, and return the sha256 of the file."""
    text = json.dumps(to_json(obj), indent=2, ensure_ascii=False, allow_nan=False)
    return atomic_write(path, (text + "\n").encode())


def canonical_json(obj: Any) -> str:
    """Return the one JSON text of ``obj``: sorted keys, no spaces, numbers written as their field's type."""
    return json.dumps(to_json(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def config_id(obj: Any) -> str:
    """Return the first 12 hexadecimal digits of the sha256 of the canonical JSON of ``obj``."""
    return sha256_bytes(canonical_json(obj).encode())[:12]


def to_json(obj: Any) -> Any:
    """Return ``obj`` as JSON values; a dataclass with a class variable ``name`` gets that as its first key.

    Numbers that JSON lacks are written as the strings "nan", "inf" and "-inf".

    Raises:
        BadInput: it holds something else than dataclasses, mappings with string keys, sequences and plain values.
    """
    return _encode(obj, Any)


def _encode(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = type_hints(type(value))
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        name = {"name": type(value).name} if _has_table_name(type(value)) else {}  # type: ignore[attr-defined]
        return name | {field: _encode(getattr(value, field), hints[field]) for field in fields}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise BadInput(f"cannot write {value!r} as JSON: expected string keys")
        return {key: _encode(item, Any) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, Any) for item in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    # An int in a float field is the same configuration as that float, and must get the same id.
    if isinstance(value, int) and float in _options(hint) and int not in _options(hint):
        value = float(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, int):
        return int(value)
    raise BadInput(f"cannot write {type(value).__name__} {value!r} as JSON: expected a number, string, list or mapping")


def from_json(cls: Any, data: Any) -> Any:
    """Return an instance of ``cls`` from what ``to_json`` gave.

    Only classes that an annotation names can come of it, never one that the data names by itself.

    Args:
        cls: a dataclass, a union of dataclasses that are told apart by ``name``, or any annotation of plain values.
            ``Annotated[SomeProtocol, table]`` stands for the classes of a table by name, where ``table`` is a
            mapping or a function that returns one.
        data: JSON values.

    Raises:
        BadInput: a key is unknown, one without a default is missing, or a value has the wrong type.
        UnknownName: a ``name`` is not in its table.
    """
    return _decode(cls, data, "")


def _decode(hint: Any, data: Any, where: str) -> Any:
    if hint is Any or hint is object:
        return data
    if typing.get_origin(hint) is Annotated:
        table = hint.__metadata__[0]
        return _decode_named(table() if callable(table) else table, data, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)
    options = _options(hint)
    if len(options) > 1:
        return _decode_union(options, data, where)
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return data if data in arguments else _wrong(hint, data, where)
    if origin in (list, tuple, collections.abc.Sequence) and isinstance(data, list):
        return _decode_sequence(origin, arguments, data, where)
    if origin in (dict, collections.abc.Mapping) and isinstance(data, dict):
        item = arguments[1] if arguments else Any
        return {key: _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    if origin is float and isinstance(data, str) and data in _NOT_FINITE:
        return _NOT_FINITE[data]
    if origin is float and isinstance(data, int) and not isinstance(data, bool) and abs(data) < 2**1023:
        return float(data)
    if origin in (types.NoneType, None) and data is None:
        return None
    if origin in (int, float, str, bool) and type(data) is origin:
        return data
    return _wrong(hint, data, where)


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        _wrong(cls, data, where)
    hints = type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    known = [*fields, "name"] if _has_table_name(cls) else [*fields]
    for key in data:
        if key not in known:
            raise UnknownName(f"key of {cls.__name__}{_at(where)}", str(key), known)
    name = data.get("name", getattr(cls, "name", None))
    if _has_table_name(cls) and name != getattr(cls, "name", None):
        raise BadInput(f"name {name!r}{_at(where)}: expected {getattr(cls, 'name', None)!r}")
    for key, field in fields.items():
        no_default = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if key not in data and no_default:
            raise BadInput(f"{cls.__name__}{_at(where)} lacks {key!r}: expected {', '.join(fields)}")
    return cls(**{k: _decode(hints[k], data[k], f"{where}.{k}") for k in fields if k in data})


def _decode_named(table: Mapping[str, type], data: Any, where: str) -> Any:
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str):
        raise BadInput(f"{_short(data)}{_at(where)}: expected a mapping with a name, one of {', '.join(table)}")
    if name not in table:
        raise UnknownName(f"name{_at(where)}", name, table)
    return _decode_dataclass(table[name], data, where)


def _decode_union(options: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and types.NoneType in options:
        return None
    classes = [o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o) and _has_table_name(o)]
    named = {str(getattr(cls, "name", "")): cls for cls in classes}
    if named and isinstance(data, dict):
        return _decode_named(named, data, where)
    rest = [option for option in options if option is not types.NoneType]
    # An exact type first, so that 3 in a field of "float | int" stays a whole number.
    for option in sorted(rest, key=lambda option: type(data) is not (typing.get_origin(option) or option)):
        try:
            return _decode(option, data, where)
        except BadInput as error:
            last = error
    raise last


def _decode_sequence(origin: Any, arguments: tuple[Any, ...], data: list[Any], where: str) -> Any:
    fixed = origin is tuple and arguments and arguments[-1] is not Ellipsis
    if fixed and len(arguments) != len(data):
        raise BadInput(f"{_short(data)}{_at(where)}: expected {len(arguments)} items")
    hints = arguments if fixed else (arguments[0] if arguments else Any,) * len(data)
    items = [_decode(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(hints, data, strict=True))]
    return items if origin is list else tuple(items)


@functools.lru_cache(maxsize=256)
def type_hints(cls: type) -> dict[str, Any]:
    """Return the resolved annotations of a class."""
    return typing.get_type_hints(cls, include_extras=True)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _has_table_name(cls: type) -> bool:
    """Whether ``name`` is a class variable, by which a table knows the class, and not a field."""
    is_field = any(f.name == "name" for f in dataclasses.fields(cls))
    return not is_field and isinstance(getattr(cls, "name", None), str)


def _wrong(hint: Any, data: Any, where: str) -> Any:
    expected = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise BadInput(f"{_short(data)}{_at(where)}: expected {expected}")


def _at(where: str) -> str:
    return f" at {where.lstrip('.')}" if where else ""


def _short(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."
