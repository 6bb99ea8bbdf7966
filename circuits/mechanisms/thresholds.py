"""The thresholds of the rule and of the tests that it reads: one table, one version, stored with every verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass

VERSION = "arithmetic-10"


@dataclass(frozen=True)
class Thresholds:
    """Every number that the rule and the tests that it reads compare with; shares, but for ``spare_functions``."""

    learned_train: float = 0.95
    generalises: float = 0.95
    memorised_unseen: float = 0.2
    memorised_few: float = 0.35
    memorised_luck: float = 0.10
    errs_learned: float = 0.50
    errs_alike: float = 0.05
    frequency_share: float = 0.60
    explained: float = 0.90
    restricted: float = 0.95
    excluded: float = 0.15
    interchange: float = 0.95
    interchange_control: float = 0.10
    interchange_complement: float = 0.10
    interchange_random: float = 0.75
    spare_functions: float = 2
    digits_random: float = 0.50
    line_interchange: float = 0.95
    line_random: float = 0.50
    columns_line: float = 0.50
    hinge_share: float = 0.75
    indicator_share: float = 0.75
    region_frequency_share: float = 0.10
    list_overrules: float = 0.75
    list_known: float = 0.05
    list_algorithm: float = 0.25
    limited: float = 0.85
    slice_heuristic: float = 0.85
    block_algorithm: float = 0.05
    block_heuristic: float = 0.20
    column_interchange: float = 0.95
    rectangles_share: float = 0.50
    rectangles_renamed: float = 0.10
    rectangles_idealised: float = 0.05
    rectangles_ablated: float = 0.70
    results_share: float = 0.75
    results_renamed: float = 0.10
    results_idealised: float = 0.05
    results_ablated: float = 0.70
    pairs_share: float = 0.75
    pairs_other: float = 0.25
    region_inside: float = 0.90
    region_outside: float = 0.50
    region_right: float = 0.90
    region_smallest: float = 0.05
    slice_algorithm: float = 0.80
    cascade_reached: float = 0.90
    scrubbed_line: float = 0.95
    scrubbed_columns: float = 0.50
    scrubbed_control: float = 0.50
    column_scrubbed: float = 0.95
    column_own: float = 0.75
    column_listed: float = 0.25


RULE = Thresholds()


def rule_table(rule: Thresholds = RULE) -> dict[str, float]:
    """The thresholds by name, as printed in reports."""
    return asdict(rule)
