"""Activation patching: one place at a time, over layers and positions, heads or neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from circuits.discovery.batches import Setting, fitting, patchings, setting_of
from circuits.discovery.blocks import activations_at
from circuits.discovery.circuit import mean_interval
from circuits.discovery.exact import check_effects
from circuits.discovery.figures import draw_sweep
from circuits.discovery.metrics import Metric, logit_difference, name_of
from circuits.discovery.patching import Patching
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import HookedModel, module_of
from circuits.tasks.base import Pairs

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Cell = tuple[int, int]
