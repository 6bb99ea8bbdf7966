"""Figures of a study, from the numbers that its analyses keep."""

from __future__ import annotations

from circuits.plots.figures import fourier_figure, neuron_figure, training_figure
from circuits.plots.world_models import board_figure, curves_figure, score_figure

__all__ = ["board_figure", "curves_figure", "fourier_figure", "neuron_figure", "score_figure", "training_figure"]
