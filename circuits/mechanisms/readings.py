"""What the tests of one-answer-token tasks read off a model: logits and neurons over the operand square."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits._decoding import last_logits
from circuits.errors import BadInput, CorruptRun, UnsupportedModel
from circuits.tasks.base import Role, Task

SMALLEST = 5
"""Operand values below which splits of the table have too few rows for the tests."""
MAX_ROWS = 16384
"""Beyond this many operand pairs a seeded sample of the square is read (N = 113 is read whole)."""
FINAL_NORM = "ln_final"


@dataclass(frozen=True, eq=False)
class Readings:
    """A model's behaviour over the operand square of a task.

    ``labels`` are indices into the task's ``answer_values``; ``neurons`` are MLP activations after the
    non-linearity at the answer position, all layers side by side; ``importance`` is each neuron's mean
    absolute attribution to the logit of the right answer.
    """

    operands: Int[Tensor, "rows 2"]
    tokens: Int[Tensor, "rows pos"]
    labels: Int[Tensor, " rows"]
    split: Int[Tensor, " rows"]
    logits: Float[Tensor, "rows n_answers"]
    neurons: Float[Tensor, "rows n_neurons"]
    importance: Float[Tensor, " n_neurons"]
    layers: tuple[int, ...]
    scales: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """What the norms before the MLPs, by ``norm_before``, and the last one, ``FINAL_NORM``, divide each row by."""
    remembered: dict[str, Any] = field(default_factory=dict, repr=False)
    """What tests have worked out of it that other tests need too."""

    @property
    def right(self) -> Bool[Tensor, " rows"]:
        """Rows that the model answers rightly."""
        return self.logits.argmax(-1) == self.labels

    def before_norm(self, chosen: Int[Tensor, " k"]) -> Float[Tensor, "rows k"] | None:
        """Some neurons, times what the norm before them divided by; None where no layer has such a norm.

        A ReLU without a bias is as large as its input: times the scale it is what it would be without the norm, whose
        scale is a function of both operands that the neuron has no part in.
        """
        layers = sorted(set(self.layers))
        if not self.scales.keys() & {norm_before(layer) for layer in layers}:
            return None
        one = torch.ones_like(self.neurons[:, :1])
        scales = torch.cat([self.scales.get(norm_before(layer), one) for layer in layers], dim=1)
        of = torch.tensor([layers.index(layer) for layer in self.layers], device=chosen.device)
        return self.neurons[:, chosen] * scales[:, of[chosen]]

    def row_factors(self) -> dict[str, Float[Tensor, "rows 1"]]:
        """Positive numbers that logits may be multiplied by, row by row, to undo norms: no answer changes by that.

        ``none`` is 1; ``final`` the scale of the last norm; ``final and mlp`` that and the scale of the norm before the
        last MLP, by which all that this MLP writes is divided.
        """
        factors = {"none": torch.ones_like(self.logits[:, :1])}
        final, mlp = self.scales.get(FINAL_NORM), self.scales.get(norm_before(max(self.layers)))
        if final is not None:
            factors["final"] = final
        if mlp is not None:
            factors["final and mlp" if final is not None else "mlp"] = mlp if final is None else final * mlp
        return {name: factor / factor.mean() for name, factor in factors.items()}


def has_one_answer_token(task: Task) -> bool:
    """Whether a task's answer is one token, so that one forward reads off everything."""
    return int((task.roles == Role.ANSWER).sum()) == 1 and int((task.roles == Role.SCRATCHPAD).sum()) == 0


def device_of(model: Any) -> torch.device:
    """The device of a model's parameters."""
    return next(model.parameters()).device


def hooked(model: Any, hooks: list[tuple[str, Callable[..., Any]]]) -> AbstractContextManager[Any]:
    """Context manager that puts forward hooks on a model and always takes them off again."""
    return model.hooks(fwd_hooks=hooks)


def mlp_layers(model: Any) -> tuple[int, ...]:
    """Indices of the layers that have an MLP."""
    return tuple(i for i in range(model.cfg.n_layers) if f"blocks.{i}.mlp.hook_post" in model.hook_dict)


def varies(neurons: Float[Tensor, "rows n"]) -> Bool[Tensor, " n"]:
    """Which columns are not constant, in whatever unit they are: neurons may be as small as their readers like."""
    return neurons.std(0) > 1e-6 * neurons.abs().amax(0)


def operand_positions(task: Task) -> tuple[int, int]:
    """Where the first and the second operand stand in a task's inputs.

    Raises:
        BadInput: an operand is no token of its own, or stands at several positions.
    """
    tokens = task.encode(torch.tensor([[0, 0], [1, 0], [0, 1]])).inputs
    places = [(tokens[0] != other).nonzero().flatten().tolist() for other in tokens[1:]]
    if any(len(place) != 1 for place in places):
        raise BadInput(
            f"{task.name} writes its operands at positions {places[0]} and {places[1]}: these tests need each operand "
            "to be one token, at one position"
        )
    return places[0][0], places[1][0]


def norm_before(layer: int) -> str:
    """Name of the norm that a layer's MLP reads the residual stream through."""
    return f"blocks.{layer}.ln2"


def scale_hooks(model: Any, layers: tuple[int, ...]) -> dict[str, str]:
    """The hook points of the scales of a model's norms, by the names that ``Readings.scales`` has; none without norms.

    Source: TransformerLens names them so, and its bridges do: ``hook_scale`` is what the norm divides by. A block whose
    attention and MLP run side by side may have one norm for both, ``ln1``.
    """
    found = {FINAL_NORM: f"{FINAL_NORM}.hook_scale"}
    for layer in layers:
        own, shared = f"{norm_before(layer)}.hook_scale", f"blocks.{layer}.ln1.hook_scale"
        alone = own not in model.hook_dict and getattr(model.cfg, "parallel_attn_mlp", False)
        found[norm_before(layer)] = shared if alone else own
    return {name: hook for name, hook in found.items() if hook in model.hook_dict}


def square(task: Task, *, seed: int = 0, limit: int = MAX_ROWS) -> Int[Tensor, "rows 2"]:
    """All operand pairs of a task in row-major order, or a seeded sample of ``limit`` of them."""
    n = task.n_operand_values
    if n * n <= limit:
        flat = torch.arange(n * n)
    else:
        generator = torch.Generator().manual_seed(seed)
        flat = torch.randint(n * n, (limit,), generator=generator).unique()
    return torch.stack([flat // n, flat % n], dim=1)


def split_of(task: Task, operands: Int[Tensor, "rows 2"]) -> Int[Tensor, " rows"]:
    """The split of each operand pair: 0 train, 1 held out at random, 2 held-out block."""
    n = task.n_operand_values
    index = torch.full((n * n,), 0)
    for number, name in enumerate(("train", "random", "block")):
        if task.split_size(name):
            members = task.examples(name).operands
            index[members[:, 0] * n + members[:, 1]] = number
    return index[operands[:, 0] * n + operands[:, 1]]


def read(model: Any, task: Task, *, seed: int = 0) -> Readings:
    """Logits, neurons and their importance over the operand square, from one forward and one backward.

    Raises:
        BadInput: the task's answer has more than one token, it has too few operand values, or the vocabularies differ.
        CorruptRun: the model's logits are not finite.
        UnsupportedModel: the model has no MLP.
    """
    if not has_one_answer_token(task):
        raise BadInput(f"{task.name} has answers of several tokens; this test reads tasks with one answer token")
    if task.n_operand_values < SMALLEST:
        raise BadInput(f"{task.name} has {task.n_operand_values} operand values: these tests need {SMALLEST} or more")
    layers = mlp_layers(model)
    if not layers:
        raise UnsupportedModel("the model has no MLP (no blocks.*.mlp.hook_post); neuron tests need one")
    device = device_of(model)
    operands = square(task, seed=seed)
    tokens = task.encode(operands).inputs.to(device)
    answer_tokens = task.answer_tokens.to(device)
    labels = torch.searchsorted(task.answer_values, task.answer(operands)).to(device)
    logits: list[Tensor] = []
    posts: list[Tensor] = []
    gradients: list[Tensor] = []
    scales: list[dict[str, Tensor]] = []
    for chunk, chunk_labels in zip(tokens.split(4096), labels.split(4096), strict=True):
        divided: dict[str, Tensor] = {}
        found = forward_backward(model, layers, chunk, answer_tokens, chunk_labels, divided)
        for kept, part in zip((logits, posts, gradients), found, strict=True):
            kept.append(part)
        scales.append(divided)
    stacked, neurons = torch.cat(logits), torch.cat(posts)
    if not torch.isfinite(stacked).all():
        raise CorruptRun("the model's logits are not finite (NaN or infinity): its weights are damaged")
    # deviations are from the mean of all rows: a chunk of them is a band of the first operand
    mean, importance = neurons.mean(0), torch.zeros_like(neurons[0])
    for post, gradient in zip(posts, gradients, strict=True):
        importance += (gradient * (post - mean)).abs().sum(0)
    widths = tuple(layer for layer, p in zip(layers, _widths(model, layers), strict=True) for _ in range(p))
    # whatever the precision of the model, tests calculate in single precision, or double where they need it
    return Readings(
        operands.to(device),
        tokens,
        labels,
        split_of(task, operands).to(device),
        stacked.float(),
        neurons.float(),
        importance.float() / len(operands),
        widths,
        {name: torch.cat([divided[name] for divided in scales]).float() for name in scales[0]},
    )


def _widths(model: Any, layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(model.blocks[i].mlp.W_out.shape[-2]) for i in layers)


def forward_backward(
    model: Any,
    layers: tuple[int, ...],
    tokens: Tensor,
    answer_tokens: Tensor,
    labels: Tensor,
    scales: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Answer logits, post-activations and the gradient of the right answer's centred logit, at the last position.

    ``scales`` is given what the norms there divide by, by the names of ``norm_before`` and ``FINAL_NORM``.
    """
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., Tensor]:
        # a bridge calls its hooks by other names than it is asked for: the name is kept here
        def keep(activation: Tensor, hook: Any) -> Tensor:
            kept[name] = activation if activation.requires_grad else activation.detach().requires_grad_()
            return kept[name]

        return keep

    def listener(name: str) -> Callable[..., None]:
        def listen(scale: Tensor, hook: Any) -> None:
            assert scales is not None
            scales[name] = scale[:, -1].detach()

        return listen

    names = [f"blocks.{i}.mlp.hook_post" for i in layers]
    hooks: list[tuple[str, Callable[..., Any]]] = [(name, keeper(name)) for name in names]
    if scales is not None:
        hooks += [(hook, listener(name)) for name, hook in scale_hooks(model, layers).items()]
    with torch.enable_grad(), hooked(model, hooks):
        output = last_logits(model, tokens)[:, -1]
        if int(answer_tokens.max()) >= output.shape[-1]:
            raise BadInput(
                f"the model has {output.shape[-1]} output tokens but the task's answers go up to token "
                f"{int(answer_tokens.max())}: task and model do not belong together"
            )
        logits = output[:, answer_tokens]
        centred = logits.gather(1, labels[:, None]).squeeze(1) - logits.mean(1)
        gradients = torch.autograd.grad(centred.sum(), [kept[n] for n in names])
    posts = torch.cat([kept[n][:, -1].detach() for n in names], dim=-1)
    return logits.detach(), posts, torch.cat([g[:, -1] for g in gradients], dim=-1)


def activations(
    model: Any, tokens: Int[Tensor, "rows pos"], names: Iterable[str], *, last: int | None = None
) -> dict[str, Tensor]:
    """What the named hook points hold on some inputs, in single precision.

    Where only the ``last`` positions matter, our own model computes no others in its last block.
    """
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def keep(activation: Tensor, hook: Any) -> None:
            kept[name] = activation.detach().float()

        return keep

    with torch.no_grad(), hooked(model, [(name, keeper(name)) for name in names]):
        model(tokens) if last is None else last_logits(model, tokens, last)
    return kept


def answer_logits(
    model: Any,
    task: Task,
    tokens: Int[Tensor, "rows pos"],
    hooks: list[tuple[str, Callable[..., Any]]] | None = None,
    *,
    cheap: bool = False,
) -> Float[Tensor, "rows n_answers"]:
    """Logits over the task's answers at the last position, with forward hooks in place.

    ``cheap`` is for hooks that look at no position of the last block's MLP but the last: our own model then computes no
    others, which is half of the work on three tokens.
    """
    with torch.no_grad(), hooked(model, hooks or []):
        logits = last_logits(model, tokens) if cheap else model(tokens)
    return logits[:, -1, task.answer_tokens.to(tokens.device)].float()


def decisive_layers(model: Any, task: Task, readings: Readings, *, cost: float = 0.3) -> tuple[int, ...]:
    """Return the layers without whose MLP answers go wrong: mean-ablating it at the answer costs ``cost`` of accuracy.

    Attribution does not compare layers: one that adds up large numbers which cancel has large gradients. All layers
    where none costs so much.
    """
    key = f"decisive layers {cost}"
    if key in readings.remembered:
        remembered: tuple[int, ...] = readings.remembered[key]
        return remembered
    layers = torch.tensor(readings.layers, device=readings.labels.device)
    intact = float(readings.right.float().mean())
    found = []
    for layer in sorted(set(readings.layers)):
        average = readings.neurons[:, layers == layer].mean(0)

        def ablate(activation: Tensor, hook: Any, average: Tensor = average) -> Tensor:
            activation = activation.clone()
            activation[:, -1] = average
            return activation

        logits = answer_logits(model, task, readings.tokens, [(f"blocks.{layer}.mlp.hook_post", ablate)], cheap=True)
        if float((logits.argmax(-1) == readings.labels).float().mean()) <= (1 - cost) * intact:
            found.append(layer)
    readings.remembered[key] = tuple(found) or tuple(sorted(set(readings.layers)))
    return tuple(readings.remembered[key])
