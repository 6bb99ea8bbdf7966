"""Edge scores and ablations against TransformerLens's own, on tiny randomly initialised Hugging Face models.

TransformerLens scores an edge at every position, ours are its sums over positions. Its graph has one source for the
embedding of the token and none for that of the position, whose edges compare with nothing: position embeddings are
the same in clean and corrupt, so ours must be zero. Neither graph folds the layer norm into the weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import needs_edge_attribution
from discovery_models import close, hugging_face, some_pairs
from torch import Tensor

from circuits import discovery
from circuits.discovery import eap
from circuits.tasks.base import Pairs


@needs_edge_attribution
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX"])
def test_scores_and_ablations_equal_transformer_lens_own(architecture: str, double: bool) -> None:
    from transformer_lens.tools.analysis import attribution_patching as ap

    model, pairs = hugging_face(architecture), some_pairs(2)
    model = model.double() if double else model
    pairs = replace(pairs, position=torch.full((2,), 3), correct=torch.tensor([4, 4]), wrong=torch.tensor([7, 7]))

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, 4] - logits[0, -1, 7]

    # Theirs goes from the run with gradients to the other one: hand it the clean run as the corrupt one.
    config = ap.EdgeAttributionConfig(granularity="edge")
    theirs = ap.attribution_patch(model, pairs.corrupt, pairs.clean, metric, config).edge_scores
    circuit = eap(model, pairs)
    expected = torch.zeros(circuit.graph.n_edges)
    for (writer, reader), score in theirs.items():
        expected[circuit.graph.index(*lens_names(writer, reader))] += score
    assert close(circuit.scores, expected, 1e-5)
    if double:  # edge by edge, however small
        assert bool(((circuit.scores - expected).abs() <= 1e-5 * expected.abs() + 1e-10).all())

    one = Pairs(*(t[:1] for t in (pairs.clean, pairs.corrupt, pairs.position, pairs.correct, pairs.wrong)), changed="")
    gone = {lens_names(*edge) for i, edge in enumerate(theirs) if not i % 3 and edge[0].position == 3}
    kept = [edge for edge in theirs if lens_names(*edge) not in gone]
    result = ap.faithfulness(model, one.clean, one.corrupt, metric, kept)
    got = discovery.ablated_metric(model, one, ~circuit.graph.mask(gone)[None])[0, 0]
    gap = result.full_metric - result.corrupt_metric
    assert float(got) == pytest.approx(result.corrupt_metric + result.recovered * gap, abs=1e-4 * abs(gap))


def lens_names(writer: Any, reader: Any) -> tuple[str, str]:
    """Our names of an edge of TransformerLens's graph."""
    source = {"embed": "embed", "mlp_out": f"m{writer.layer}"}.get(writer.kind, f"a{writer.layer}.h{writer.head}")
    if reader.kind in ("mlp_in", "logits"):
        return source, "logits" if reader.kind == "logits" else f"m{reader.layer}"
    return source, f"a{reader.layer}.h{reader.head}.{reader.kind[0]}"
