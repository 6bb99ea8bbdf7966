"""The report of a study: one self-contained HTML file that opens from disk, offline."""

from __future__ import annotations

from circuits.report.write import write, write_calibration

__all__ = ["write", "write_calibration"]
