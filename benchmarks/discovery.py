"""Cost of the discovery methods, in CPU seconds and as multiples of one plain forward of the same model and batch.

    python benchmarks/discovery.py [--json] [--repeats N]

Two models with random weights, vocabulary 128, 12 positions, LayerNorm, GELU, one thread: S (2 layers, 4 heads, d 128,
64 pairs) and M (4 layers, 8 heads, d 256, 16 pairs). A forward and the methods take turns; what is reported is the
median, over turns, of CPU time and of its ratio to the forward of the same turn. glibc is told to keep freed memory
(the script starts itself again with that in its environment): otherwise page faults are what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch

from circuits.discovery import Graph, ablated_metric, acdc, eap, eap_ig_inputs, exact, kl_divergence
from circuits.model import ModelConfig, Transformer
from circuits.tasks.base import Pairs

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
}
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
    generator = torch.Generator().manual_seed(1)
    half = torch.rand(1, Graph.from_model(model).n_edges, generator=generator) < 0.5

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
        "ablation of half the edges": lambda: ablated_metric(model, pairs, half),
    }


def cpu_seconds(run: Callable[[], object], calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def rows(size: str, repeats: int) -> list[dict[str, object]]:
    runs = cases(*SIZES[size])
    for run in runs.values():
        run()
    turns = [
        {name: cpu_seconds(run, 10 if name == "forward" else 1) for name, run in runs.items()} for _ in range(repeats)
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [
        {
            "size": size,
            "method": name,
            "forwards": round(statistics.median(turn[name] / turn["forward"] for turn in turns), 2),
            "cpu_s": round(statistics.median(turn[name] for turn in turns), 5),
            "rss_mb": round(peak),
        }
        for name in runs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HEAP})
    torch.set_num_threads(1)
    found = [row for size in SIZES for row in rows(size, arguments.repeats)]
    if arguments.json:
        print(json.dumps({"rows": found}))
        return
    print(f"{'size':5}{'method':28}{'forwards':>9}{'CPU s':>10}{'peak MB':>9}")
    for row in found:
        print(f"{row['size']:5}{row['method']:28}{row['forwards']:>9}{row['cpu_s']:>10}{row['rss_mb']:>9}")


if __name__ == "__main__":
    main()
