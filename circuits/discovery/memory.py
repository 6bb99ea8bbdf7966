"""How much memory a computation takes, and how many pairs at a time keep it within a budget."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from circuits.errors import BadInput

BUDGET = 512 * 2**20
"""Bytes that a computation may take where no budget is given."""
MARGIN = 0.5
"""Share of a given budget that is planned with. Measured is what tensors hold; the process takes up to twice as much,
for what the allocator loses between tensors and what kernels take beside the tensors that they return."""
CHURN = 0.6
"""Share of a budget that is given to what keeps and gives back many tensors of many sizes, which leaves more holes."""
GROWTH = 8
"""How many times as many pairs a rehearsal takes as the one before it, at most."""


class _Allocations(TorchDispatchMode):
    """Counts the bytes of every storage that comes into being, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of what it allocates."""
        given = kwargs or {}
        out = func(*args, **given)
        # what shares its memory with an argument is a view, or that argument, changed
        known = {storage._cdata for storage in _storages((*args, *given.values()))}
        for storage in _storages((out,)):
            if storage._cdata not in known:
                self._note(storage)
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def _storages(values: Iterable[Any]) -> Iterator[Any]:
    """The memory of every tensor among what an operation takes or gives: tensors, lists of tensors, and numbers."""
    for value in values:
        if isinstance(value, Tensor):
            if value.layout == torch.strided and value.device.type != "meta":
                yield value.untyped_storage()
        elif isinstance(value, list | tuple):
            yield from _storages(value)


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most memory that the tensors of a computation take together, its result included.

    Every allocation by an operation is counted until it is freed, on whatever device; scratch memory within a kernel is
    not. The number is the same in every run.
    """
    with _Allocations() as allocations:
        result = run()
    # only now may the result go: it is part of what there was at the peak
    del result
    return allocations.most


def churning(memory_budget: int | None) -> int | None:
    """Return the part of a budget that a computation may take which keeps and gives back tensors of many sizes."""
    return None if memory_budget is None else int(CHURN * memory_budget)


def pairs_at_a_time(
    rehearse: Callable[[int], object],
    n: int,
    *,
    memory_budget: int | None,
    kept: int = 0,
    batch_size: int | None = None,
    estimate: int | None = None,
) -> int:
    """Return how many of ``n`` pairs to take at a time.

    What some pairs take is measured: one, two, then up to eight times as many, and so on. As memory is at most
    proportional to the number of pairs, nothing that is tried exceeds the budget.

    Args:
        rehearse: Does what is most memory-consuming for a number of pairs, and returns what stays.
        n: Number of pairs.
        memory_budget: Bytes that the computation may take beside the model, its result included; None: 512 MB, the
            result aside.
        kept: Bytes that the results take, whatever is taken at a time.
        batch_size: Pairs at a time, at most.
        estimate: Bytes that all pairs take together, roughly; where that is far below what there is, nothing is
            measured.

    Raises:
        BadInput: the budget does not hold a single pair, or ``batch_size`` is less than 1.
    """
    if batch_size is not None and batch_size < 1:
        raise BadInput(f"batch_size = {batch_size}: expected at least 1")
    most = min(n, batch_size or n)
    room = BUDGET if memory_budget is None else int(MARGIN * memory_budget) - kept
    if memory_budget is None and estimate is not None and GROWTH * estimate < room:
        return most
    size, taken = 1, peak_bytes(partial(rehearse, 1))
    if taken > room and memory_budget is not None:
        needed = int((taken + kept) / MARGIN) + 1
        raise BadInput(
            f"memory_budget = {memory_budget} bytes: one pair takes {needed}, of which the result of all {n} pairs "
            f"takes {kept}"
        )
    if most > 1 and 2 * taken <= room:
        # what is broadcast over one pair is copied for two: from here on memory is proportional
        two = peak_bytes(partial(rehearse, 2))
        if two > room:
            return 1
        size, taken = 2, two
    while taken * most > room * size:
        more = min(GROWTH * size, most, room * size // max(1, taken))
        if more < 2 * size:
            return max(1, more)
        size, taken = more, peak_bytes(partial(rehearse, more))
    return most
