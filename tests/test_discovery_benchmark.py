"""The benchmark of discovery: what it says of the peer and of budgets, whichever way it is printed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@pytest.fixture
def benchmark() -> ModuleType:
    path = Path(__file__).parent.parent / "benchmarks/discovery.py"
    spec = importlib.util.spec_from_file_location("benchmark_of_discovery", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ratios_to_the_peer_are_in_the_json_too(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def own(arguments: list[str], heap: object) -> list[dict[str, Any]]:
        return [{"size": arguments[1], "method": arguments[2], "cpu_s": 0.5, "forwards": 4.0}]

    def peer(size: str, python: str) -> list[dict[str, Any]]:
        return [{"size": size, "method": "auto-circuit eap", "cpu_s": 1.25, "edges": 110}]

    monkeypatch.setattr(benchmark, "in_a_process", own)
    monkeypatch.setattr(benchmark, "peer_rows", peer)
    threads = torch.get_num_threads()
    try:
        for flags in (["--json"], []):
            monkeypatch.setattr(sys, "argv", ["discovery.py", "--peer", "python", *flags])
            benchmark.main()
    finally:
        torch.set_num_threads(threads)
    first, *table = capsys.readouterr().out.splitlines()
    stored = json.loads(first)
    assert stored["ratios"] == [{"size": size, "method": "eap", "times": 2.5} for size in ("S", "M")]
    assert len(stored["rows"]) == 2 * (len(benchmark.METHODS) + 1) == len(table) - 3
    assert "M: auto-circuit takes 2.5 times as long for eap" in table


def test_growth_has_exact_at_every_depth_and_says_what_share_of_a_budget_is_taken(benchmark: ModuleType) -> None:
    rows = [benchmark.growth_row(1, method, budgeted) for method in ("eap", "exact") for budgeted in (False, True)]
    assert [row["pairs"] for row in rows] == [16, 16, 4, 4]
    assert [row["method"].split(",")[0] for row in rows] == ["eap", "eap", "exact", "exact"]
    for row in rows:
        budget = 2**20 * int(row["method"].split()[-2]) if "budget" in row["method"] else 0
        assert ("of_budget" in row) == bool(budget)
        assert not budget or row["of_budget"] == pytest.approx(row["rss_mb"] * 2**20 / budget, abs=0.03)
