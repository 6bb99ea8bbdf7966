"""Where in a model the computation is: scores for every edge, and how faithful the top of them is.

Everything runs on plain forward passes of our own model or of any ``TransformerBridge``: no flag of the model is set,
nothing of it is changed, and no tokenizer is needed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from circuits.discovery.acdc import acdc
from circuits.discovery.activation_patching import ActivationPatching, activation_patching
from circuits.discovery.attention_patterns import PatternAttribution, attention_patterns
from circuits.discovery.circuit import Circuit
from circuits.discovery.clean_corrupted import clean_corrupted
from circuits.discovery.comparison import Comparison, compare
from circuits.discovery.completeness import Completeness, completeness, minimality
from circuits.discovery.curves import Faithfulness
from circuits.discovery.eap import eap
from circuits.discovery.eap_ig_activations import eap_ig_activations
from circuits.discovery.eap_ig_inputs import eap_ig_inputs
from circuits.discovery.edge_accuracy import EdgeAccuracy, edge_accuracy
from circuits.discovery.edge_pruning import edge_pruning
from circuits.discovery.evaluate import MIB_SHARES, ablated_metric, faithfulness
from circuits.discovery.exact import exact
from circuits.discovery.exact_nodes import exact_nodes
from circuits.discovery.gradient_rules import GIM, RELP, RULES, GradientRules
from circuits.discovery.graph import Graph
from circuits.discovery.hisp import hisp
from circuits.discovery.hypothesis_tests import CircuitTests, HypothesisTest, hypothesis_tests
from circuits.discovery.information_flow_routes import information_flow_routes
from circuits.discovery.mask_gradient import mask_gradient
from circuits.discovery.mask_ig import mask_ig
from circuits.discovery.metrics import kl_divergence, log_probability, logit_difference, squared_error
from circuits.discovery.mib import load_mib, save_mib
from circuits.discovery.node_attribution import node_attribution
from circuits.discovery.optimal_ablation import optimal_constants
from circuits.discovery.path_patching import PathEffect, path_patching
from circuits.discovery.random_circuits import random_circuits
from circuits.discovery.stability import Stability, stability
from circuits.discovery.subnetwork_probing import subnetwork_probing
from circuits.discovery.uniform_gradient_sampling import uniform_gradient_sampling
from circuits.errors import BadInput, UnknownName
from circuits.model import HookedModel
from circuits.tasks.base import Pairs

__all__ = [
    "ANALYSES",
    "EXACT_UP_TO",
    "GIM",
    "METHODS",
    "MIB_SHARES",
    "RELP",
    "RULES",
    "ActivationPatching",
    "Circuit",
    "CircuitTests",
    "Comparison",
    "Completeness",
    "EdgeAccuracy",
    "Faithfulness",
    "GradientRules",
    "Graph",
    "HypothesisTest",
    "PathEffect",
    "PatternAttribution",
    "Stability",
    "ablated_metric",
    "acdc",
    "activation_patching",
    "attention_patterns",
    "attribute",
    "clean_corrupted",
    "compare",
    "completeness",
    "eap",
    "eap_ig_activations",
    "eap_ig_inputs",
    "edge_accuracy",
    "edge_pruning",
    "exact",
    "exact_nodes",
    "faithfulness",
    "hisp",
    "hypothesis_tests",
    "information_flow_routes",
    "kl_divergence",
    "load_mib",
    "log_probability",
    "logit_difference",
    "mask_gradient",
    "mask_ig",
    "minimality",
    "node_attribution",
    "optimal_constants",
    "path_patching",
    "random_circuits",
    "save_mib",
    "squared_error",
    "stability",
    "subnetwork_probing",
    "uniform_gradient_sampling",
]

METHODS: Mapping[str, Callable[..., Circuit]] = {
    "eap": eap,
    "eap-ig-inputs": eap_ig_inputs,
    "eap-ig-activations": eap_ig_activations,
    "clean-corrupted": clean_corrupted,
    "mask-gradient": mask_gradient,
    "mask-ig": mask_ig,
    "information-flow-routes": information_flow_routes,
    "hisp": hisp,
    "exact": exact,
    "exact-nodes": exact_nodes,
    "node-attribution": node_attribution,
    "acdc": acdc,
    "subnetwork-probing": subnetwork_probing,
    "edge-pruning": edge_pruning,
    "uniform-gradient-sampling": uniform_gradient_sampling,
}


ANALYSES: Mapping[str, Callable[..., Any]] = {
    "activation-patching": activation_patching,
    "path-patching": path_patching,
    "attention-patterns": attention_patterns,
    "gradient-rules": GradientRules,
    "optimal-constants": optimal_constants,
    "faithfulness": faithfulness,
    "completeness": completeness,
    "minimality": minimality,
    "hypothesis-tests": hypothesis_tests,
    "stability": stability,
    "random-circuits": random_circuits,
    "edge-accuracy": edge_accuracy,
    "compare": compare,
}
"""What there is beside the methods: other scores, and what says how good a circuit is."""


EXACT_UP_TO = 2_000
"""Edges up to which ``attribute`` patches every edge exactly unless told otherwise: a few hundred forwards at most."""


def attribute(model: HookedModel, pairs: Pairs, *, method: str | None = None, **options: Any) -> Circuit:
    """Return the circuit that a method of ``METHODS`` finds; ``options`` are the method's own arguments.

    Args:
        model: Ours or a ``TransformerBridge``.
        pairs: Clean and corrupt inputs.
        method: A name in ``METHODS``. None: ``exact`` for graphs of up to ``EXACT_UP_TO`` edges, where nothing need
            be approximated, and ``eap-ig-inputs`` beyond; ``Circuit.method`` says which it was.
        options: Passed on.

    Raises:
        BadInput: the method has no such option.
        UnknownName: no such method.
    """
    if method is None:
        n_edges = Graph.from_model(model, neurons=bool(options.get("neurons"))).n_edges
        method = "exact" if n_edges <= EXACT_UP_TO else "eap-ig-inputs"
        chosen = f", the method for {n_edges} edges if none is named"
    else:
        chosen = ""
    name = method.replace("_", "-")
    if name not in METHODS:
        raise UnknownName("discovery method", method, METHODS)
    known = inspect.signature(METHODS[name]).parameters
    if unknown := [option for option in options if option not in known]:
        able = ", ".join(other for other in METHODS if unknown[0] in inspect.signature(METHODS[other]).parameters)
        raise BadInput(
            f"{unknown[0]} is no option of {name!r}{chosen}: "
            + (f"name a method that has it ({able})" if able else f"expected some of {', '.join(list(known)[2:])}")
        )
    return METHODS[name](model, pairs, **options)
