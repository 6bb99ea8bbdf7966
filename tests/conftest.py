"""What every test shares: one torch thread, repeatable hypothesis runs, the published reference data."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
import typing
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import settings
from jaxtyping import config as jaxtyping_config

REFERENCE_DATA = "CIRCUITS_REFERENCE_DATA"

LENS_4 = importlib.metadata.version("transformer-lens") >= "4"
NO_NATIVE = "to_bridge needs transformer_lens.utilities.tl_checkpoint_conversion, which TransformerLens has since 4"
NO_EDGES = "attribution_patching by edges is not in TransformerLens before 4"
needs_native_bridge = pytest.mark.skipif(not LENS_4, reason=NO_NATIVE)
needs_edge_attribution = pytest.mark.skipif(not LENS_4, reason=NO_EDGES)

# No deadline: a shared machine is slow now and then. Derandomised: the suite gives everybody the same answer.
settings.register_profile("circuits", deadline=None, derandomize=True, database=None)
settings.load_profile("circuits")

# At these sizes a second thread is slower as soon as anything else runs (pytest-xdist is something else).
torch.set_num_threads(1)


if sys.version_info < (3, 12):
    # Up to Python 3.11 isinstance against a protocol evaluates every property of the instance, and the run-time types
    # ask at every call: half of the suite's time. An instance of a class that has passed is not asked again.
    _asked: typing.Any = typing._ProtocolMeta.__instancecheck__  # type: ignore[attr-defined]
    _passed: set[tuple[type, type]] = set()

    def _ask_once(protocol: type, instance: object) -> bool:
        key = (protocol, type(instance))
        if key not in _passed and _asked(protocol, instance):
            _passed.add(key)
        return key in _passed

    typing._ProtocolMeta.__instancecheck__ = _ask_once  # type: ignore[attr-defined]


# Checking every call of every function takes longer than the calls. In each test the first call of each function is
# checked; functions within functions are not, which the import hook would decorate again each time that they are made.
# Each is decorated when it is first called: collection would wait for thousands, most of which one worker never calls.
_check: typing.Any = jaxtyping.jaxtyped
_called: set[object] = set()


def _check_first_call(*functions: typing.Any, **options: typing.Any) -> typing.Any:
    def decorate(one: typing.Any) -> typing.Any:
        if isinstance(one, type):
            return _check(one, **options)
        if "<locals>" in one.__qualname__:
            return one
        checked: typing.Any = None

        @functools.wraps(one)
        def first_call(*args: typing.Any, **kwargs: typing.Any) -> typing.Any:
            nonlocal checked
            if one in _called:
                return one(*args, **kwargs)
            if checked is None:
                checked = _check(one, **options)
            _called.add(one)
            return checked(*args, **kwargs)

        return first_call

    return decorate(*functions) if functions else decorate


jaxtyping.jaxtyped = _check_first_call


@pytest.fixture(autouse=True)
def _run_time_types(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let tests marked ``untyped`` reach the checks that meet users, who have no run-time types switched on."""
    _called.clear()
    jaxtyping_config.update("jaxtyping_disable", request.node.get_closest_marker("untyped") is not None)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def with_repeats(cases: Iterable[typing.Any], kept: Collection[typing.Any]) -> list[typing.Any]:
    """Cases of a test, of which those that are not kept repeat its check on more models, in ``make test-long`` only."""
    chosen = list(cases)
    assert set(kept) < set(chosen)
    long = pytest.mark.long
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=long)
        for case in chosen
    ]


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """The folder of published models; the test is skipped where there is none."""
    return reference_folder()


def reference_folder() -> Path:
    """Return the folder of published models named by the environment, or skip the test with the reason."""
    name = os.environ.get(REFERENCE_DATA)
    if not name:
        pytest.skip(f"{REFERENCE_DATA} is unset: it names a folder of published models to test against")
    folder = Path(name)
    if not folder.is_dir():
        pytest.skip(f"{REFERENCE_DATA} is {name!r}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where tests leave files for people to look at, such as screenshots; ignored by git."""
    folder = Path(__file__).parent / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder


def pytest_collection_finish() -> None:
    """Leave what collection loaded out of every later search for garbage: it stays until the end."""
    gc.collect()
    gc.freeze()
