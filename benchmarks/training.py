"""Training speed of our hooked model, and of our training, against plain torch and TransformerLens's native bridge.

    python benchmarks/training.py [--json] [--repeats N] [--seconds S]

First the models in one loop: all three start from the same weights, compute the same loss (checked before timing) and
take the same AdamW step. Then ``circuits.training.steps`` as users run it (objective, batches, schedule, forty
evaluations on top) against the smallest plain loop over the same batches, losses and steps, also checked.
CPU time of one thread (``process_time``), because wall time on a shared machine says more about the neighbours. The
three take turns; what is reported per model is the median over turns, and as ratio the median of each turn's ratio.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits import tasks, training
from circuits.model import ModelConfig, Transformer
from circuits.objectives import Answer, Recipe, Stage
from circuits.training.defaults import default_model
from circuits.training.loop import DATA_STREAM, generator_for, learning_rate


@dataclass(frozen=True)
class Case:
    name: str
    config: ModelConfig
    batch: int


CASES = (
    Case("1 layer, d 64, p = 53, full batch of 1404", ModelConfig(d_vocab=54, n_ctx=3, d_model=64, n_heads=4), 1404),
    Case(
        "2 layers, d 128, 16 positions, batch 64",
        ModelConfig(d_vocab=13, n_ctx=16, n_layers=2, d_model=128, n_heads=4, normalization="LN"),
        64,
    ),
    Case(
        "2 layers, d 128, 16 positions, batch 512",
        ModelConfig(d_vocab=13, n_ctx=16, n_layers=2, d_model=128, n_heads=4, normalization="LN"),
        512,
    ),
)


class PlainBlock(nn.Module):
    mask: Tensor

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.n_heads
        self.ln1 = nn.LayerNorm(c.d_model) if c.normalization else nn.Identity()
        self.ln2 = nn.LayerNorm(c.d_model) if c.normalization else nn.Identity()
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model, bias=False)
        self.out = nn.Linear(c.d_model, c.d_model, bias=False)
        self.up = nn.Linear(c.d_model, 4 * c.d_model)
        self.down = nn.Linear(4 * c.d_model, c.d_model)
        self.register_buffer("mask", torch.ones(c.n_ctx, c.n_ctx, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        batch, pos, d_model = x.shape
        qkv = self.qkv(self.ln1(x)).view(batch, pos, 3, self.heads, d_model // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        pattern = scores.masked_fill(self.mask[:pos, :pos], -math.inf).softmax(-1)
        x = x + self.out((pattern @ v).transpose(1, 2).reshape(batch, pos, d_model))
        return x + self.down(F.relu(self.up(self.ln2(x))))


class Plain(nn.Module):
    """The same model with nothing to hook: what one would write for training alone."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.tok = nn.Embedding(c.d_vocab, c.d_model)
        self.pos = nn.Parameter(torch.empty(c.n_ctx, c.d_model))
        self.blocks = nn.Sequential(*(PlainBlock(c) for _ in range(c.n_layers)))
        self.ln = nn.LayerNorm(c.d_model) if c.normalization else nn.Identity()
        self.head = nn.Linear(c.d_model, c.d_vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.ln(self.blocks(self.tok(tokens) + self.pos[: tokens.shape[1]])))

    @torch.no_grad()
    def copy_from(self, model: Transformer) -> Plain:
        self.tok.weight.copy_(model.W_E)
        self.pos.copy_(model.W_pos)
        self.head.weight.copy_(model.W_U.T)
        mine: Any
        theirs: Any
        for mine, theirs in zip(self.blocks, model.blocks, strict=True):
            attn, mlp = theirs.attn, theirs.mlp
            mine.qkv.weight.copy_(torch.cat([w.mT.flatten(0, 1) for w in (attn.W_Q, attn.W_K, attn.W_V)]))
            mine.out.weight.copy_(attn.W_O.flatten(0, 1).T)
            mine.up.weight.copy_(mlp.W_in.T)
            mine.up.bias.copy_(mlp.b_in)
            mine.down.weight.copy_(mlp.W_out.T)
            mine.down.bias.copy_(mlp.b_out)
        return self


def stepper(model: nn.Module, tokens: Tensor, targets: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=1.0)

    def step() -> Tensor:
        loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def cpu_seconds(step: Callable[[], Tensor], steps: int) -> float:
    start = time.process_time()
    for _ in range(steps):
        step()
    return (time.process_time() - start) / steps


def measure(case: Case, repeats: int, seconds: float) -> dict[str, float | str]:
    generator = torch.Generator().manual_seed(0)
    c = case.config
    tokens = torch.randint(0, c.d_vocab, (case.batch, c.n_ctx), generator=generator)
    targets = torch.randint(0, c.d_vocab, (case.batch, c.n_ctx), generator=generator)
    ours = Transformer(c, seed=0)
    models = {"plain": Plain(c).copy_from(ours), "ours": ours, "bridge": ours.to_bridge()}
    steps = {name: stepper(model.train(), tokens, targets) for name, model in models.items()}
    losses = {name: [float(step()) for _ in range(3)] for name, step in steps.items()}
    for name, values in losses.items():
        # From the second step on the bridge differs: it has biases on attention and unembedding, and trains them.
        alike = 1 if name == "bridge" else len(values)
        if not all(math.isclose(a, b, abs_tol=1e-3) for a, b in zip(values[:alike], losses["plain"], strict=False)):
            raise RuntimeError(f"{name} does not compute what plain torch does: losses {values}, {losses['plain']}")
    count = max(1, round(seconds / cpu_seconds(steps["plain"], 3)))
    turns = [{name: cpu_seconds(step, count) for name, step in steps.items()} for _ in range(repeats)]

    return {
        "case": case.name,
        **{f"{name}_ms": 1e3 * statistics.median(turn[name] for turn in turns) for name in models},
        "speed_to_plain": statistics.median(turn["plain"] / turn["ours"] for turn in turns),
        "speed_to_bridge": statistics.median(turn["bridge"] / turn["ours"] for turn in turns),
    }


def drained(task: Any, recipe: Recipe, config: ModelConfig) -> tuple[float, list[float]]:
    """CPU seconds of our training, and its losses."""
    model = Transformer(config, seed=0)
    start = time.process_time()
    losses = [step.loss for step in training.steps(model, task, recipe, seed=0)]
    return time.process_time() - start, losses


def by_hand(task: Any, recipe: Recipe, config: ModelConfig) -> tuple[float, list[float]]:
    """CPU seconds of the same updates in a plain loop over a plain model, and its losses."""
    stage = recipe.stages[0]
    model = Plain(config).copy_from(Transformer(config, seed=0)).train()
    losses = []
    start = time.process_time()
    examples = task.examples("train")
    table = examples.inputs, examples.targets[:, -1]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=stage.betas, weight_decay=stage.weight_decay, fused=True
    )
    for done in range(stage.steps):
        optimizer.param_groups[0]["lr"] = learning_rate(stage, done)
        inputs, wanted = table
        if stage.batch_size is not None:
            drawn = task.sample("train", stage.batch_size, generator=generator_for(0, DATA_STREAM, done))
            inputs, wanted = drawn.inputs, drawn.targets[:, -1]
        loss = F.cross_entropy(model(inputs)[:, -1], wanted)
        losses.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return time.process_time() - start, losses


def measure_training(name: str, task: Any, stage: Stage, repeats: int) -> dict[str, float | str]:
    """Our training against the plain loop, turn by turn."""
    recipe, config = Recipe("answer", (stage,)), default_model(task)
    ratios, ours_ms, plain_ms = [], [], []
    for _ in range(repeats):
        plain, expected = by_hand(task, recipe, config)
        ours, losses = drained(task, recipe, config)
        if not all(math.isclose(a, b, rel_tol=1e-2, abs_tol=1e-3) for a, b in zip(losses[:10], expected, strict=False)):
            raise RuntimeError(f"training does not do what the plain loop does: {losses[:10]}, {expected[:10]}")
        ratios.append(plain / ours)
        ours_ms.append(1e3 * ours / stage.steps)
        plain_ms.append(1e3 * plain / stage.steps)
    return {
        "case": name,
        "plain_ms": statistics.median(plain_ms),
        "ours_ms": statistics.median(ours_ms),
        "speed_to_plain": statistics.median(ratios),
    }


TRAININGS: dict[str, tuple[Any, Stage]] = {
    "a + b mod 53, whole table": (
        tasks.get("modular-addition", p=53, train_fraction=0.5),
        Stage(Answer(), steps=120, learning_rate=1e-2, weight_decay=2.0, cooldown=0.4),
    ),
    "a + b to n = 50, batches of 512": (
        tasks.get("addition", n=50),
        Stage(Answer(), steps=120, batch_size=512, learning_rate=5e-3, cooldown=0.3),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.3, help="CPU time of one model's turn")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [measure(case, args.repeats, args.seconds) for case in CASES]
    whole = [measure_training(name, *of, max(1, args.repeats // 3)) for name, of in TRAININGS.items()]
    if args.json:
        said = {"results": results, "training": whole, "cases": [asdict(c) for c in CASES]}
        print(json.dumps({"torch": torch.__version__, **said}, indent=2))
        return
    print(f"CPU ms per step, 1 thread, torch {torch.__version__}; speed is ours in steps per second as a ratio")
    print(f"{'':42}{'plain':>9}{'ours':>9}{'bridge':>9}{'to plain':>10}{'to bridge':>11}")
    for r in results:
        times = "".join(f"{r[f'{name}_ms']:9.2f}" for name in ("plain", "ours", "bridge"))
        print(f"{r['case']:42}{times}{r['speed_to_plain']:10.3f}{r['speed_to_bridge']:11.2f}")
    print("\ncircuits.training.steps, evaluations included, against a plain loop over the same batches")
    for r in whole:
        print(f"{r['case']:42}{r['plain_ms']:9.2f}{r['ours_ms']:9.2f}{'':9}{r['speed_to_plain']:10.3f}")


if __name__ == "__main__":
    main()
