"""Gradient rules against a naive model whose autograd functions have them, and the effects of attention patterns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_native_bridge
from discovery_models import Naive, at_answers, build, close, hugging_face, some_pairs, variants
from torch import Tensor

from circuits import discovery
from circuits.discovery import GIM, RELP, GradientRules, eap, eap_ig_inputs
from circuits.discovery.activations import gradients
from circuits.discovery.sites import sites_of
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer

ONE_BY_ONE = [
    GradientRules(freeze_norm=True),
    GradientRules(freeze_pattern=True),
    GradientRules(softmax_temperature=3.0),
    GradientRules(query=0.3, key=2.0, value=0.7),
    GradientRules(gate=0.5),
    GradientRules(linear_activation=True),
]
ALL = [GIM, RELP, *ONE_BY_ONE]


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.factor, None


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        ctx.soft = (x / temperature).softmax(-1)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.soft * (grads[0] - (grads[0] * ctx.soft).sum(-1, keepdim=True)), None


class Ruled(Naive):
    """The naive model, whose every step has the rules in its own backward."""

    def __init__(self, model: Transformer, rules: GradientRules) -> None:
        super().__init__(model)
        self.rules = rules

    def norm(self, x: Tensor, ln: Any) -> Tensor:
        if not self.rules.freeze_norm or self.c.normalization is None:
            return super().norm(x, ln)
        x = x - x.mean(-1, keepdim=True) if self.c.normalization == "LN" else x
        y = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt().detach() * ln.w
        return y if ln.b is None else y + ln.b

    def pattern(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = Scaled.apply(q, self.rules.query), Scaled.apply(k, self.rules.key)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        seen = torch.ones_like(scores[0]).tril() if self.c.causal else torch.ones_like(scores[0])
        softmax = Softmax.apply(scores.masked_fill(seen == 0, -torch.inf), self.rules.softmax_temperature)
        softmax = softmax.detach() if self.rules.freeze_pattern else softmax
        return self.c.softmax_share * softmax + (1 - self.c.softmax_share) * seen / seen.sum(-1, keepdim=True)

    def value(self, v: Tensor) -> Tensor:
        return Scaled.apply(v, self.rules.value)

    def mlp(self, mlp: Any, x: Tensor) -> Tensor:
        act = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[self.c.act_fn]
        bias = 0 if mlp.b_in is None else mlp.b_in
        pre = x @ (mlp.W_gate if self.c.gated else mlp.W_in) + (0 if self.c.gated else bias)
        post = pre * (act(pre) / pre).detach() if self.rules.linear_activation else act(pre)
        if self.c.gated:
            post = Scaled.apply(post * (x @ mlp.W_in), self.rules.gate) + bias
        return post @ mlp.W_out + (0 if mlp.b_out is None else mlp.b_out)


@variants
@pytest.mark.parametrize("rules", ALL, ids=lambda rules: str(rules.describe()))
def test_scores_are_those_of_a_naive_model_with_the_rules_in_its_backward(variant: str, rules: GradientRules) -> None:
    model, pairs = build(variant), some_pairs(2)
    naive = Ruled(model, rules)
    got = eap(model, pairs, rules=rules).per_example
    expected = naive.gradient(pairs)
    assert got is not None and close(got, expected, 1e-4)


@pytest.mark.parametrize("name", ["gim", "relp"])
def test_rules_go_with_every_path(name: str) -> None:
    model, pairs = build("rms-gated-no-positions"), some_pairs(2)
    naive = Ruled(model, discovery.RULES[name])
    first, last = naive.gradient(pairs, 0.5), naive.gradient(pairs, 1.0)
    got = eap_ig_inputs(model, pairs, steps=2, rules=name).per_example
    assert got is not None and close(got, (first + last) / 2, 1e-4)
    ends = discovery.clean_corrupted(model, pairs, rules=name).per_example
    assert ends is not None and close(ends, (naive.gradient(pairs, 0.0) + last) / 2, 1e-4)
    one = discovery.eap_ig_activations(model, pairs, steps=1, rules=name)
    assert close(one.scores, eap(model, pairs, rules=name).scores, 1e-5)
    assert not close(one.scores, eap(model, pairs).scores, 1e-2)
    source, _ = one.graph.ends()
    nodes = discovery.node_attribution(model, pairs, steps=1, rules=name).source_frame().loc[list(one.graph.sources)]
    sums = torch.zeros(len(one.graph.sources)).index_add(0, source, one.scores)
    assert close(torch.tensor(nodes["score"].to_numpy()), sums.double(), 1e-4)
    assert not close(discovery.hisp(model, pairs, rules=name).scores, discovery.hisp(model, pairs).scores, 1e-2)


@needs_native_bridge
@pytest.mark.parametrize("variant", ["layer-norm", "none", "attention-only"])
@pytest.mark.parametrize("rules", ALL, ids=lambda rules: str(rules.describe()))
def test_a_native_bridge_gives_what_our_own_model_gives(variant: str, rules: GradientRules) -> None:
    model, pairs = build(variant), some_pairs(2)
    assert close(eap(model.to_bridge(), pairs, rules=rules).scores, eap(model, pairs, rules=rules).scores, 1e-4)


def gpt2_of_ours(bridge: Any) -> Transformer:
    """Our own model with the weights of a GPT-2 of ``transformers``."""
    config = ModelConfig(
        **{"d_vocab": 11, "n_ctx": 8, "n_layers": 2, "d_model": 8, "n_heads": 2, "act_fn": "gelu_new"},
        normalization="LN",
        attn_bias=True,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        hf = bridge.original_model.transformer
        model.embed.W_E.copy_(hf.wte.weight)
        model.pos_embed.W_pos.copy_(hf.wpe.weight)
        model.unembed.W_U.copy_(bridge.original_model.lm_head.weight.T)
        for ours, theirs in zip(model.blocks, bridge.blocks, strict=True):
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_O"):
                getattr(ours.attn, name).copy_(getattr(theirs.attn, name))
            for name in ("b_Q", "b_K", "b_V"):
                getattr(ours.attn, name).copy_(getattr(theirs.attn, name).reshape(2, 4))
            for name in ("W_in", "W_out", "b_in", "b_out"):
                getattr(ours.mlp, name).copy_(getattr(theirs.mlp, name))
            for name in ("ln1", "ln2"):
                getattr(ours, name).w.copy_(getattr(theirs, name).weight)
                getattr(ours, name).b.copy_(getattr(theirs, name).bias)
        model.ln_final.w.copy_(bridge.ln_final.weight)
        model.ln_final.b.copy_(bridge.ln_final.bias)
    return model


@pytest.mark.parametrize("rules", ALL, ids=lambda rules: str(rules.describe()))
def test_a_hugging_face_gpt2_gives_what_our_own_model_with_its_weights_gives(rules: GradientRules) -> None:
    bridge, pairs = hugging_face("GPT2"), some_pairs(2)
    model = gpt2_of_ours(bridge)
    with torch.no_grad():
        assert close(model(pairs.clean), bridge(pairs.clean), 1e-5)
    assert close(eap(bridge, pairs, rules=rules).scores, eap(model, pairs, rules=rules).scores, 1e-4)


@pytest.mark.parametrize("model", ["Llama", "ours"])
def test_relevance_is_conserved_where_there_are_no_biases(model: str) -> None:
    pairs = some_pairs(3)
    one = hugging_face("Llama") if model == "Llama" else build("rms-gated-no-positions", mlp_bias=False)
    sites = sites_of(one)
    at = [sites.embed]
    values, grads, _ = gradients(one, sites, pairs.clean, pairs, discovery.logit_difference, at=at, rules=RELP)
    relevance = (values[sites.embed] * grads[sites.embed]).sum((1, 2))
    with torch.no_grad():
        assert close(relevance, at_answers(one(pairs.clean), pairs), 1e-4)


@pytest.mark.parametrize("architecture", ["GPTNeoX", "Llama"])
@pytest.mark.parametrize("rules", ALL, ids=lambda rules: str(rules.describe()))
def test_rules_change_scores_and_nothing_else_of_a_bridge(architecture: str, rules: GradientRules) -> None:
    bridge, pairs = hugging_face(architecture), some_pairs(2)
    sites = sites_of(bridge)
    before = {name: p.clone() for name, p in bridge.named_parameters()}
    plain = gradients(bridge, sites, pairs.clean, pairs, discovery.logit_difference, at=sites.reader_hooks)
    ruled = gradients(bridge, sites, pairs.clean, pairs, discovery.logit_difference, at=sites.reader_hooks, rules=rules)
    assert all(torch.equal(value, ruled[0][name]) for name, value in plain[0].items())
    changed = not (rules == GradientRules(gate=0.5) and architecture == "GPTNeoX")
    assert changed != all(close(grad, ruled[1][name], 1e-3) for name, grad in plain[1].items())
    frozen = [name for layer in sites.layers for name in layer.qkv[:2]]
    if rules.freeze_pattern:
        assert not any(bool((ruled[1][name] != 0).any()) for name in frozen)
    else:
        assert all(bool((grad != 0).any()) for grad in ruled[1].values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in bridge.named_parameters())


def test_in_a_linear_network_relevance_is_the_exact_effect() -> None:
    model, pairs = build("uniform", attn_only=True), some_pairs()
    single = ~torch.eye(discovery.Graph.from_model(model).n_edges, dtype=torch.bool)
    with torch.no_grad():
        exact = discovery.ablated_metric(model, pairs, single) - at_answers(model(pairs.clean), pairs)
    for rules in (None, "relp"):
        for method in ("eap", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted"):
            got = discovery.attribute(model, pairs, method=method, rules=rules).per_example
            assert got is not None and close(got, exact.T, 1e-4), (method, rules)
    for method in ("mask-gradient", "exact"):
        got = discovery.attribute(model, pairs, method=method).per_example
        assert got is not None and close(got, exact.T, 1e-4), method
    total = discovery.mask_ig(model, pairs, steps=40).per_example
    with torch.no_grad():
        whole = at_answers(model(pairs.corrupt), pairs) - at_answers(model(pairs.clean), pairs)
    assert total is not None and close(total.sum(1), whole, 1e-3)


def test_rules_are_named_in_the_details_and_kept_on_disk(tmp_path: Any) -> None:
    model, pairs = build(), some_pairs()
    own = replace(GIM, freeze_norm=False, gate=1.0)
    for rules, expected in (("gim", "gim"), (RELP, "relp"), (own, None), (GradientRules(), None), (None, None)):
        circuit = eap(model, pairs, rules=rules)
        again = discovery.Circuit.load(circuit.save(tmp_path / str(id(rules))))
        assert again.details == circuit.details
        if rules is own:
            expected = {"softmax_temperature": 2.0, "query": 0.25, "key": 0.25, "value": 0.5}
        assert circuit.details.get("rules") == expected
    assert torch.equal(eap(model, pairs, rules=GradientRules()).scores, eap(model, pairs).scores)


@pytest.mark.untyped
def test_rules_that_cannot_be_are_refused() -> None:
    model, pairs = build(), some_pairs()
    with pytest.raises(UnknownName, match="did you mean 'relp'"):
        eap(model, pairs, rules="rellp")
    with pytest.raises(BadInput, match="rules = 3"):
        eap(model, pairs, rules=3)  # type: ignore[arg-type]
    for changes, message in (
        ({"softmax_temperature": 0.0}, "softmax_temperature = 0.0"),
        ({"value": float("nan")}, "value = nan"),
        ({"query": True}, "query = True"),
        ({"freeze_pattern": True, "key": 0.5}, "freeze_pattern lets no gradient through"),
    ):
        with pytest.raises(BadInput, match=message):
            GradientRules(**changes)  # type: ignore[arg-type]


def test_a_model_that_a_rule_does_not_fit_is_refused_by_name() -> None:
    model, pairs = build(), some_pairs()
    with (
        model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", lambda x, hook: x + 1)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.1\.mlp\.hook_post is not the activation function"),
    ):
        eap(model, pairs, rules="relp")
    with (
        model.hooks(fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: x / 2)]),
        pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn\.hook_pattern is not a softmax"),
    ):
        eap(model, pairs, rules="gim")
    with (
        model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda x, hook: x.detach())]),
        pytest.raises(UnsupportedModel, match=r"the gradient does not go through blocks\.1\.attn\.hook_"),
    ):
        eap(model, pairs, rules="gim")
    model.add_module("extra", torch.nn.LayerNorm(8))
    with pytest.raises(UnsupportedModel, match="extra is a LayerNorm beside the norms"):
        eap(model, pairs, rules="gim")
    assert torch.isfinite(eap(model, pairs, rules=replace(GIM, freeze_norm=False)).scores).all()


def test_an_activation_at_exactly_zero_passes_nothing() -> None:
    model, pairs = build("none", act_fn="gelu"), some_pairs()
    with torch.no_grad():
        model.blocks[0].mlp.W_in.zero_()  # type: ignore[union-attr]
        model.blocks[0].mlp.b_in.zero_()  # type: ignore[union-attr]
    circuit = eap(model, pairs, rules="relp")
    _, reader = circuit.graph.ends()
    into = circuit.scores[reader == circuit.graph.readers.index("m0")]
    assert bool((into == 0).all()) and bool(torch.isfinite(circuit.scores).all())


@variants
def test_patterns_are_scored_by_difference_times_gradient(variant: str) -> None:
    model, pairs = build(variant), some_pairs()
    got = discovery.attention_patterns(model, pairs)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
    with torch.no_grad():
        _, there = model.run_with_cache(pairs.corrupt, names_filter=names)
    kept: dict[str, Tensor] = {}

    def keep(tensor: Tensor, *, hook: Any) -> Tensor:
        kept[hook.name] = tensor.detach().requires_grad_()
        return kept[hook.name]

    # each layer by itself: with every pattern a leaf the gradient would leave out the way through later patterns
    expected = []
    for name in names:
        with model.hooks(fwd_hooks=[(name, keep)]):
            total = at_answers(model(pairs.clean), pairs).sum()
        (gradient,) = torch.autograd.grad(total, kept[name])
        expected.append((there[name] - kept[name].detach()) * gradient)
    assert close(got.per_example, torch.stack(expected, 1), 1e-4)
    assert close(got.scores, got.per_example.mean(0), 1e-6)
    assert bool((got.scores.triu(1) == 0).all()) == model.config.causal or variant == "uniform"


def test_patterns_that_only_feed_a_linear_end_have_exact_effects() -> None:
    model, pairs = build("none", attn_only=True), some_pairs(2)
    got = discovery.attention_patterns(model, pairs)
    name = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        clean = at_answers(model(pairs.clean), pairs)
        _, there = model.run_with_cache(pairs.corrupt, names_filter=name)
        for head, query, key in ((0, 3, 1), (1, 2, 2), (1, 3, 0)):

            def one(pattern: Tensor, *, hook: Any, at: tuple[int, int, int] = (head, query, key)) -> Tensor:
                pattern = pattern.clone()
                pattern[:, at[0], at[1], at[2]] = there[name][:, at[0], at[1], at[2]]
                return pattern

            with model.hooks(fwd_hooks=[(name, one)]):
                effect = at_answers(model(pairs.clean), pairs) - clean
            assert close(got.per_example[:, 1, head, query, key], effect, 1e-4)


@pytest.mark.parametrize("architecture", ["GPT2", "GPTNeoX", "Llama"])
def test_patterns_of_bridges_are_scored_too(architecture: str) -> None:
    bridge, pairs = hugging_face(architecture), some_pairs(2)
    got = discovery.attention_patterns(bridge, pairs, steps=2)
    assert got.per_example.shape == (2, 2, bridge.cfg.n_heads, 4, 4)
    assert bool((got.scores[0].abs() > 0).any()) and bool((got.scores[1].abs() > 0).any())
    if architecture == "GPT2":
        assert close(got.scores, discovery.attention_patterns(gpt2_of_ours(bridge), pairs, steps=2).scores, 1e-4)


@pytest.mark.parametrize("rules", [None, "gim", "relp"])
def test_patterns_go_in_batches_and_with_rules(rules: str | None) -> None:
    model, pairs = build("rms-gated-no-positions"), some_pairs(5)
    whole = discovery.attention_patterns(model, pairs, rules=rules, steps=3)
    assert close(
        discovery.attention_patterns(model, pairs, rules=rules, steps=3, batch_size=2).scores, whole.scores, 1e-5
    )
    plain = discovery.attention_patterns(model, pairs, steps=3)
    assert (rules is not None) != close(whole.scores, plain.scores, 1e-2)


def test_patterns_are_shown_as_table_and_figure() -> None:
    result = discovery.attention_patterns(build(), some_pairs())
    frame = result.to_frame()
    assert list(frame.columns) == ["layer", "head", "query", "key", "score", "low", "high"]
    assert frame["score"].abs().is_monotonic_decreasing and len(frame) < result.scores.numel()
    first = frame.iloc[0]
    index = tuple(int(first[name]) for name in ("layer", "head", "query", "key"))
    assert float(result.scores[index]) == pytest.approx(first["score"])
    assert bool(((frame["low"] <= frame["score"] + 1e-6) & (frame["score"] <= frame["high"] + 1e-6)).all())
    figure = result.figure(heads=3)
    assert len(figure.data) == 3 and figure.layout.xaxis.title.text == "key position"
    assert figure.layout.yaxis.title.text == "query position" and "4 pairs" in figure.layout.title.text
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    size = result.scores.abs().sum((-1, -2))
    layer, head = divmod(int(size.argmax()), 2)
    assert figure.layout.annotations[0].text.startswith(f"a{layer}.h{head},")
    assert torch.equal(torch.tensor(figure.data[0].z), result.scores[layer, head])
    with pytest.raises(BadInput, match="heads = 0"):
        result.figure(heads=0)
    assert "<table" in result._repr_html_()
