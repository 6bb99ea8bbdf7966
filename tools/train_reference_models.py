"""Train the networks of ``circuits.reference.trained`` anew and store them in half precision beside that file.

``python tools/train_reference_models.py [NAME ...]``: some minutes each on one core; all of them without a name.
Prints what the training forced, as measured on the network that is stored.
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from circuits import objectives, training
from circuits.model import ModelConfig, Transformer, load, save
from circuits.objectives import Recipe, Stage
from circuits.reference.trained import (
    HALF,
    band_jumps,
    forced_accuracy,
    forced_swap,
    stored_name,
    stored_path,
    swapped_digit,
)
from circuits.tasks import Addition

BATCH, STEPS = 256, 4000
MODELS: dict[str, tuple[str, int, int, int]] = {
    stored_name(family, seed, n, offset): (family, seed, n, offset)
    for family, seed, n, offset in (
        ("banded", 0, 40, 0),
        ("banded", 0, 60, 0),
        ("banded", 0, 60, 5),
        ("banded-twin", 0, 40, 0),
        ("banded-twin", 0, 50, 0),
        ("banded-twin", 0, 60, 0),
        ("interchange-trained", 0, 30, 0),
        ("interchange-trained", 0, 40, 0),
        ("interchange-trained", 0, 50, 0),
    )
}
"""Family, seed, number of operand values and offset of the bands of each."""


def train_bands(task: Addition, *, share: float, offset: int, seed: int) -> Transformer:
    """Return a network with uniform attention trained on banded labels and a two-level penalty."""
    objective = objectives.Banded(share=share, offset=offset)
    stage = Stage(objective, steps=STEPS, batch_size=512, learning_rate=3e-3, cooldown=0.3)
    shape = ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=64, n_heads=4, d_mlp=256, softmax_share=0.0)
    model = Transformer(shape, seed=seed)
    for _ in tqdm(
        training.steps(model, task, Recipe("banded", (stage,)), seed=seed, evaluate_every=STEPS), total=STEPS
    ):
        pass
    return model.eval()


def train_interchange(task: Addition, *, seed: int, steps: int = 2000) -> Transformer:
    """Return a network trained on sums and on swaps of a half of an operand's embedding.

    Each step sums three cross-entropies: on the sum; on the sum with the units digit of another operand, where the
    first half of the embedding is that operand's; on the sum with its tens digit, where the second half is.

    Source: Geiger et al. 2022 (arXiv 2112.00826), section 2.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = ModelConfig(d_vocab=task.d_vocab, n_ctx=3, d_model=2 * HALF, n_heads=4, d_mlp=256)
    model = Transformer(shape, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in tqdm(range(steps)):
        base, source = (task.sample("train", BATCH, generator=generator) for _ in range(2))
        loss = F.cross_entropy(model(base.inputs)[:, -1], base.tokens[:, -1])
        operand = step % 2
        for digit in range(2):
            value = swapped_digit(base.operands[:, operand], source.operands[:, operand], digit)
            legal = value < task.n
            logits = forced_swap(model, base.inputs[legal], source.inputs[legal], operand, digit)
            loss = loss + F.cross_entropy(logits, (value + base.operands[:, 1 - operand])[legal])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(names: list[str]) -> None:
    """Train and store some of the networks, or all."""
    torch.set_num_threads(1)
    for name in names or MODELS:
        family, seed, n, offset = MODELS[name]
        task = Addition(n=n, block=min(10, n // 5))
        if family == "interchange-trained":
            model = train_interchange(task, seed=seed)
        else:
            model = train_bands(task, share=0.5 if family == "banded" else 0.0, offset=offset, seed=seed)
        stored_path(name).parent.mkdir(exist_ok=True)
        save(model.half(), stored_path(name))
        model = load(stored_path(name)).float()
        found = training.accuracies(model, task)
        if family == "interchange-trained":
            found |= forced_accuracy(model, task)
        else:
            found |= {f"jumps at {at} mod 10": band_jumps(model, task, offset=at) for at in (0, 5)}
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
