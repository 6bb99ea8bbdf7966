"""The graph of a model: what writes into the residual stream, what reads from it, and every edge between the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import HookedModel


def check_hooked(model: object) -> None:
    """Check that a model has TransformerLens hooks.

    Raises:
        UnsupportedModel: it has not; the message says how to get them.
    """
    if not hasattr(model, "cfg") or not hasattr(model, "hook_dict"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no TransformerLens hooks: expected a model of circuits.model, or a "
            f"TransformerBridge, which TransformerBridge.boot_transformers makes of a model of Hugging Face"
        )


@dataclass(frozen=True)
class Graph:
    """Sources, readers and the edges between them, both in the order in which a forward pass reaches them.

    A source writes into the residual stream: ``embed``, ``pos_embed``, a head ``a0.h1``, an MLP ``m0`` (or, where
    neurons are sources, each of its neurons ``m0.n17``). A reader
    reads it: a head's ``a1.h2.q``, ``.k`` or ``.v`` (``a1.kv0.k`` where query heads share keys and values), an MLP
    ``m1``, the ``logits``. The stream is a running sum, so what a reader can see is always a prefix of the sources.
    Edges are ordered by reader, then by source.
    """

    sources: tuple[str, ...]
    readers: tuple[str, ...]
    visible: tuple[int, ...]
    """Reader ``i`` reads the first ``visible[i]`` sources."""
    feeds: tuple[tuple[int, ...], ...]
    """The sources whose output is computed from reader ``i``; none for the logits."""

    @staticmethod
    def from_model(model: HookedModel, *, neurons: bool = False) -> Graph:
        """Return the graph of a model: ours, or any ``TransformerBridge`` with a pre-norm residual stream.

        Args:
            model: The model.
            neurons: Whether every neuron of an MLP is a source, and not the MLP as a whole.

        Raises:
            UnsupportedModel: the config lacks a size that the graph needs.
        """
        check_hooked(model)
        cfg = model.cfg
        neurons = neurons and not getattr(cfg, "attn_only", False)
        for name in ("n_layers", "n_heads", "d_mlp") if neurons else ("n_layers", "n_heads"):
            if not isinstance(getattr(cfg, name, None), int):
                raise UnsupportedModel(
                    f"{type(model).__name__}.cfg has no whole number {name}: expected a decoder's config"
                )
        return Graph.build(
            cfg.n_layers,
            cfg.n_heads,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None),
            positions=has_position_embedding(model),
            attn_only=bool(getattr(cfg, "attn_only", False)),
            parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
            neurons=cfg.d_mlp if neurons else 0,
        )

    @staticmethod
    def build(
        n_layers: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        positions: bool = True,
        attn_only: bool = False,
        parallel: bool = False,
        neurons: int = 0,
    ) -> Graph:
        """Return the graph of a transformer of the given shape.

        Args:
            n_layers: Number of blocks.
            n_heads: Query heads per block.
            n_kv_heads: Key and value heads per block where fewer than query heads (grouped-query attention).
            positions: Whether a position embedding is added to the stream.
            attn_only: Whether blocks have no MLP.
            parallel: Whether an MLP reads what its own block's attention reads, not what that writes.
            neurons: Neurons per MLP, each of them a source; 0 for MLPs as a whole.
        """
        n_kv = n_heads if n_kv_heads is None else n_kv_heads
        kv_name, group = ("h", 1) if n_kv == n_heads else ("kv", n_heads // n_kv)
        sources = ["embed", "pos_embed"] if positions else ["embed"]
        readers: list[str] = []
        visible: list[int] = []
        feeds: list[tuple[int, ...]] = []
        for layer in range(n_layers):
            first = before = len(sources)
            readers += [f"a{layer}.h{h}.q" for h in range(n_heads)]
            feeds += [(first + h,) for h in range(n_heads)]
            for kind in "kv":
                readers += [f"a{layer}.{kv_name}{h}.{kind}" for h in range(n_kv)]
                feeds += [tuple(range(first + h * group, first + (h + 1) * group)) for h in range(n_kv)]
            sources += [f"a{layer}.h{h}" for h in range(n_heads)]
            visible += [before] * (n_heads + 2 * n_kv)
            if not attn_only:
                readers.append(f"m{layer}")
                visible.append(before if parallel else len(sources))
                names = [f"m{layer}.n{j}" for j in range(neurons)] if neurons else [f"m{layer}"]
                feeds.append(tuple(range(len(sources), len(sources) + len(names))))
                sources += names
        return Graph(tuple(sources), (*readers, "logits"), (*visible, len(sources)), (*feeds, ()))

    def merged(self) -> Graph:
        """Return the graph between whole components: a head's q, k and v as one reader, an MLP's neurons as one source.

        An edge of it stands for all edges from its source into its component. Keys and values that query heads share
        are part of each of those heads.
        """
        sources = tuple(dict.fromkeys(component(source) for source in self.sources))
        seen = {sources.index(component(self.sources[u])): self.visible[r] for r, f in enumerate(self.feeds) for u in f}
        visible = tuple(len({component(source) for source in self.sources[: seen[u]]}) for u in sorted(seen))
        readers = tuple(sources[u] for u in sorted(seen))
        feeds = tuple((u,) for u in sorted(seen))
        return Graph(sources, (*readers, "logits"), (*visible, len(sources)), (*feeds, ()))

    def merging(self) -> tuple[Graph, Int[Tensor, " part"], Int[Tensor, " part"]]:
        """Return the merged graph, and edges of this one each with the number of the merged edge that it is part of.

        An edge into a key or value that query heads share is part of an edge into each of these heads.
        """
        merged = self.merged()
        targets = dict(zip(self.readers, self.feeds, strict=True))
        pairs = [
            (i, merged.index(component(source), target))
            for i, (source, reader) in enumerate(self.edges)
            for target in dict.fromkeys(component(self.sources[u]) for u in targets[reader]) or [reader]
        ]
        part, whole = torch.tensor(pairs).T
        return merged, part, whole

    @property
    def has_neurons(self) -> bool:
        """Whether the neurons of MLPs are sources."""
        return any(component(source) != source for source in self.sources)

    def is_parallel(self, layer: int) -> bool:
        """Whether the MLP of a layer reads what its own block's attention reads, not what that writes."""
        mlp, query = (self.readers.index(name) for name in (f"m{layer}", f"a{layer}.h0.q"))
        return self.visible[mlp] == self.visible[query]

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return sum(self.visible)

    def counted(self, *, positions: bool) -> Bool[Tensor, " edge"]:
        """Return which edges count: all of them, or, without ``positions``, all but those from a position embedding."""
        return torch.tensor([positions or source != "pos_embed" for source, _ in self.edges])

    @cached_property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """Every edge as (source, reader), in order."""
        return tuple((s, r) for r, n in zip(self.readers, self.visible, strict=True) for s in self.sources[:n])

    @cached_property
    def _position(self) -> dict[tuple[str, str], int]:
        return {edge: i for i, edge in enumerate(self.edges)}

    def index(self, source: str, reader: str) -> int:
        """Return the number of an edge.

        Raises:
            UnknownName: no such source or reader.
            BadInput: both exist, but the reader comes before the source.
        """
        if (source, reader) in self._position:
            return self._position[source, reader]
        for kind, name, known in (("source", source, self.sources), ("reader", reader, self.readers)):
            if name not in known:
                raise UnknownName(kind, name, known)
        raise BadInput(f"no edge {source} -> {reader}: {reader} is computed before {source} writes")

    def mask(self, edges: Iterable[tuple[str, str]]) -> Bool[Tensor, " edge"]:
        """Return which edges are among ``edges``, given as (source, reader).

        Raises:
            BadInput: one of them is not an edge of this graph.
        """
        kept = torch.zeros(self.n_edges, dtype=torch.bool)
        for source, reader in edges:
            kept[self.index(source, reader)] = True
        return kept

    def ends(self, device: torch.device | str = "cpu") -> tuple[Int[Tensor, " edge"], Int[Tensor, " edge"]]:
        """Return the number of each edge's source and of its reader."""
        counts = torch.tensor(self.visible, device=device)
        readers = torch.repeat_interleave(torch.arange(len(counts), device=device), counts)
        starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return torch.arange(self.n_edges, device=device) - starts, readers

    def dense(self, values: Shaped[Tensor, "*batch edge"]) -> Shaped[Tensor, "*batch reader source"]:
        """Return one number per edge as a matrix of readers by sources, zero where there is no edge."""
        source, reader = self.ends(values.device)
        matrix = values.new_zeros(*values.shape[:-1], len(self.readers), len(self.sources))
        matrix[..., reader, source] = values
        return matrix

    def connected(self, kept: Bool[Tensor, "*batch edge"]) -> Bool[Tensor, "*batch edge"]:
        """Return which of the kept edges lie on a path of kept edges from an embedding to the logits.

        A head passes a signal on from any of its three readers.

        Source: Hanna et al. 2024, arXiv 2403.17806 (pruning of nodes without parents or children).
        """
        matrix = self.dense(kept)
        source, reader = self.ends(kept.device)
        computed = {s for fed in self.feeds for s in fed}
        reached = matrix.new_zeros(*matrix.shape[:-2], len(self.sources))
        reached[..., [s for s in range(len(self.sources)) if s not in computed]] = True
        for r, fed in enumerate(self.feeds):
            for s in fed:
                reached[..., s] |= (matrix[..., r, :] & reached).any(-1)
        useful = torch.zeros_like(reached)
        reads_usefully = matrix.new_zeros(*matrix.shape[:-2], len(self.readers))
        for r in reversed(range(len(self.readers))):
            fed = self.feeds[r]
            reads_usefully[..., r] = useful[..., list(fed)].any(-1) if fed else True
            useful |= matrix[..., r, :] & reads_usefully[..., r, None]
        return kept & reached[..., source] & reads_usefully[..., reader]


def component(source: str) -> str:
    """Return the component that a source belongs to: ``m0`` of its neuron ``m0.n17``, any other its own."""
    return source.split(".")[0] if source.startswith("m") else source


def has_position_embedding(model: HookedModel) -> bool:
    """Return whether a position embedding is added to the residual stream of a model."""
    return getattr(model.cfg, "positional_embedding_type", None) == "standard"
