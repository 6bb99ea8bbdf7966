"""Files are whole or absent; JSON is strict."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuits._io import (
    atomic_write,
    canonical_json,
    config_id,
    file_size,
    from_json,
    is_file,
    parse_json,
    read_bytes,
    sha256_bytes,
    sha256_file,
    to_json,
)
from circuits.errors import BadInput, CorruptRun, StorageError, UnknownName


@dataclass(frozen=True)
class Point:
    x: float
    n: int = 1
    names: tuple[str, ...] = ()
    maybe: int | None = None


@given(st.floats(), st.integers(-(2**53), 2**53), st.lists(st.text(max_size=5), max_size=3))
def test_json_round_trip(x, n, names):
    point = Point(x, n, tuple(names), None)
    again = from_json(Point, to_json(point))
    assert canonical_json(again) == canonical_json(point)
    assert config_id(again) == config_id(point)
    assert math.isnan(x) or again == point


def test_an_int_in_a_float_field_is_the_same_config():
    assert config_id(Point(1)) == config_id(Point(1.0))


def test_strictness():
    with pytest.raises(UnknownName, match="key of Point 'y'"):
        from_json(Point, {"x": 1.0, "y": 2})
    with pytest.raises(BadInput, match="lacks 'x'"):
        from_json(Point, {"n": 1})
    with pytest.raises(BadInput):
        from_json(Point, {"x": "one"})
    with pytest.raises(BadInput):
        from_json(Point, {"x": 1.0, "n": True})


@pytest.mark.parametrize("text", ["{", '{"a": NaN}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_bad_json_is_one_typed_error(text):
    with pytest.raises(CorruptRun, match="not valid JSON"):
        parse_json(text, "here")


def test_atomic_write_and_hash(tmp_path):
    path = tmp_path / "a"
    assert atomic_write(path, b"one") == sha256_file(path) == sha256_bytes(b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert read_bytes(path, sha256=sha256_bytes(b"two")) == b"two"
    with pytest.raises(CorruptRun, match="altered"):
        read_bytes(path, sha256=sha256_bytes(b"one"))
    with pytest.raises(CorruptRun, match="cannot read"):
        read_bytes(tmp_path / "none")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, code):
    path = tmp_path / "a"
    atomic_write(path, b"old")

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="choose another output directory"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_file_is_there_or_not(tmp_path):
    (tmp_path / "a").write_bytes(b"four")
    assert file_size(tmp_path / "a") == 4
    assert is_file(tmp_path / "a")
    for absent in (tmp_path, tmp_path / "b", tmp_path / "a" / "below a file"):
        assert not is_file(absent)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"], ids=["too long", "null"])
def test_a_name_that_no_file_can_have_is_one_typed_error(tmp_path, name):
    with pytest.raises(StorageError, match="choose another directory"):
        is_file(tmp_path / name)


def test_a_directory_that_may_not_be_searched_is_one_typed_error(tmp_path, monkeypatch):
    # the superuser may search all of them, so the system is made to refuse
    def refuse(path, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", refuse)
        with pytest.raises(StorageError, match="a: Permission denied: choose another directory"):
            is_file(tmp_path / "a")


@pytest.mark.untyped
@pytest.mark.parametrize("name", [3, None, 2.5, ["a"]])
def test_a_name_that_is_no_text_is_unknown_like_any_other(name):
    assert f"unknown kind {name!r}: known: a, b" in str(UnknownName("kind", name, ("b", "a")))
