"""Circuits as the MIB leaderboard writes them: export and import of its JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from circuits._io import read_json, write_json
from circuits.discovery.circuit import Circuit
from circuits.discovery.graph import Graph
from circuits.errors import BadInput, CorruptRun


def save_mib(circuit: Circuit, path: Path | str, *, d_model: int) -> Path:
    """Write a circuit as the MIB leaderboard's JSON and return the file's path.

    There an edge is ``input->a0.h1<q>`` or ``a0.h1->m0``, the token embedding is ``input``, and a large score says that
    the edge helps: signed scores change their sign (ours is the effect of ablating the edge). Edges from a position
    embedding have no place there and are left out: with inputs of one length ablating them changes nothing. The format
    has whole MLPs, and a head's query, key and value apart. Its reader gives an attention-only model MLPs with scores
    of zero. Where query heads share keys and values, the format has the shared edge once for each of them: the score is
    divided among these, and reading the file adds it up again.

    Args:
        circuit: The circuit; which edges are kept becomes ``in_graph``.
        path: The file to write.
        d_model: Width of the model's residual stream, which the format records.

    Source: aaronmueller/MIB-circuit-track and hannamw/EAP-IG, ``Graph.to_json``.

    Raises:
        BadInput: sources are neurons, or heads are merged, neither of which the format can say.
        StorageError: the file cannot be written.
    """
    names = _names(circuit.graph)
    scores = (-circuit.scores if circuit.signed else circuit.scores).tolist()
    kept = circuit.kept.tolist()
    in_graph = {_node(end) for i, edge in enumerate(circuit.graph.edges) if kept[i] for end in edge}
    in_graph |= {end for name, (i, _) in names.items() if kept[i] for end in name.split("<")[0].split("->")}
    nodes = {_node(name): {"in_graph": _node(name) in in_graph} for name in circuit.graph.sources}
    nodes.pop("pos_embed", None)
    layers = [re.fullmatch(r"a(\d+)\.h(\d+)", name) for name in circuit.graph.sources]
    places = [(int(found[1]), int(found[2])) for found in layers if found]
    config = {
        "n_layers": 1 + max(layer for layer, _ in places),
        "n_heads": 1 + max(head for _, head in places),
        "parallel_attn_mlp": "m0" in circuit.graph.readers and circuit.graph.is_parallel(0),
        "d_model": d_model,
    }
    edges = {name: {"score": scores[i] / heads, "in_graph": kept[i]} for name, (i, heads) in names.items()}
    nodes |= {"logits": {"in_graph": "logits" in in_graph}}
    write_json(path, {"cfg": config, "nodes": nodes, "edges": edges})
    return Path(path)


def load_mib(path: Path | str, graph: Graph) -> Circuit:
    """Return the circuit in a file of the MIB leaderboard, on a model's graph.

    Edges from a position embedding, of which the file says nothing, are kept with a score of zero.

    Args:
        path: The file.
        graph: Of the model that the circuit is of: ``Graph.from_model(model)``.

    Source: as ``save_mib``.

    Raises:
        CorruptRun: the file is missing or is no such circuit.
        BadInput: the file's edges are not those of this graph, or no file can have them.
    """
    stored = read_json(path)
    edges = stored.get("edges") if isinstance(stored, dict) else None
    if not isinstance(edges, Mapping) or not edges:
        raise CorruptRun(f"{path} holds no 'edges': expected a circuit as the MIB leaderboard writes it")
    names = _names(graph)
    if odd := sorted(names.keys() ^ edges.keys()):
        where = "not in this model's graph" if odd[0] in edges else "not in the file"
        raise BadInput(f"edge {odd[0]} is {where} ({len(odd)} such edges): expected the circuit of this very model")
    scores, kept = torch.zeros(graph.n_edges), torch.ones(graph.n_edges, dtype=torch.bool)
    kept[[i for i, _ in names.values()]] = False
    for name, (i, _) in names.items():
        entry: Any = edges[name]
        if not isinstance(entry, Mapping) or not isinstance(entry.get("in_graph"), bool | int):
            raise CorruptRun(f"{path} has no in_graph for edge {name}: expected a circuit of the MIB leaderboard")
        score = entry.get("score")
        if score is not None and not isinstance(score, int | float):
            raise CorruptRun(f"{path} has the score {score!r} for edge {name}: expected a number")
        scores[i] -= 0.0 if score is None else float(score)
        kept[i] |= bool(entry["in_graph"])
    return Circuit(graph, scores, kept, "mib", "mib", None, {"file": Path(path).name})


def _names(graph: Graph) -> dict[str, tuple[int, int]]:
    """The leaderboard's names of edges, each with the number of the edge, and how many names that edge has."""
    names: dict[str, tuple[int, int]] = {}
    queries = [name for name in graph.readers if re.fullmatch(r"a0\.h\d+\.q", name)]
    shared = [name for name in graph.readers if re.fullmatch(r"a0\.kv\d+\.k", name)]
    group = len(queries) // len(shared) if shared else 1
    if graph.has_neurons:
        raise BadInput(
            "the sources are neurons of MLPs: the leaderboard's format has edges from whole MLPs alone; expected a "
            "circuit found with neurons=False"
        )
    for i, (source, reader) in enumerate(graph.edges):
        if re.fullmatch(r"a\d+\.h\d+", reader):
            raise BadInput(
                f"{reader} is read as a whole: the leaderboard's format has a head's query, key and value apart; "
                f"expected a circuit that is not merged()"
            )
        if source == "pos_embed":
            continue
        if found := re.fullmatch(r"(a\d+)\.kv(\d+)\.([kv])", reader):
            first = int(found[2]) * group
            for head in range(first, first + group):
                names[f"{_node(source)}->{found[1]}.h{head}<{found[3]}>"] = (i, group)
            continue
        head_name, _, kind = reader.rpartition(".")
        names[f"{_node(source)}->{f'{head_name}<{kind}>' if kind in tuple('qkv') else reader}"] = (i, 1)
    return names


def _node(name: str) -> str:
    head, _, kind = name.rpartition(".")
    return "input" if name == "embed" else head if kind in tuple("qkv") else name
