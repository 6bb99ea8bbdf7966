"""Figures of a study, from the numbers that its analyses keep."""

from __future__ import annotations

from circuits.plots.figures import fourier_figure, neuron_figure, training_figure

__all__ = ["fourier_figure", "neuron_figure", "training_figure"]
