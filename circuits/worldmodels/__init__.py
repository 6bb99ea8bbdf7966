"""World-model probes: does a network that plays legally know the state, or only what is legal next?"""

from __future__ import annotations

from circuits.worldmodels.adaptation import adaptation
from circuits.worldmodels.adversarial import adversarial
from circuits.worldmodels.assess import PROBES, assess, measure
from circuits.worldmodels.boundary import boundary, minimal_classes
from circuits.worldmodels.counterfactual import counterfactual
from circuits.worldmodels.detours import detours
from circuits.worldmodels.heuristic_rules import heuristic_rules
from circuits.worldmodels.inductive_bias import fine_tuned_inductive_bias, inductive_bias
from circuits.worldmodels.intervention import intervention
from circuits.worldmodels.legal_actions import fan_out, legal_actions
from circuits.worldmodels.myhill_nerode import Acceptance, myhill_nerode
from circuits.worldmodels.next_state import latent_rollout, next_state
from circuits.worldmodels.reading import Curve, EditedBoard, Reading
from circuits.worldmodels.state_probe import state_probe
from circuits.worldmodels.symmetry import symmetry
from circuits.worldmodels.verdict import LABELS, SCORES, VERSION, Assessment, Score, Thresholds, judge

__all__ = [
    "LABELS",
    "PROBES",
    "SCORES",
    "VERSION",
    "Acceptance",
    "Assessment",
    "Curve",
    "EditedBoard",
    "Reading",
    "Score",
    "Thresholds",
    "adaptation",
    "adversarial",
    "assess",
    "boundary",
    "counterfactual",
    "detours",
    "fan_out",
    "fine_tuned_inductive_bias",
    "heuristic_rules",
    "inductive_bias",
    "intervention",
    "judge",
    "latent_rollout",
    "legal_actions",
    "measure",
    "minimal_classes",
    "myhill_nerode",
    "next_state",
    "state_probe",
    "symmetry",
]
