"""The hooked transformer: its maths against a slow independent one, its hooks, TransformerLens on it, its files."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import needs_edge_attribution, needs_native_bridge, reference_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from circuits import _io
from circuits import model as cm
from circuits.errors import BadInput, CorruptRun, IncompatibleRun, StorageError, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer

SMALL: dict[str, Any] = {"d_vocab": 7, "n_ctx": 4, "n_layers": 2, "d_model": 8, "n_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer-norm": {"normalization": "LN", "attn_bias": True, "unembed_bias": True, "act_fn": "gelu"},
    "gated-rms-tied": {"normalization": "RMS", "gated": True, "act_fn": "silu", "mlp_bias": False, "tied": True},
    "gated-with-biases": {"gated": True, "act_fn": "gelu_new"},
    "attention-only": {"attn_only": True, "positional": False, "d_head": 3, "d_vocab_out": 5},
    "bidirectional": {"causal": False, "normalization": "LN", "d_mlp": 5},
    "half-uniform": {"softmax_share": 0.5},
    "ones": {"softmax_share": 0.0, "uniform_weight": 1.0, "causal": False},
    "mixed-bidirectional": {"softmax_share": 0.25, "causal": False},
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def build(variant: str = "plain", **changes: Any) -> Transformer:
    """A model with random biases and norms too, so that none of them can be forgotten unnoticed."""
    model = Transformer(ModelConfig(**{**SMALL, **VARIANTS[variant], **changes}), seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def some_tokens(pos: int = 4, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(0, SMALL["d_vocab"], (batch, pos), generator=torch.Generator().manual_seed(seed))


def slow_norm(x: Tensor, norm: Any, kind: str | None) -> Tensor:
    if kind is None:
        return x
    rows = [row - row.mean() if kind == "LN" else row for row in x]
    rows = [norm.w * row / math.sqrt(float((row * row).mean()) + 1e-5) for row in rows]
    return torch.stack([row + norm.b if kind == "LN" else row for row in rows])


def slow_attention(x: Tensor, attn: Any, c: ModelConfig) -> Tensor:
    out = torch.zeros_like(x)
    for head in range(c.n_heads):
        q, k, v = (
            x @ getattr(attn, f"W_{m}")[head] + (getattr(attn, f"b_{m}")[head] if c.attn_bias else 0) for m in "QKV"
        )
        for i in range(len(x)):
            seen = range(i + 1 if c.causal else len(x))
            exps = [math.exp(float(q[i] @ k[j]) / math.sqrt(c.d_head or 0)) for j in seen]
            even = 1 / len(seen) if c.uniform_weight is None else c.uniform_weight
            for j in seen:
                weight = c.softmax_share * exps[j] / sum(exps) + (1 - c.softmax_share) * even
                out[i] += weight * v[j] @ attn.W_O[head]
    return out + attn.b_O if c.attn_bias else out


def slow_logits(model: Transformer, tokens: Tensor) -> Tensor:
    """The model's definition, one sequence, head and query at a time."""
    c = model.config
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_new": lambda x: F.gelu(x, approximate="tanh")}[
        c.act_fn
    ]
    logits = []
    for sequence in tokens:
        x = model.W_E[sequence]
        x = x + model.W_pos[: len(sequence)] if c.positional else x
        for block in model.blocks:
            x = x + slow_attention(slow_norm(x, block.ln1, c.normalization), block.attn, c)
            if not c.attn_only:
                mlp, y = block.mlp, slow_norm(x, block.ln2, c.normalization)
                b_in, b_out = (mlp.b_in, mlp.b_out) if c.mlp_bias else (0, 0)
                post = act(y @ mlp.W_gate) * (y @ mlp.W_in) + b_in if c.gated else act(y @ mlp.W_in + b_in)
                x = x + post @ mlp.W_out + b_out
        logits.append(slow_norm(x, model.ln_final, c.normalization) @ model.W_U + model.b_U)
    return torch.stack(logits)


# --- maths ---------------------------------------------------------------------------------------------------------


@variants
@torch.no_grad()
def test_logits_are_those_of_the_slow_definition(variant: str) -> None:
    model, tokens = build(variant).double(), some_tokens()
    torch.testing.assert_close(model(tokens), slow_logits(model, tokens))
    torch.testing.assert_close(model(tokens[:, :2]), slow_logits(model, tokens[:, :2]))


@variants
@torch.no_grad()
def test_computing_every_hook_point_changes_no_number(variant: str) -> None:
    model, tokens = build(variant).double(), some_tokens()
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    torch.testing.assert_close(logits, model(tokens))
    assert set(cache.cache_dict) == set(model.hook_dict)


@variants
@torch.no_grad()
def test_the_last_positions_alone_have_the_same_logits(variant: str) -> None:
    model, tokens = build(variant).double(), some_tokens()
    for last in (1, 2, tokens.shape[1]):
        torch.testing.assert_close(model(tokens, last=last), model(tokens)[:, -last:])
    with pytest.raises(BadInput, match="last = 0"):
        model(tokens, last=0)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if VARIANTS[v].get("causal", True)])
@torch.no_grad()
def test_a_causal_model_does_not_see_what_follows(variant: str) -> None:
    model, tokens = build(variant).double(), some_tokens()
    torch.testing.assert_close(model(tokens)[:, :2], model(tokens[:, :2]))


@variants
def test_the_gradient_reaches_every_weight_that_is_in_use(variant: str) -> None:
    model, tokens = build(variant), some_tokens()
    model(tokens).square().sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())}
    unused = {name for name in model.state_dict() if name[-2:] in ("_Q", "_K")}
    expected = unused if model.config.softmax_share == 0 else set()
    # The same bias on every key's score leaves the softmax as it is.
    assert {n for n in without if not n.endswith("b_K")} == expected


def test_an_optimizer_leaves_unused_queries_and_keys_alone() -> None:
    model = build("ones")
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(some_tokens()).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.W_Q[0], before["blocks.0.attn.W_Q"])
    assert not torch.equal(model.W_V[0], before["blocks.0.attn.W_V"])


@torch.no_grad()
def test_patterns_mix_softmax_and_uniform() -> None:
    tokens = some_tokens()
    ones = build("ones").run_with_cache(tokens, names_filter="blocks.0.attn.hook_pattern")[1]
    assert torch.equal(ones["blocks.0.attn.hook_pattern"], torch.ones(3, 2, 4, 4))
    mixed, pure = build("half-uniform"), build()
    names = ["blocks.0.attn.hook_pattern"]
    got, softmax = (m.run_with_cache(tokens, names_filter=names)[1][names[0]] for m in (mixed, pure))
    uniform = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(got, 0.5 * softmax + 0.5 * uniform.expand_as(softmax))
    assert not bool(got.triu(1).any())


# --- construction and input ----------------------------------------------------------------------------------------


def test_weights_follow_from_the_seed_and_touch_no_global_state() -> None:
    config = ModelConfig(d_vocab=50, n_ctx=3, d_model=64, attn_bias=True, normalization="LN")
    state = torch.get_rng_state()
    first, second, other = Transformer(config, seed=1), Transformer(config, seed=1), Transformer(config, seed=2)
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        if ".W_" in name:
            assert not torch.equal(a, c)
            assert float(a.detach().std()) == pytest.approx(0.8 / 8, rel=0.1)
        else:
            assert torch.equal(a.detach(), torch.full_like(a, 1.0 if name.endswith(".w") else 0.0))
    wide = Transformer(ModelConfig(d_vocab=50, n_ctx=3, init_std=2.0))
    assert float(wide.W_E.detach().std()) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    "fields",
    [
        {"d_model": 6, "n_heads": 4},
        {"n_layers": 0},
        {"d_vocab": -1},
        {"d_mlp": 0},
        {"act_fn": "tanh"},
        {"normalization": "BN"},
        {"softmax_share": 1.5},
        {"softmax_share": math.nan},
        {"uniform_weight": math.inf},
        {"init_std": -1.0},
        {"tied": True, "d_vocab_out": 3},
        {"n_layers": 1025},
        {"d_model": 10**30},
        {"d_head": 2**40},
        {"d_mlp": 2**32},
        {"d_vocab": 2**31},
        {"n_ctx": 2**17},
        {"n_layers": 1000, "d_model": 10_000, "n_heads": 1},
    ],
)
def test_an_impossible_config_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as error:
        ModelConfig(**{**SMALL, **fields})
    assert any(str(value) in str(error.value) for value in fields.values())


@variants
def test_what_a_model_holds_is_counted_before_it_is_made(variant: str) -> None:
    model = build(variant)
    weights = sum(weight.numel() for name, weight in model.named_parameters() if ".W_" in name)
    masks = sum(block.attn.mask.numel() for block in model.blocks if block.attn.mask is not None)
    assert model.config._count() == weights + masks


def test_config_sizes_resolve_and_survive_json() -> None:
    config = ModelConfig(d_vocab=7, n_ctx=4, d_model=8, n_heads=2)
    assert (config.d_head, config.d_mlp, config.d_vocab_out) == (4, 32, 7)
    assert _io.from_json(ModelConfig, json.loads(_io.canonical_json(config))) == config


@pytest.mark.parametrize("bad", [-1, 7, 10**9])
def test_an_unknown_token_is_named(bad: int) -> None:
    tokens = some_tokens()
    tokens[1, 2] = bad
    with pytest.raises(BadInput, match=f"token id {bad}: .* 6"):
        build()(tokens)


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(BadInput, match="5 positions: expected 1 to n_ctx = 4"):
        build()(some_tokens(pos=5))
    with pytest.raises(BadInput, match="0 positions"):
        build()(some_tokens(pos=0))


@pytest.mark.untyped
@pytest.mark.parametrize("tokens", [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), [[1, 2]]])
def test_what_is_no_matrix_of_tokens_is_refused(tokens: Any) -> None:
    with pytest.raises(BadInput, match="expected an int64 tensor"):
        build()(tokens)


def test_stacked_weights_are_the_layers_and_absent_biases_zeros() -> None:
    model = build(d_mlp=5, d_head=3)
    assert model.W_Q.shape == (2, 2, 8, 3)
    assert model.W_O.shape == (2, 2, 3, 8)
    assert torch.equal(model.W_in[1], model.blocks[1].mlp.W_in)
    assert torch.equal(model.b_in[1], model.blocks[1].mlp.b_in)
    assert torch.equal(model.b_Q, torch.zeros(2, 2, 3))
    assert torch.equal(model.b_O, torch.zeros(2, 8))
    assert torch.equal(model.b_U, torch.zeros(7))
    bare = build("gated-rms-tied", d_mlp=5)
    assert torch.equal(bare.b_in, torch.zeros(2, 5))
    assert torch.equal(bare.b_out, torch.zeros(2, 8))
    assert torch.equal(bare.W_U, bare.W_E.T)
    assert not hasattr(build("attention-only"), "W_in")


# --- hooks ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_is_written_into_the_stream_is_what_is_read() -> None:
    model = build("layer-norm")
    _, cache = model.run_with_cache(some_tokens(), names_filter=lambda name: True)
    stream = cache["hook_embed"] + cache["hook_pos_embed"]
    for layer, block in enumerate(model.blocks):
        at = f"blocks.{layer}."
        torch.testing.assert_close(cache[at + "hook_resid_pre"], stream)
        for reader in "qkv":
            each_head = cache[f"{at}attn.hook_{reader}_input"]
            torch.testing.assert_close(each_head, stream[:, :, None].expand_as(each_head))
        heads = cache[at + "attn.hook_result"].sum(2) + block.attn.b_O
        torch.testing.assert_close(cache[at + "hook_attn_out"], heads)
        stream = stream + heads
        torch.testing.assert_close(cache[at + "hook_resid_mid"], stream)
        torch.testing.assert_close(cache[at + "hook_mlp_in"], stream)
        scaled = (stream - stream.mean(-1, keepdim=True)) / cache[at + "ln2.hook_scale"]
        torch.testing.assert_close(cache[at + "ln2.hook_normalized"], scaled)
        stream = stream + cache[at + "hook_mlp_out"]
        torch.testing.assert_close(cache[at + "hook_resid_post"], stream)


@torch.no_grad()
def test_shapes_are_those_of_transformer_lens() -> None:
    _, cache = build("gated-with-biases", d_head=3, d_mlp=5).run_with_cache(
        some_tokens(pos=3), names_filter=lambda n: True
    )
    shapes = {name: tuple(value.shape) for name, value in cache.cache_dict.items() if not name.startswith("blocks.1")}
    stream, head, scores, result, neurons = (3, 3, 8), (3, 3, 2, 3), (3, 2, 3, 3), (3, 3, 2, 8), (3, 3, 5)
    at = "blocks.0."
    assert shapes == {
        **{name: stream for name in ("hook_embed", "hook_pos_embed")},
        **{f"{at}hook_{n}": stream for n in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")},
        **{f"{at}attn.hook_{n}": head for n in "qkvz"},
        **{f"{at}attn.hook_{n}": scores for n in ("attn_scores", "pattern")},
        **{f"{at}attn.hook_{n}": result for n in ("result", "q_input", "k_input", "v_input")},
        **{f"{at}mlp.hook_{n}": neurons for n in ("pre", "pre_linear", "post")},
    }


@torch.no_grad()
def test_costly_hook_points_are_cached_only_by_name_or_flag() -> None:
    model = build("layer-norm")
    costly = {n for n in model.hook_dict if n.endswith(("result", "q_input", "k_input", "v_input", "mlp_in"))}
    assert set(model.run_with_cache(some_tokens())[1].cache_dict) == set(model.hook_dict) - costly
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    assert set(model.run_with_cache(some_tokens())[1].cache_dict) == set(model.hook_dict)
    assert len(costly) == 10


def test_a_cache_of_norms_keeps_its_shape_beside_split_inputs() -> None:
    model = build("layer-norm")
    _, cache = model.run_with_cache(
        some_tokens(), names_filter=["blocks.0.ln1.hook_scale", "blocks.0.attn.hook_k_input"]
    )
    assert cache["blocks.0.ln1.hook_scale"].shape == (3, 4, 1)


@pytest.mark.parametrize("reader", "qkv")
@torch.no_grad()
def test_an_edit_of_one_heads_input_reaches_that_head_alone(reader: str) -> None:
    model, tokens = build("layer-norm"), some_tokens()
    names = [f"blocks.0.attn.hook_{m}" for m in "qkv"]
    _, before = model.run_with_cache(tokens, names_filter=names)

    def edit(x: Tensor, hook: Any) -> Tensor:
        x[:, :, 1, 0] += 1
        return x

    with model.hooks(fwd_hooks=[(f"blocks.0.attn.hook_{reader}_input", edit)]):
        _, after = model.run_with_cache(tokens, names_filter=names)
    for name in names:
        torch.testing.assert_close(after[name][:, :, 0], before[name][:, :, 0])
        changed = not torch.allclose(after[name][:, :, 1], before[name][:, :, 1], atol=1e-4)
        assert changed == name.endswith(reader)


def gradient_at(model: Transformer, tokens: Tensor, name: str) -> Tensor:
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[hook.name] = x

    with model.hooks(fwd_hooks=[(name, keep)]):
        logits = model(tokens)
    return torch.autograd.grad(logits[:, -1, 1].sum(), kept[name])[0]


@pytest.mark.parametrize(
    "name", ["hook_mlp_in", "attn.hook_k_input", "attn.hook_result", "ln2.hook_scale", "attn.hook_z"]
)
def test_gradients_at_a_hook_point_are_the_effect_of_editing_there(name: str) -> None:
    model, tokens = build("layer-norm", act_fn="gelu").double(), some_tokens()
    name = f"blocks.0.{name}"
    gradient = gradient_at(model, tokens, name)
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def nudged(size: float) -> Tensor:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda x, hook: x + size * direction)]):
            return model(tokens)[:, -1, 1].sum()

    slope = (nudged(1e-5) - nudged(-1e-5)) / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_backward_hooks_see_the_same_gradient() -> None:
    model, tokens, seen = build("layer-norm"), some_tokens(), {}

    def keep(gradient: Tensor, hook: Any) -> None:
        seen[hook.name] = gradient

    name = "blocks.1.attn.hook_q_input"
    with model.hooks(bwd_hooks=[(name, keep)]):
        model(tokens)[:, -1, 1].sum().backward()
    torch.testing.assert_close(seen[name], gradient_at(model, tokens, name))
    assert_no_hooks(model)


@torch.no_grad()
def test_edits_of_scores_patterns_and_norms_take_effect() -> None:
    model, tokens = build("layer-norm"), some_tokens()
    for name in ("attn.hook_attn_scores", "attn.hook_pattern", "ln1.hook_normalized", "attn.hook_v", "mlp.hook_post"):
        with model.hooks(fwd_hooks=[(f"blocks.0.{name}", lambda x, hook: torch.rand_like(x))]):
            assert not torch.allclose(model(tokens), build("layer-norm")(tokens), atol=1e-3), name


def assert_no_hooks(model: Transformer) -> None:
    for name, point in model.hook_dict.items():
        assert not (point.fwd_hooks or point.bwd_hooks or point.hooked), name
    assert model.context_level == 0


def fail(x: Tensor, hook: Any) -> None:
    raise ZeroDivisionError(hook.name)


def halve(x: Tensor, hook: Any) -> Tensor:
    return x / 2


def test_hooks_are_gone_after_an_error_in_a_hook() -> None:
    model = build()
    with (
        pytest.raises(ZeroDivisionError),
        model.hooks(fwd_hooks=[("hook_embed", halve), ("blocks.1.attn.hook_z", fail)]),
    ):
        model(some_tokens())
    assert_no_hooks(model)
    with pytest.raises(ZeroDivisionError), model.hooks(bwd_hooks=[("hook_embed", fail)]):
        model(some_tokens()).sum().backward()
    assert_no_hooks(model)
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(some_tokens(), fwd_hooks=[(lambda name: "resid" in name, fail)])
    assert_no_hooks(model)
    with pytest.raises(BadInput):
        model.run_with_cache(some_tokens(pos=5))
    assert_no_hooks(model)


def test_hooks_are_gone_after_an_error_while_attaching() -> None:
    model = build()
    with pytest.raises(UnknownName), model.hooks(fwd_hooks=[("hook_embed", halve), ("hook_embedding", halve)]):
        model(some_tokens())
    assert_no_hooks(model)


@torch.no_grad()
def test_an_inner_context_takes_only_its_own_hooks_away() -> None:
    model, tokens = build(), some_tokens()
    plain = model(tokens)
    with model.hooks(fwd_hooks=[("hook_embed", halve)]):
        once = model(tokens)
        with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[("hook_embed", halve), ("hook_pos_embed", fail)]):
            model(tokens)
        with model.hooks(fwd_hooks=[("hook_embed", halve)]):
            twice = model(tokens)
        assert torch.equal(model.run_with_cache(tokens)[0], once)
        assert torch.equal(model(tokens), once)
    assert_no_hooks(model)
    assert torch.equal(model(tokens), plain)
    assert not torch.allclose(once, twice)
    assert not torch.allclose(once, plain)


def test_copies_and_pickles_made_under_hooks_have_none() -> None:
    model, tokens = build("layer-norm"), some_tokens()
    plain = model(tokens)
    with model.hooks(fwd_hooks=[("hook_embed", halve)]):
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in others:
        assert_no_hooks(other)
        assert torch.equal(other(tokens), plain)
        with other.hooks(fwd_hooks=[("hook_embed", halve)]):
            assert not torch.equal(other(tokens), plain)
            assert torch.equal(model(tokens), plain)
    tied = copy.deepcopy(build("gated-rms-tied"))
    assert tied.unembed.W_U.data_ptr() == tied.W_E.data_ptr()


@pytest.mark.parametrize("result", [torch.zeros(()), torch.zeros(1, 4, 8), torch.zeros(3, 4, 8, 1), 0.0])
@pytest.mark.parametrize("direction", ["fwd_hooks", "bwd_hooks"])
def test_a_hook_that_returns_another_shape_is_refused(direction: str, result: Any) -> None:
    model = build()
    with (
        pytest.raises(BadInput, match=r"'blocks.0.hook_resid_mid' returned .* shape \(3, 4, 8\)"),
        model.hooks(**{direction: [("blocks.0.hook_resid_mid", lambda x, hook: result)]}),
    ):
        model(some_tokens()).sum().backward()
    assert_no_hooks(model)


def test_a_filter_that_matches_nothing_is_refused() -> None:
    model = build()
    for nothing in (lambda name: False, []):
        with pytest.raises(BadInput, match="matches no hook point"):
            model.run_with_cache(some_tokens(), names_filter=nothing)
    with pytest.raises(UnknownName, match=r"did you mean 'blocks\.0\.attn\.hook_z'"):
        model.run_with_cache(some_tokens(), names_filter="blocks.0.attn.hook_zz")
    with pytest.raises(UnknownName):
        model.run_with_cache(some_tokens(), names_filter=["hook_embed", "blocks.7.hook_resid_pre"])
    with pytest.raises(BadInput), model.hooks(fwd_hooks=[(lambda name: "rezid" in name, halve)]):
        model(some_tokens())


def test_the_users_hook_is_listed_under_its_own_name() -> None:
    model = build()
    with model.hooks(fwd_hooks=[("hook_embed", halve)]):
        assert [h.user_hook for h in model.hook_dict["hook_embed"].fwd_hooks] == [halve]


# --- TransformerLens's own analyses --------------------------------------------------------------------------------


@torch.no_grad()
def test_activation_cache_takes_the_stream_apart() -> None:
    model, tokens = build("layer-norm"), some_tokens()
    logits, cache = model.run_with_cache(tokens)
    last = cache["resid_post", -1]
    torch.testing.assert_close(cache.decompose_resid(apply_ln=False).sum(0), last)
    parts, labels = cache.get_full_resid_decomposition(return_labels=True)
    torch.testing.assert_close(parts.sum(0), last, atol=1e-5, rtol=1e-5)
    assert labels[-1] == "bias"
    assert len(parts) == 4 + 2 * 32 + 3
    torch.testing.assert_close(cache.accumulated_resid(apply_ln=False)[-1], last)
    _, named = model.run_with_cache(tokens, names_filter=lambda name: True)
    heads = torch.cat([named[f"blocks.{i}.attn.hook_result"].permute(2, 0, 1, 3) for i in range(2)])
    torch.testing.assert_close(cache.stack_head_results(), heads)
    directs = cache.logit_attrs(cache.decompose_resid(apply_ln=False), tokens=2)
    centred = cache["hook_embed"] - cache["hook_embed"].mean(-1, keepdim=True)
    torch.testing.assert_close(directs[0], centred @ model.W_U[:, 2] / cache["ln_final.hook_scale"][..., 0])
    torch.testing.assert_close(model.unembed(model.ln_final(last)), logits)


@torch.no_grad()
def test_activation_patching_restores_the_clean_run() -> None:
    from transformer_lens import FactoredMatrix, patching

    model, clean, corrupt = build("layer-norm"), some_tokens(batch=1), some_tokens(batch=1, seed=1)
    logits, cache = model.run_with_cache(clean)
    by_position = patching.get_act_patch_resid_pre(model, corrupt, cache, lambda x: x[0, -1, 0])
    assert by_position.shape == (2, 4)
    everywhere = model.run_with_hooks(
        corrupt, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: cache[hook.name])]
    )
    torch.testing.assert_close(everywhere, logits)
    per_head = patching.get_act_patch_attn_head_out_all_pos(model, corrupt, cache, lambda x: x[0, -1, 0])
    assert per_head.unique().numel() > 1
    product = FactoredMatrix(model.W_V[1, 0], model.W_O[1, 0])
    torch.testing.assert_close(product.AB, model.W_V[1, 0] @ model.W_O[1, 0])


@needs_edge_attribution
def test_attribution_patching_by_edges_is_writer_difference_times_reader_gradient() -> None:
    from transformer_lens.tools.analysis import attribution_patching as ap

    model, clean, corrupt = build("layer-norm"), some_tokens(batch=1), some_tokens(batch=1, seed=1)
    flags = dict(vars(model.cfg))

    def metric(logits: Tensor) -> Tensor:
        return (logits[:, -1, 1] - logits[:, -1, 2]).mean()

    result = ap.attribution_patch(model, clean, corrupt, metric, config=ap.EdgeAttributionConfig(granularity="edge"))
    assert len(result.edge_scores) == 184
    kept: dict[str, Tensor] = {}
    names = [
        n for n in model.hook_dict if n.endswith(("_input", "mlp_in", "result", "mlp_out", "hook_embed", "resid_post"))
    ]
    with torch.no_grad():
        _, at_clean = model.run_with_cache(clean, names_filter=names)
    with model.hooks(fwd_hooks=[(n, lambda x, hook: kept.__setitem__(hook.name, x)) for n in names]):
        value = metric(model(corrupt))
    gradients = dict(zip(kept, torch.autograd.grad(value, list(kept.values()), allow_unused=True), strict=True))
    for (writer, reader), score in result.edge_scores.items():
        name = f"blocks.{writer.layer}.attn.hook_result" if writer.kind == "attn_head_out" else writer.hook_name
        change = (at_clean[name] - kept[name].detach())[0, writer.position]
        gradient = gradients[reader.hook_name]
        assert gradient is not None
        gradient = gradient[0, reader.position]
        change = change[writer.head] if writer.head is not None else change
        gradient = gradient[reader.head] if reader.head is not None else gradient
        assert score == pytest.approx(float((change * gradient).sum()), abs=2e-6)
    whole = ap.faithfulness(model, clean, corrupt, metric, list(result.edge_scores))
    assert whole.recovered == pytest.approx(1, abs=1e-3)
    assert vars(model.cfg) == flags
    assert_no_hooks(model)


@needs_native_bridge
def test_attribution_patching_by_nodes_agrees_with_the_bridge() -> None:
    from transformer_lens.tools.analysis import attribution_patching as ap

    model, clean, corrupt = build("layer-norm"), some_tokens(batch=1), some_tokens(batch=1, seed=1)
    scores = [
        ap.attribution_patch(m, clean, corrupt, lambda x: x[:, -1, 1].mean()).node_scores
        for m in (model, model.to_bridge())
    ]
    assert scores[0].keys() == scores[1].keys()
    for node, score in scores[0].items():
        assert score == pytest.approx(scores[1][node], abs=1e-5)


# --- bridge --------------------------------------------------------------------------------------------------------


@needs_native_bridge
@pytest.mark.parametrize("variant", ["plain", "layer-norm", "gated-rms-tied", "attention-only", "bidirectional"])
@torch.no_grad()
def test_a_bridge_has_equal_logits(variant: str) -> None:
    model, state = build(variant), torch.get_rng_state()
    bridge = model.to_bridge()
    assert torch.equal(state, torch.get_rng_state())
    assert not bridge.training
    for pos in (4, 2):
        torch.testing.assert_close(bridge(some_tokens(pos)), model(some_tokens(pos)), atol=1e-5, rtol=0)
    assert isinstance(model, cm.HookedModel)
    assert isinstance(bridge, cm.HookedModel)
    for name in ("blocks.1.ln1", "ln_final", "unembed"):
        x = torch.randn(2, 3, 8)
        torch.testing.assert_close(cm.module_of(bridge, name)(x), cm.module_of(model, name)(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UnsupportedModel, match=r"no module 'blocks\.1\.ln9'"):
        cm.module_of(model, "blocks.1.ln9")


@needs_native_bridge
@torch.no_grad()
def test_a_bridge_shares_the_activations_by_name() -> None:
    model = build("layer-norm")
    _, ours = model.run_with_cache(some_tokens())
    _, theirs = model.to_bridge().run_with_cache(some_tokens())
    for name, value in ours.cache_dict.items():
        # A native bridge caches positions once for the whole batch, and the pattern in place of the scores.
        if not name.endswith(("hook_pos_embed", "hook_attn_scores")):
            torch.testing.assert_close(
                value, theirs[name], atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize(
    ("variant", "named"), [("half-uniform", "softmax_share 0.5"), ("gated-with-biases", "biases in")]
)
def test_a_bridge_that_cannot_be_equal_is_refused(variant: str, named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        build(variant).to_bridge()


# --- weights from elsewhere ----------------------------------------------------------------------------------------


def in_older_orientation(state: dict[str, Tensor], flat: bool) -> dict[str, Tensor]:
    out = dict(state)
    for key, value in state.items():
        name = key.rpartition(".")[2]
        if name in ("W_E", "W_Q", "W_K", "W_V", "W_in", "W_gate", "W_out"):
            out[key] = value.mT.contiguous()
        if name == "W_O":
            out[key] = value.flatten(0, 1).T.contiguous() if flat else value.mT.contiguous()
        if name == "W_Q":
            out[key.replace("W_Q", "mask")] = torch.ones(4, 4)
            out[key.replace("W_Q", "IGNORE")] = torch.tensor(-math.inf)
    return out


@settings(max_examples=40)
@given(
    sizes=st.fixed_dictionaries(
        {
            "d_vocab": st.sampled_from([5, 8]),
            "d_vocab_out": st.sampled_from([3, 8]),
            "n_ctx": st.sampled_from([4, 8]),
            "n_layers": st.integers(1, 2),
            "d_model": st.just(8),
            "n_heads": st.integers(1, 2),
            "d_head": st.sampled_from([3, 4, 8]),
            "d_mlp": st.sampled_from([6, 8]),
            "normalization": st.sampled_from([None, "LN", "RMS"]),
            "gated": st.booleans(),
            "attn_bias": st.booleans(),
            "mlp_bias": st.booleans(),
            "unembed_bias": st.booleans(),
            "attn_only": st.booleans(),
        }
    ),
    older=st.sampled_from(["today", "flat", "by head"]),
)
def test_weights_of_any_release_are_read_back(sizes: dict[str, Any], older: str) -> None:
    if sizes["attn_only"]:
        sizes |= {"gated": False, "mlp_bias": False, "d_mlp": 32}
    model = Transformer(ModelConfig(**sizes), seed=1)
    state = model.state_dict()
    decides = sizes["d_vocab"] != 8 or sizes["d_head"] != 8 or (sizes["d_mlp"] != 8 and not sizes["attn_only"])
    if older == "flat" or (older == "by head" and decides):
        state = in_older_orientation(state, flat=older == "flat")
    read = cm.from_transformer_lens(
        state, act_fn="relu", normalization=sizes["normalization"], n_heads=sizes["n_heads"]
    )
    assert read.config == model.config
    for key, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[key], value), key


def test_absent_biases_are_zero_and_the_rest_is_kept() -> None:
    model = build("layer-norm")
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("attn.b_Q", "1.mlp.b_out"))}
    read = cm.from_transformer_lens(state, act_fn="gelu", normalization="LN")
    assert not bool(read.b_Q.any())
    assert not bool(read.b_out[1].any())
    assert torch.equal(read.b_out[0], model.b_out[0])
    assert not read.training


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"blocks.0.attn.W_X": torch.zeros(2)}, BadInput, "blocks.0.attn.W_X"),
        ({"unembed.W_U": None}, BadInput, "unembed.W_U is missing"),
        ({"blocks.1.mlp.W_out": None}, BadInput, "blocks.1.mlp.W_out"),
        ({"blocks.0.ln1.w": None}, BadInput, "blocks.0.ln1.w"),
        ({"pos_embed.W_pos": None}, BadInput, "pos_embed.W_pos is missing"),
        ({"blocks.3.attn.W_Q": torch.zeros(2, 8, 4)}, BadInput, "blocks.2 is missing"),
        ({"blocks.1.attn.W_V": torch.zeros(2, 8, 5)}, BadInput, "blocks.1.attn.W_V"),
        ({"blocks.1.attn.W_V": torch.zeros(2, 4, 8)}, BadInput, "older releases"),
        ({"blocks.1.mlp.b_in": torch.zeros(5)}, BadInput, "blocks.1.mlp.b_in"),
        ({"embed.W_E": torch.zeros(7, 9)}, BadInput, "embed.W_E"),
        ({"embed.W_E": torch.zeros(7, 8, dtype=torch.int64)}, BadInput, "embed.W_E"),
        ({"blocks.1.mlp.W_in": torch.full((8, 32), math.nan)}, CorruptRun, "blocks.1.mlp.W_in"),
    ],
)
def test_damaged_weights_are_refused_by_name(change: dict[str, Any], error: type[Exception], named: str) -> None:
    state = {k: v for k, v in {**build("layer-norm").state_dict(), **change}.items() if v is not None}
    with pytest.raises(error, match=named):
        cm.from_transformer_lens(state, act_fn="gelu", normalization="LN")


def test_what_the_weights_contradict_is_refused() -> None:
    state = build("layer-norm").state_dict()
    with pytest.raises(BadInput, match="pass normalization="):
        cm.from_transformer_lens(state, act_fn="gelu", normalization=None)
    with pytest.raises(BadInput, match=r"ln1\.b"):
        cm.from_transformer_lens(state, act_fn="gelu", normalization="RMS")
    with pytest.raises(BadInput, match="n_heads 4"):
        cm.from_transformer_lens(state, act_fn="gelu", normalization="LN", n_heads=4)
    with pytest.raises(BadInput, match="'model'"):
        cm.from_transformer_lens({"model": state}, act_fn="gelu", normalization="LN")


def published(path: str) -> dict[str, Any]:
    return torch.load(reference_folder() / path, map_location="cpu", weights_only=True)


def reference(folder: str) -> dict[str, Any]:
    return json.loads((reference_folder() / folder / "reference.json").read_text())


def table(p: int) -> tuple[Tensor, Tensor]:
    return torch.cartesian_prod(torch.arange(p), torch.arange(p)), torch.arange(p).repeat(p).add(
        torch.arange(p).repeat_interleave(p)
    ) % p


@torch.no_grad()
def test_published_modular_addition_has_its_accuracy() -> None:
    weights = published("progress-measures/low_precision_mod_addition.pth")["model"]
    model = cm.from_transformer_lens(weights, act_fn="relu", normalization=None)
    operands, answers = table(113)
    tokens = F.pad(operands, (0, 1), value=113)
    accuracy = (model(tokens, last=1)[:, 0].argmax(-1) == answers).double().mean()
    assert float(accuracy) == reference("progress-measures")["low_precision_mod_addition.pth"]["acc_full"]


@torch.no_grad()
def test_published_digit_addition_has_its_accuracy() -> None:
    weights = published("progress-measures/5_digit_addition_infinite.pth")["model"]
    model = cm.from_transformer_lens(weights, act_fn="relu", normalization=None)
    assert (model.config.d_vocab, model.config.d_vocab_out) == (12, 10)
    digits = torch.randint(0, 10, (3000, 10), generator=torch.Generator().manual_seed(0))
    tens = 10 ** torch.arange(4, -1, -1)
    total = (digits[:, :5] * tens).sum(1) + (digits[:, 5:] * tens).sum(1)
    tokens = torch.cat([F.pad(digits[:, :5], (0, 1), value=10), F.pad(digits[:, 5:], (0, 1), value=11)], 1)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens, last=1).argmax(-1)], 1)
    right = (tokens[:, 12:] == total[:, None] // 10 ** torch.arange(5, -1, -1) % 10).all(1)
    # Another sample of 3000 than the reference's: four standard errors of the difference.
    assert float(right.double().mean()) == pytest.approx(
        reference("progress-measures")["5_digit_addition_infinite"]["acc"], abs=0.015
    )


@torch.no_grad()
def test_published_clock_and_pizza_models_have_their_accuracy() -> None:
    runs = reference("clock-pizza")
    attention = {run: values for run, values in runs.items() if "attn_coeff" in values["config"]}
    assert len(attention) == 7
    operands, answers = table(59)
    for run, values in attention.items():
        model = cm.from_transformer_lens(
            published(f"clock-pizza/model_{run}.pt"),
            act_fn="relu",
            normalization=None,
            causal=False,
            softmax_share=values["config"]["attn_coeff"],
            uniform_weight=1.0,
        )
        accuracy = (model(operands)[:, -1].argmax(-1) == answers).double().mean()
        assert float(accuracy) == pytest.approx(values["accuracy_full_table"], abs=1e-9), run


# --- files ---------------------------------------------------------------------------------------------------------


@variants
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(variant: str, tmp_path: Path) -> None:
    model = build(variant)
    digest = cm.save(model, tmp_path / "m.safetensors")
    assert digest == _io.sha256_file(tmp_path / "m.safetensors")
    again = cm.load(tmp_path / "m.safetensors", sha256=digest)
    assert again.config == model.config
    assert not again.training
    assert torch.equal(again(some_tokens()), model(some_tokens()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_dtype_survives_a_file(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        cm.save(build().to(dtype), tmp_path / "m.safetensors")
        assert cm.load(tmp_path / "m.safetensors").W_E.dtype == dtype


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "m.safetensors"
    cm.save(build("layer-norm"), path)
    return path


def check_refused(stored: Path, damaged: bytes) -> None:
    path = stored.with_name("damaged.safetensors")
    path.write_bytes(damaged)
    with pytest.raises(CorruptRun, match="altered"):
        cm.load(path, sha256=_io.sha256_file(stored))
    with pytest.raises((CorruptRun, IncompatibleRun)):
        cm.load(path)


@settings(max_examples=150)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_a_weight_silently(stored: Path, where: float, bit: int) -> None:
    damaged = bytearray(stored.read_bytes())
    damaged[int(where * len(damaged))] ^= 1 << bit
    check_refused(stored, damaged)


@settings(max_examples=100)
@given(where=st.integers(0, 3300), bit=st.integers(0, 7))
def test_a_flip_in_the_header_is_found_even_without_the_hash(stored: Path, where: int, bit: int) -> None:
    damaged = bytearray(stored.read_bytes())
    damaged[where] ^= 1 << bit
    check_refused(stored, damaged)


@settings(max_examples=40)
@given(length=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(stored: Path, length: float) -> None:
    data = stored.read_bytes()
    check_refused(stored, data[: int(length * len(data))])


def test_what_is_no_model_file_is_refused(tmp_path: Path, stored: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(CorruptRun, match="cannot read"):
        cm.load(path)
    path.write_bytes(safetensors.torch.save(build().state_dict()))
    with pytest.raises(CorruptRun, match="is not a whole model file"):
        cm.load(path)
    torch.save(build().state_dict(), path)
    with pytest.raises(CorruptRun, match="is not a whole model file"):
        cm.load(path)
    path.write_bytes(stored.read_bytes().replace(b"circuits.model/1", b"circuits.model/2"))
    with pytest.raises(IncompatibleRun, match=r"circuits\.model/2"):
        cm.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    model = build()
    with torch.no_grad():
        model.blocks[1].mlp.W_in[0, 0] = value
    digest = cm.save(model, tmp_path / "m.safetensors")
    with pytest.raises(CorruptRun, match=r"blocks\.1\.mlp\.W_in"):
        cm.load(tmp_path / "m.safetensors", sha256=digest)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    digest = cm.save(build(), path)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(Path, "replace", full)
        cm.save(build("layer-norm"), path)
    assert cm.load(path, sha256=digest).config == build().config
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_first_releases_store_the_unembedding_and_the_positions_turned_too() -> None:
    model = Transformer(
        ModelConfig(d_vocab=5, n_ctx=4, n_layers=2, d_model=8, n_heads=2, d_head=3, attn_bias=True), seed=1
    )
    state = in_older_orientation(dict(model.state_dict()), flat=True)
    for key in ("unembed.W_U", "pos_embed.W_pos"):
        state[key] = state[key].T.contiguous()
    read = cm.from_transformer_lens(state, act_fn="relu", normalization=None)
    tokens = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(read(tokens), model(tokens), atol=1e-6)


def test_hooks_are_not_left_behind_on_request() -> None:
    model = build("plain")
    with pytest.raises(BadInput, match="never outlive"):
        model.run_with_hooks(some_tokens(), fwd_hooks=[("hook_embed", lambda x, hook: x)], reset_hooks_end=False)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize("name", ["add_hook", "add_perma_hook"])
def test_hooks_outside_a_context_are_refused(name: str) -> None:
    model = Transformer(ModelConfig(d_vocab=5, n_ctx=3, d_model=8, n_heads=2))
    with pytest.raises(BadInput, match=r"live in a context alone: with model\.hooks\("):
        getattr(model, name)("hook_embed", lambda x, hook: None)
    assert not any(point.hooked for point in model.hook_dict.values())
