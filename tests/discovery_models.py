"""Models and pairs that the discovery tests share, and the slow definition that they are held to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LENS_4, NO_NATIVE
from torch import Tensor

from circuits.discovery import Graph, logit_difference
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


def close(got: Tensor, expected: Tensor, relative: float) -> bool:
    return float((got - expected).abs().max()) <= relative * float(expected.abs().max())


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

    def value(self, v: Tensor) -> Tensor:
        return v

    def mlp(self, mlp: Any, x: Tensor) -> Tensor:
        return mlp(x)

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
                heads.append(self.pattern(q, k) @ self.value(v) @ attn.W_O[h])
            written += heads
            constant = constant + attn.b_O if self.c.attn_bias else constant
            if not self.c.attn_only:
                written.append(self.mlp(block.mlp, self.norm(read(f"m{layer}"), block.ln2)))
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


NO_GPTJ_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


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
        "GPTJ": lambda: transformers.GPTJConfig(
            **shared, n_positions=8, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, **NO_GPTJ_DROPOUT
        ),
        "Phi": lambda: transformers.PhiConfig(**shared, **sizes, num_attention_heads=2),
    }[architecture]()
    name = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
    return build_bridge_from_module(jitter(model), architecture=name, hf_config=config)


SHAPES = [*VARIANTS, "constant-uniform", "native", "GPT2", "GPTNeoX", "Llama", "GPTJ", "Phi"]
shapes = pytest.mark.parametrize("shape", SHAPES)


def model_of(shape: str) -> Any:
    if shape == "native":
        if not LENS_4:
            pytest.skip(NO_NATIVE)
        return build("layer-norm").to_bridge()
    if shape == "constant-uniform":
        return build("uniform", uniform_weight=0.7, softmax_share=0.25, normalization="RMS")
    return build(shape) if shape in VARIANTS else hugging_face(shape)


def hooks_into(model: Any, reader: str, change: Tensor) -> list[Any]:
    """Hooks by which one reader sees ``change`` more; by the model's own norm and weights."""
    if reader == "logits":
        return [(f"blocks.{model.cfg.n_layers - 1}.hook_resid_post", lambda x, hook: x + change)]
    seen: dict[str, Tensor] = {}
    if reader.startswith("m"):
        block = f"blocks.{reader[1:]}"
        names = (f"{block}.ln2.hook_in", *([f"{block}.hook_mlp_in"] if isinstance(model, Transformer) else []))
        name = next((name for name in names if name in model.hook_dict), None)
        if name is not None:
            return [(name, lambda x, hook: x + change)]
        ln1 = model.blocks[int(reader[1:])].ln1.original_component  # the MLP reads the norm of attention
        return [
            (f"{block}.hook_resid_pre", lambda x, hook: seen.update(x=x)),
            (f"{block}.mlp.hook_in", lambda x, hook: ln1(seen["x"] + change)),
        ]
    part, head, kind = reader.split(".")
    block, index = model.blocks[int(part[1:])], int(head.lstrip("hkv"))
    norm = getattr(block.ln1, "original_component", block.ln1)

    def remember(x: Tensor, hook: Any) -> None:
        seen["x"] = x

    def edit(x: Tensor, hook: Any) -> Tensor:
        y = norm(seen["x"] + change) @ getattr(block.attn, f"W_{kind.upper()}")[index]
        bias = getattr(block.attn, f"b_{kind.upper()}")
        x = x.clone()
        x[:, :, index] = y if bias is None else y + bias.reshape(-1, y.shape[-1])[index]
        return x

    return [(f"blocks.{part[1:]}.hook_resid_pre", remember), (f"blocks.{part[1:]}.attn.hook_{kind}", edit)]
