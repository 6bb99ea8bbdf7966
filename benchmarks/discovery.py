"""Cost of the discovery methods, in CPU seconds and as multiples of one plain forward of the same model and batch.

    python benchmarks/discovery.py [--json] [--repeats N] [--growth] [--peer PYTHON]

Two models with random weights, vocabulary 128, 12 positions, LayerNorm, GELU, one thread: S (2 layers, 4 heads, d 128,
64 pairs) and M (4 layers, 8 heads, d 256, 16 pairs). Every method has a process of its own, in which it and a forward
take turns; what is reported is the median, over turns, of CPU time and of its ratio to the forward of the same turn,
and what the first run added to the process's memory (``rss_mb``). glibc is told to keep freed memory: otherwise page
faults are what is measured.

``--growth`` adds models of 4, 8 and 16 layers at a fixed batch, 16 pairs for eap and 4 for exact: time and memory per
edge, and how much of a memory budget is taken (four minutes more). ``--peer`` runs auto-circuit on the same weights and
pairs, in an environment of its own whose Python is given (``peer_auto_circuit.py`` says how to make one), and gives the
ratios: how many times as long it takes. ``--json`` prints rows and ratios. ``--check`` ends with an error where a
method takes more forwards than ``MOST_FORWARDS`` allows.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from circuits.discovery import Graph, acdc, eap, eap_ig_inputs, exact, kl_divergence
from circuits.model import ModelConfig, Transformer
from circuits.study.executor import HEAP
from circuits.tasks.base import Pairs

SIZES = {
    "S": (ModelConfig(128, 12, 2, 128, 4, act_fn="gelu", normalization="LN", init_std=0.15), 64),
    "M": (ModelConfig(128, 12, 4, 256, 8, act_fn="gelu", normalization="LN", init_std=0.15), 16),
}


def pairs_of(n: int) -> Pairs:
    generator = torch.Generator().manual_seed(0)
    clean, corrupt = torch.randint(0, 128, (2, n, 12), generator=generator)
    correct, wrong = torch.randint(0, 128, (2, n), generator=generator)
    return Pairs(clean, corrupt, torch.full((n,), 11), correct, wrong, "everything")


def cases(config: ModelConfig, n: int) -> dict[str, Callable[[], object]]:
    model, pairs = Transformer(config).eval(), pairs_of(n)

    def forward() -> None:
        with torch.no_grad():
            model(pairs.clean)

    divergence = kl_divergence(model, pairs)
    return {
        "forward": forward,
        "eap": lambda: eap(model, pairs),
        "eap-ig-inputs": lambda: eap_ig_inputs(model, pairs, steps=5),
        "exact": lambda: exact(model, pairs),
        "acdc": lambda: acdc(model, pairs, divergence, tau=0.01),
    }


def cpu_seconds(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


METHODS = ("eap", "eap-ig-inputs", "exact", "acdc")
MOST_FORWARDS = {
    ("S", "eap"): 4.5,
    ("S", "eap-ig-inputs"): 16,
    ("S", "exact"): 15,
    ("S", "acdc"): 100,
    ("M", "eap"): 4.5,
    ("M", "eap-ig-inputs"): 16,
    ("M", "exact"): 300,
    ("M", "acdc"): 1250,
}
"""What each method may take, in forwards; the mathematics needs about 3 for EAP, 12.5 for EAP-IG with five steps, and
10 to 12 (S) for exact patching."""


def row(size: str, method: str, repeats: int) -> dict[str, object]:
    """Cost of one method; run in a process of its own, so that its memory is not that of another."""
    runs = cases(*SIZES[size])
    forward, run = runs["forward"], runs[method]
    forward()
    before = resident()
    run()
    # the heap is kept, so that what it grew to is still there
    grown = resident() - before
    turns = [(cpu_seconds(forward, 10), cpu_seconds(run, 1)) for _ in range(repeats)]
    return {
        "size": size,
        "method": method,
        "forwards": round(statistics.median(spent / one for one, spent in turns), 2),
        "cpu_s": round(statistics.median(spent for _, spent in turns), 5),
        "rss_mb": round(grown / 2**20, 1),
    }


def peer_rows(size: str, python: str) -> list[dict[str, object]]:
    """What auto-circuit needs for the same, in its own environment."""
    config, n = SIZES[size]
    model, pairs = Transformer(config).eval(), pairs_of(n)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"pairs.{name}": getattr(pairs, name) for name in ("clean", "corrupt", "correct", "wrong")}
    sizes = {
        name: getattr(config, name)
        for name in ("d_vocab", "n_ctx", "n_layers", "d_model", "n_heads", "d_head", "d_mlp")
    } | {"act_fn": "gelu", "normalization_type": "LN"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata={"sizes": json.dumps(sizes)})
        script = Path(__file__).with_name("peer_auto_circuit.py")
        environment = {**os.environ, **HEAP}
        said = subprocess.run(
            [python, str(script), str(path)], capture_output=True, text=True, check=False, env=environment
        )
    if said.returncode:
        raise SystemExit(f"auto-circuit could not be run:\n{said.stderr[-2000:]}")
    found = json.loads(said.stdout.strip().splitlines()[-1])
    return [
        {
            "size": size,
            "method": f"auto-circuit {row['method']}",
            "forwards": round(row["forwards"], 2),
            "cpu_s": round(row["cpu_s"], 5),
            "edges": found["edges"],
        }
        for row in found["rows"]
    ]


class PeakMemory:
    """The most resident memory that this process has while a block runs, above what it has at the start."""

    def __enter__(self) -> PeakMemory:
        # what earlier work left free in the heap would be taken again unseen
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.start, self.most, self.running = resident(), 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.most = max(self.most, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


GROWTH_LAYERS = (4, 8, 16)
GROWTH = {"eap": (eap, 16, 64), "exact": (exact, 4, 32)}
"""What is run on models that grow: the method, the pairs, and the megabytes of the run that is given a budget."""
LONG = 16
"""Layers of which exact patching takes minutes: it is run once there, without a budget."""


def growth_row(n_layers: int, method: str, budgeted: bool) -> dict[str, object]:
    """Time and memory per edge of a model of the width of M with more layers; run in a process of its own."""
    config = ModelConfig(128, 12, n_layers, 256, 8, act_fn="gelu", normalization="LN", init_std=0.15)
    run, n, megabytes = GROWTH[method]
    model, pairs = Transformer(config).eval(), pairs_of(n)
    n_edges, budget = Graph.from_model(model).n_edges, megabytes * 2**20 if budgeted else None
    if n_layers < LONG:  # what is loaded at the first call is no part of what a call takes
        run(model, pairs_of(2), memory_budget=2**30)
    forward = forward_seconds(model, pairs)
    with PeakMemory() as memory:
        spent = cpu_seconds(partial(run, model, pairs, memory_budget=budget), 1)
    return {
        "size": f"{n_layers} layers",
        "method": method if budget is None else f"{method}, budget {megabytes} MB",
        "edges": n_edges,
        "pairs": len(pairs),
        "forwards": round(spent / forward, 2),
        "cpu_s": round(spent, 5),
        "us_per_edge": round(1e6 * spent / n_edges, 1),
        "rss_mb": round(memory.most / 2**20),
        "kb_per_edge": round(memory.most / 1024 / n_edges, 1),
    } | ({} if budget is None else {"of_budget": round(memory.most / budget, 2)})


def growth() -> list[dict[str, object]]:
    """Every row, each from a process of its own, without the kept heap: memory that is given back is to be seen."""
    asked = [
        ["--growth-of", str(n_layers), method, budgeted]
        for n_layers in GROWTH_LAYERS
        for method in GROWTH
        for budgeted in ("no", "yes")
        if (n_layers, method, budgeted) != (LONG, "exact", "yes")
    ]
    return [one for arguments in asked for one in in_a_process(arguments, {})]


def forward_seconds(model: Transformer, pairs: Pairs) -> float:
    with torch.no_grad():
        model(pairs.clean)
        return statistics.median(cpu_seconds(lambda: model(pairs.clean), 5) for _ in range(5))


def in_a_process(arguments: list[str], heap: dict[str, str]) -> list[dict[str, object]]:
    """Rows from a process of their own, so that one's memory is not the next one's."""
    environment = {name: value for name, value in os.environ.items() if name not in HEAP} | heap
    call = [sys.executable, __file__, *arguments]
    said = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: list[dict[str, object]] = json.loads(said.stdout)
    return found


def announce(row: dict[str, object]) -> None:
    """Say a row as soon as it is measured: the largest models take minutes, and what was measured is not to be lost."""
    print(line(row), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--growth", action="store_true", help="also models of 4, 8 and 16 layers")
    parser.add_argument("--peer", metavar="PYTHON", help="Python of an environment with auto-circuit")
    parser.add_argument("--check", action="store_true", help="fail where a method takes more forwards than it may")
    parser.add_argument("--growth-of", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.growth_of:
        n_layers, method, budgeted = arguments.growth_of
        one = growth_row(int(n_layers), method, budgeted == "yes")
        announce(one)
        print(json.dumps([one]))
        return
    if arguments.row:
        one = row(*arguments.row, arguments.repeats)
        announce(one)
        print(json.dumps([one]))
        return
    repeats = ["--repeats", str(arguments.repeats)]
    found = [
        one for size in SIZES for method in METHODS for one in in_a_process(["--row", size, method, *repeats], HEAP)
    ]
    if arguments.peer:
        found += [one for size in SIZES for one in peer_rows(size, arguments.peer)]
    if arguments.growth:
        found += growth()
    if arguments.json:
        print(json.dumps({"rows": found, "ratios": ratios(found)}))
    else:
        show(found)
    over = [
        f"{row['size']} {row['method']}: {row['forwards']} forwards of {most}"
        for row in found
        if (most := MOST_FORWARDS.get((str(row["size"]), str(row["method"])))) and float(str(row["forwards"])) > most
    ]
    if arguments.check and over:
        raise SystemExit("more than allowed: " + "; ".join(over))


def ratios(found: list[dict[str, object]]) -> list[dict[str, object]]:
    """How many times as long the peer takes, where it was run."""
    spent = {(row["size"], row["method"]): float(str(row["cpu_s"])) for row in found}
    return [
        {"size": size, "method": method, "times": round(spent[size, f"auto-circuit {method}"] / ours, 2)}
        for (size, method), ours in spent.items()
        if (size, f"auto-circuit {method}") in spent
    ]


COLUMNS = ("edges", "pairs", "forwards", "cpu_s", "us_per_edge", "rss_mb", "kb_per_edge", "of_budget")


def line(row: dict[str, object]) -> str:
    return f"{row['size']:10}{row['method']:30}" + "".join(f"{row.get(name, '')!s:>13}" for name in COLUMNS)


def show(found: list[dict[str, object]]) -> None:
    print(f"{'size':10}{'method':30}" + "".join(f"{name:>13}" for name in COLUMNS))
    for row in found:
        print(line(row))
    for ratio in ratios(found):
        print(f"{ratio['size']}: auto-circuit takes {ratio['times']} times as long for {ratio['method']}")


if __name__ == "__main__":
    main()
