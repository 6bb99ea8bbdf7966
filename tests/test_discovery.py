"""Edge scores and ablations against slow references: a naive masked model, one edge at a time, and TransformerLens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import discovery
from circuits.discovery import Circuit, Graph, eap, eap_ig_inputs, logit_difference
from circuits.discovery.ablate import ablated_logits, replacement
from circuits.discovery.activations import head_outputs
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer
from circuits.tasks.base import Pairs

SMALL: dict[str, Any] = {"d_vocab": 11, "n_ctx": 5, "n_layers": 2, "d_model": 8, "n_heads": 2, "act_fn": "gelu"}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"attn_bias": True},
    "layer-norm": {"normalization": "LN", "attn_bias": True, "unembed_bias": True},
    "rms-gated-no-positions": {"normalization": "RMS", "gated": True, "act_fn": "silu", "positional": False},
    "attention-only": {"normalization": "LN", "attn_only": True, "attn_bias": True},
    "bidirectional-half-uniform": {"causal": False, "softmax_share": 0.5, "normalization": "LN"},
    "uniform": {"softmax_share": 0.0},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def jitter(model: Any, scale: float = 0.3) -> Any:
    """Random biases and norms too, so that none of them can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def build(variant: str = "layer-norm", **changes: Any) -> Transformer:
    return jitter(Transformer(ModelConfig(**{**SMALL, **VARIANTS[variant], **changes}), seed=3))


def some_pairs(n: int = 4, pos: int = 4, d_vocab: int = 11) -> Pairs:
    g = torch.Generator().manual_seed(1)
    clean = torch.randint(0, d_vocab, (n, pos), generator=g)
    corrupt = clean.clone()
    corrupt[:, 1] = (clean[:, 1] + 1 + torch.randint(0, d_vocab - 1, (n,), generator=g)) % d_vocab
    position = torch.tensor([pos - 1, pos - 2] * n)[:n]
    correct = torch.randint(0, d_vocab, (n,), generator=g)
    return Pairs(clean, corrupt, position, correct, (correct + 3) % d_vocab, "second token")


def at_answers(logits: Tensor, pairs: Pairs) -> Tensor:
    return logit_difference(logits[torch.arange(len(pairs)), pairs.position], pairs)


class Naive:
    """The definition: every reader's input is a sum over sources, each scaled between its own output and another."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.c, self.graph = model, model.config, Graph.from_model(model)

    def norm(self, x: Tensor, ln: Any) -> Tensor:
        if self.c.normalization == "LN":
            return F.layer_norm(x, x.shape[-1:], ln.w, ln.b, 1e-5)
        return x if self.c.normalization is None else F.rms_norm(x, x.shape[-1:], ln.w, 1e-5)

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        seen = torch.ones_like(scores[0]).tril() if self.c.causal else torch.ones_like(scores[0])
        softmax = scores.masked_fill(seen == 0, -math.inf).softmax(-1)
        return self.c.softmax_share * softmax + (1 - self.c.softmax_share) * seen / seen.sum(-1, keepdim=True)

    def run(
        self, tokens: Tensor, mask: Tensor, other: list[Tensor] | None = None, embed: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits and source outputs, where ``mask`` has one number per edge."""
        m, matrix = self.model, self.graph.dense(mask)
        written = [m.W_E[tokens] if embed is None else embed]
        written += [m.W_pos[: tokens.shape[1]].expand_as(written[0])] if self.c.positional else []
        constant = torch.zeros(self.c.d_model)

        def read(reader: str) -> Tensor:
            weights = matrix[self.graph.readers.index(reader)]
            own = sum((weights[i] * w for i, w in enumerate(written)), constant)
            if other is None:
                return own
            return own + sum((1 - weights[i]) * other[i] for i in range(len(written)))

        for layer, block in enumerate(m.blocks):
            attn, heads = block.attn, []
            for h in range(self.c.n_heads):
                x = {kind: self.norm(read(f"a{layer}.h{h}.{kind.lower()}"), block.ln1) for kind in "QKV"}
                q, k, v = (
                    x[n] @ getattr(attn, f"W_{n}")[h] + (getattr(attn, f"b_{n}")[h] if self.c.attn_bias else 0)
                    for n in "QKV"
                )
                heads.append(self.pattern(q, k) @ v @ attn.W_O[h])
            written += heads
            constant = constant + attn.b_O if self.c.attn_bias else constant
            if not self.c.attn_only:
                written.append(block.mlp(self.norm(read(f"m{layer}"), block.ln2)))
        return m.unembed(self.norm(read("logits"), m.ln_final)), written

    def gradient(self, pairs: Pairs, point: float = 1.0) -> Tensor:
        """Minus the derivative of each pair's metric with respect to each edge's scale: its first-order effect."""
        ones = torch.ones(self.graph.n_edges)
        _, other = self.run(pairs.corrupt, ones)
        _, clean = self.run(pairs.clean, ones)
        start = self.model.W_E[pairs.corrupt]
        embed = start + point * (self.model.W_E[pairs.clean] - start)
        rows = []
        for i in range(len(pairs)):
            one = slice(i, i + 1)
            mask = ones.clone().requires_grad_()
            # at the interpolated point, scaling the edge moves its reader along corrupt - clean of the two ends
            _, here = self.run(pairs.clean[one], ones, embed=embed[one])
            there = [h + o[one] - c[one] for h, o, c in zip(here, other, clean, strict=True)]
            logits, _ = self.run(pairs.clean[one], mask, [t.detach() for t in there], embed=embed[one])
            value = logits[0, pairs.position[i]] @ (
                F.one_hot(pairs.correct[i], logits.shape[-1]) - F.one_hot(pairs.wrong[i], logits.shape[-1])
            ).to(logits)
            rows.append(-torch.autograd.grad(value, mask)[0])
        return torch.stack(rows)


def close(got: Tensor, expected: Tensor, relative: float) -> bool:
    return float((got - expected).abs().max()) <= relative * float(expected.abs().max())


@variants
def test_eap_is_the_gradient_of_a_naive_masked_model(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    circuit = eap(model, pairs)
    expected = Naive(model).gradient(pairs)
    assert circuit.per_example is not None and close(circuit.per_example, expected, 1e-4)
    assert close(circuit.scores, expected.mean(0), 1e-4)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("variant", ["layer-norm", "none"])
def test_eap_ig_averages_gradients_from_near_the_corrupt_to_the_clean_end(variant: str) -> None:
    model, pairs = build(variant), some_pairs(2)
    naive = Naive(model)
    expected = sum(naive.gradient(pairs, k / 3) for k in (1, 2, 3)) / 3
    got = eap_ig_inputs(model, pairs, steps=3).per_example
    assert isinstance(expected, Tensor) and got is not None and close(got, expected, 1e-4)
    assert torch.equal(eap_ig_inputs(model, pairs, steps=1).scores, eap(model, pairs).scores)


@variants
def test_any_set_of_edges_is_ablated_as_in_a_naive_masked_model(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    naive, n = Naive(model), Graph.from_model(model).n_edges
    keep = torch.rand(5, n, generator=torch.Generator().manual_seed(0)) < torch.tensor([0, 0.3, 0.6, 0.9, 2])[:, None]
    with torch.no_grad():
        _, other = naive.run(pairs.corrupt, torch.ones(n))
        _, clean = naive.run(pairs.clean, torch.ones(n))
        for ablation, put in (("corrupt", other), ("mean", [c.mean(0, keepdim=True) for c in clean])):
            got = discovery.ablated_metric(model, pairs, keep, ablation=ablation)
            expected = torch.stack([at_answers(naive.run(pairs.clean, k.float(), put)[0], pairs) for k in keep])
            assert close(got, expected, 1e-4), ablation
        assert close(got[4], at_answers(model(pairs.clean), pairs), 1e-4)
        none = discovery.ablated_metric(model, pairs, keep[:1])[0]
        assert close(none, at_answers(model(pairs.corrupt), pairs), 1e-4)


def test_sets_and_pairs_can_be_taken_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = build(), some_pairs(5)
    keep = torch.rand(7, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(2)) < 0.5
    whole = {a: discovery.ablated_metric(model, pairs, keep, ablation=a) for a in ("corrupt", "mean")}
    assert close(eap(model, pairs, batch_size=2).scores, eap(model, pairs).scores, 1e-5)
    monkeypatch.setattr("circuits.discovery.evaluate._batch_sizes", lambda *_: (2, 3))
    for ablation, expected in whole.items():
        assert close(discovery.ablated_metric(model, pairs, keep, ablation=ablation), expected, 1e-5)


@variants
def test_sources_and_constants_add_up_to_what_every_reader_reads(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    sites = sites_of(model)
    names = [*sites.source_hooks, *(layer.resid for layer in sites.layers), sites.final]
    with torch.no_grad():
        _, cache = model.run_with_cache(pairs.clean, names_filter=names)
        total = cache[sites.embed] + (cache[sites.pos_embed] if sites.pos_embed else 0)
        for layer in sites.layers:
            assert close(total, cache[layer.resid], 1e-5)
            total = total + head_outputs(layer, cache[layer.z]).sum(0) + (0 if layer.b_O is None else layer.b_O)
            total = total if layer.mlp_out is None else total + cache[layer.mlp_out]
        assert close(total, cache[sites.final], 1e-5)


@variants
def test_a_sources_score_is_the_sum_over_its_edges(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    circuit = eap_ig_inputs(model, pairs, steps=2)
    source, _ = circuit.graph.ends()
    sums = torch.zeros(len(circuit.graph.sources)).index_add(0, source, circuit.scores)
    frame = discovery.node_attribution(model, pairs, steps=2).loc[list(circuit.graph.sources)]
    assert close(torch.tensor(frame["score"].to_numpy()), sums.double(), 1e-4)
    assert ((frame["low"] <= frame["score"] + 1e-6) & (frame["score"] <= frame["high"] + 1e-6)).all()


def test_in_a_linear_network_edges_into_the_logits_add_up_to_the_total_effect() -> None:
    model, pairs = build("uniform", attn_only=True), some_pairs()
    circuit = eap(model, pairs)
    _, reader = circuit.graph.ends()
    into_logits = reader == circuit.graph.readers.index("logits")
    with torch.no_grad():
        total = at_answers(model(pairs.corrupt), pairs) - at_answers(model(pairs.clean), pairs)
    assert circuit.per_example is not None
    assert close(circuit.per_example[:, into_logits].sum(1), total, 1e-5)
    # First order is exact: for every edge by itself, and at every point of the path.
    one_off = ~torch.eye(circuit.graph.n_edges, dtype=torch.bool)
    with torch.no_grad():
        exact = discovery.ablated_metric(model, pairs, one_off) - at_answers(model(pairs.clean), pairs)
    assert close(circuit.per_example, exact.T, 1e-4)
    assert close(eap_ig_inputs(model, pairs, steps=4).scores, circuit.scores, 1e-4)


def planted() -> Transformer:
    """Two layers, of whose heads only a0.h1 and then a1.h0 pass anything to the logits.

    The first copies the token from d_model 0-3 to 4-7, the second that to 8-11, which the logits read; the others
    write at random into 12-15, which nothing reads.
    """
    model = Transformer(ModelConfig(d_vocab=4, n_ctx=3, n_layers=2, d_model=16, n_heads=2, d_head=4, attn_only=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E[:, :4] = torch.eye(4)
        for layer, head, start in ((0, 1, 0), (1, 0, 4)):
            model.blocks[layer].attn.W_V[head, start : start + 4] = torch.eye(4)
            model.blocks[layer].attn.W_O[head, :, start + 4 : start + 8] = torch.eye(4)
            other = model.blocks[layer].attn
            other.W_V[1 - head, :4] = torch.randn(4, 4, generator=generator)
            other.W_O[1 - head, :, 12:] = torch.randn(4, 4, generator=generator)
        model.unembed.W_U[8:12] = torch.eye(4)
    return model.eval()


@pytest.mark.parametrize("method", discovery.METHODS)
def test_every_method_recovers_a_planted_circuit(method: str) -> None:
    truth = {("embed", "a0.h1.v"), ("a0.h1", "a1.h0.v"), ("a1.h0", "logits")}
    model = planted()
    pairs = Pairs(
        torch.tensor([[0, 1, 2], [3, 1, 2]]),
        torch.tensor([[3, 1, 2], [1, 0, 0]]),
        torch.tensor([2, 2]),
        torch.tensor([0, 2]),
        torch.tensor([3, 0]),
        "first token",
    )
    circuit = discovery.attribute(model, pairs, method=method.replace("-", "_"))
    assert set(circuit.threshold(1e-6).edges) == truth == set(circuit.top(3).edges)
    assert set(circuit.top(12).pruned().edges) >= truth
    result = discovery.faithfulness(model, circuit, pairs)
    row = result.curve.query("ranking == 'absolute' and n_edges == 3").iloc[0]
    assert row["faithfulness"] == pytest.approx(1, abs=1e-5)
    assert row["n_connected"] == 3
    assert result.cmd == pytest.approx(2.5 / circuit.graph.n_edges, abs=1e-5)
    assert result.cmd < result.cmd_random_interval[0]


def hugging_face(architecture: str) -> Any:
    """A tiny randomly initialised model of ``transformers`` behind a bridge: no download, no tokenizer."""
    import transformers
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    shared = {"vocab_size": 11, "bos_token_id": 0, "eos_token_id": 0}
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "intermediate_size": 16, "max_position_embeddings": 8}
    config = {
        "GPT2": lambda: transformers.GPT2Config(**shared, n_positions=8, n_embd=8, n_layer=2, n_head=2),
        "GPTNeoX": lambda: transformers.GPTNeoXConfig(**shared, **sizes, num_attention_heads=2),
        "Llama": lambda: transformers.LlamaConfig(**shared, **sizes, num_attention_heads=4, num_key_value_heads=2),
    }[architecture]()
    name = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
    return build_bridge_from_module(jitter(model), architecture=name, hf_config=config)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX"])
def test_scores_and_ablations_equal_transformer_lens_own(architecture: str) -> None:
    from transformer_lens.tools.analysis import attribution_patching as ap

    model, pairs = hugging_face(architecture), some_pairs(2)
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


def one_edge_through_the_models_own_modules(model: Any, pairs: Pairs, source: Tensor, reader: str) -> Tensor:
    """The metric of the clean run in which one reader sees ``source`` more, by the bridge's own norm and weights."""
    if reader == "logits" or reader.startswith("m"):
        layer = 1 if reader == "logits" else int(reader[1:])
        place = f"blocks.{layer}.hook_resid_post" if reader == "logits" else f"blocks.{layer}.ln2.hook_in"
        hooks: list[Any] = [(place, lambda x, hook: x + source)]
    else:
        part, head, kind = reader.split(".")
        block, index, seen = model.blocks[int(part[1:])], int(head.lstrip("hkv")), {}

        def remember(x: Tensor, hook: Any) -> None:
            seen["x"] = x

        def edit(x: Tensor, hook: Any) -> Tensor:
            weight = getattr(block.attn, f"W_{kind.upper()}")[index]
            bias = getattr(block.attn, f"b_{kind.upper()}")
            y = block.ln1.original_component(seen["x"] + source) @ weight
            x = x.clone()
            x[:, :, index] = y if bias is None else y + bias[index]
            return x

        name = f"blocks.{part[1:]}"
        hooks = [(f"{name}.hook_resid_pre", remember), (f"{name}.attn.hook_{kind}", edit)]
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return at_answers(model(pairs.clean), pairs)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama"])
def test_single_edges_of_hugging_face_models_equal_a_loop_that_patches_one_at_a_time(architecture: str) -> None:
    model, pairs = hugging_face(architecture), some_pairs(3)
    sites = sites_of(model)
    graph = sites.graph
    clean = replacement(model, sites, replace(pairs, corrupt=pairs.clean), "corrupt")
    corrupt = replacement(model, sites, pairs, "corrupt")
    outputs = [corrupt[name] - clean[name] for name in sites.source_hooks]
    by_source = [w for d in outputs for w in ([d] if d.ndim == 3 else d.unbind(2))]
    heads = {f"a{i}.h{h}": layer.W_O[h] for i, layer in enumerate(sites.layers) for h in range(len(layer.W_O))}
    changes = {s: d @ heads[s] if s in heads else d for s, d in zip(graph.sources, by_source, strict=True)}
    expected = torch.stack(
        [one_edge_through_the_models_own_modules(model, pairs, changes[s], r) for s, r in graph.edges]
    )
    got = discovery.ablated_metric(model, pairs, ~torch.eye(graph.n_edges, dtype=torch.bool))
    base = at_answers(model(pairs.clean), pairs).detach()
    assert close(got - base, expected - base, 1e-4)
    assert ("kv" in str(graph.readers)) == (architecture == "Llama")


@pytest.mark.parametrize("variant", ["none", "layer-norm", "rms-gated-no-positions", "attention-only"])
def test_a_native_bridge_gives_what_our_own_model_gives(variant: str) -> None:
    changes = {"positional": True, "mlp_bias": True, "gated": False} if variant.startswith("rms") else {}
    model, pairs = build(variant, **changes), some_pairs()
    bridge = model.to_bridge()
    assert Graph.from_model(bridge) == Graph.from_model(model)
    assert close(eap(bridge, pairs).scores, eap(model, pairs).scores, 1e-4)
    keep = torch.rand(3, Graph.from_model(model).n_edges, generator=torch.Generator().manual_seed(0)) < 0.5
    ours = discovery.ablated_metric(model, pairs, keep)
    assert close(discovery.ablated_metric(bridge, pairs, keep), ours, 1e-4)


def test_gradients_of_the_mask_go_through_the_ablated_model() -> None:
    model, pairs = build(), some_pairs()
    sites = sites_of(model)
    keep = torch.ones(1, sites.graph.n_edges, requires_grad=True)
    logits = ablated_logits(model, sites, pairs.clean, replacement(model, sites, pairs, "corrupt"), keep)[0]
    (gradient,) = torch.autograd.grad(at_answers(logits, pairs).mean(), keep)
    assert close(-gradient[0], eap(model, pairs).scores, 1e-4)


def test_graph_sizes_and_order() -> None:
    assert Graph.build(2, 4, positions=False).n_edges == 110
    assert Graph.build(4, 8, positions=False).n_edges == 1519
    graph = Graph.build(1, 2, n_kv_heads=1, parallel=True)
    assert graph.sources == ("embed", "pos_embed", "a0.h0", "a0.h1", "m0")
    assert graph.readers == ("a0.h0.q", "a0.h1.q", "a0.kv0.k", "a0.kv0.v", "m0", "logits")
    assert graph.visible == (2, 2, 2, 2, 2, 5)
    assert graph.feeds == ((2,), (3,), (2, 3), (2, 3), (4,), ())
    source, reader = graph.ends()
    assert [(graph.sources[s], graph.readers[r]) for s, r in zip(source, reader, strict=True)] == list(graph.edges)
    assert [graph.index(*edge) for edge in graph.edges] == list(range(graph.n_edges))
    with pytest.raises(UnknownName, match=r"unknown source 'a0.h7': did you mean"):
        graph.index("a0.h7", "m0")
    with pytest.raises(BadInput, match="computed before"):
        graph.index("m0", "a0.h0.q")


@given(seed=st.integers(0, 10_000), share=st.floats(0.05, 0.6), parallel=st.booleans(), kv=st.sampled_from([None, 1]))
@settings(max_examples=40)
def test_connected_edges_are_those_on_a_path_from_embeddings_to_logits(
    seed: int, share: float, parallel: bool, kv: int | None
) -> None:
    graph = Graph.build(2, 2, parallel=parallel, n_kv_heads=kv)
    kept = torch.rand(3, graph.n_edges, generator=torch.Generator().manual_seed(seed)) < share
    for row, connected in zip(kept, graph.connected(kept), strict=True):
        edges = [edge for edge, k in zip(graph.edges, row.tolist(), strict=True) if k]
        whole = nx.DiGraph()
        whole.add_nodes_from(["embed", "pos_embed", *graph.readers])
        whole.add_edges_from((s, f"in {r}") for s, r in edges)
        for reader, fed in zip(graph.readers, graph.feeds, strict=True):
            whole.add_edges_from((f"in {reader}", graph.sources[s]) for s in fed)
        starts = nx.descendants(whole, "embed") | nx.descendants(whole, "pos_embed") | {"embed", "pos_embed"}
        finish = nx.ancestors(whole, "in logits") | {"in logits"} if "in logits" in whole else set()
        expected = [(s, r) for s, r in edges if s in starts and f"in {r}" in finish]
        assert [e for e, k in zip(graph.edges, connected.tolist(), strict=True) if k] == expected


def state_of(model: Transformer) -> tuple[Any, ...]:
    hooks = [(name, len(p.fwd_hooks), len(p.bwd_hooks), len(p._forward_hooks)) for name, p in model.hook_dict.items()]
    grads = [p.grad is None and p.requires_grad for p in model.parameters()]
    return hooks, grads, model.training, dict(vars(model.cfg)), {k: v.clone() for k, v in model.state_dict().items()}


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:4] == b[:4] and all(torch.equal(a[4][k], b[4][k]) for k in a[4])


def broken(logits: Tensor, pairs: Pairs) -> Tensor:
    raise RuntimeError("this metric breaks")


ANALYSES: dict[str, Callable[..., Any]] = {
    "eap": eap,
    "eap-ig-inputs": eap_ig_inputs,
    "nodes": discovery.node_attribution,
    "ablated": lambda model, pairs, **o: discovery.ablated_metric(
        model, pairs, torch.zeros(2, Graph.from_model(model).n_edges, dtype=torch.bool), **o
    ),
}


@pytest.mark.parametrize("analysis", ANALYSES)
def test_no_analysis_changes_the_model_or_the_callers_hooks_even_when_it_fails(analysis: str) -> None:
    model, pairs, seen = build(), some_pairs(), []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: seen.append(1))]):
        before = state_of(model)
        ANALYSES[analysis](model, pairs)
        assert same(before, state_of(model)) and seen
        with pytest.raises(RuntimeError, match="this metric breaks"):
            ANALYSES[analysis](model, pairs, metric=broken)
        assert same(before, state_of(model))


def test_frozen_parameters_and_inference_mode_make_no_difference() -> None:
    model, pairs = build(), some_pairs()
    expected = eap(model, pairs).scores
    with torch.inference_mode():
        assert torch.equal(eap(model, pairs).scores, expected)
    model.requires_grad_(False)
    assert torch.equal(eap(model, pairs).scores, expected)


def test_half_precision_scores_are_near_the_full_ones() -> None:
    model, pairs = build(), some_pairs()
    expected = eap(model, pairs).scores
    assert close(eap(model.to(torch.bfloat16), pairs).scores, expected, 0.15)


METRICS: Mapping[str, tuple[Callable[..., Any], str]] = {
    "constant": (lambda logits, pairs: torch.ones(len(pairs)), "does not depend on the logits"),
    "detached": (lambda logits, pairs: logits.detach()[:, 0], "does not depend on the logits"),
    "flat": (lambda logits, pairs: 0 * logits[:, 0], "zero at the clean inputs: all scores would be zero"),
    "scalar": (lambda logits, pairs: logits.mean(), "expected one number for each of 4 pairs"),
    "infinite": (lambda logits, pairs: (logits[:, 0] * 0).sqrt(), "not finite although its source is"),
}


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.untyped
def test_a_metric_that_gives_no_scores_is_refused(name: str) -> None:
    metric, message = METRICS[name]
    with pytest.raises(BadInput, match=message):
        eap(build(), some_pairs(), metric=metric)


@pytest.mark.untyped
def test_pairs_that_do_not_line_up_are_refused() -> None:
    model, pairs = build(), some_pairs()
    for changes, message in (
        ({"corrupt": pairs.corrupt[:, :3]}, "expected equal lengths"),
        ({"corrupt": pairs.clean}, "expected pairs that differ"),
        ({"position": pairs.position + 9}, "expected 0 to 3"),
        ({"wrong": pairs.wrong[:2]}, "pairs.wrong"),
        ({n: getattr(pairs, n)[:0] for n in ("clean", "corrupt", "position", "correct", "wrong")}, "no pairs"),
    ):
        with pytest.raises(BadInput, match=message):
            eap(model, replace(pairs, **changes))


def test_other_bad_arguments_are_refused() -> None:
    model, pairs = build(), some_pairs()
    with pytest.raises(UnknownName, match="did you mean 'eap'"):
        discovery.attribute(model, pairs, method="eapp")
    with pytest.raises(UnknownName, match="unknown ablation 'zero'"):
        discovery.ablated_metric(model, pairs, torch.ones(1, 53, dtype=torch.bool), ablation="zero")
    with pytest.raises(BadInput, match="a column per edge"):
        discovery.ablated_metric(model, pairs, torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(BadInput, match="steps = 0"):
        eap_ig_inputs(model, pairs, steps=0)
    with pytest.raises(BadInput, match="batch_size = 0"):
        eap(model, pairs, batch_size=0)


def test_a_weight_that_is_not_finite_is_named_by_its_source() -> None:
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.W_O[1, 0, 0] = math.nan
    with pytest.raises(BadInput, match=r"source a1\.h1 is not finite"):
        eap(model, some_pairs())


def test_what_edges_cannot_represent_is_refused_by_name() -> None:
    model, pairs = build(), some_pairs()
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_attn_out", lambda x, hook: x / x.norm(dim=-1, keepdim=True))]),
        pytest.raises(UnsupportedModel, match=r"blocks\.1\.hook_resid_pre is not the sum of the sources"),
    ):
        eap(model, pairs)
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_k", lambda x, hook: 2 * x)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn\.hook_k is not the projection"),
    ):
        eap(model, pairs)
    dropping = torch.nn.Dropout(0.5)
    model.add_module("extra", dropping)
    with pytest.raises(BadInput, match="dropout is active in extra"):
        eap(model.train(), pairs)
    assert isinstance(eap(model.eval(), pairs), Circuit)
