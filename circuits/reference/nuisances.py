"""Changes of a model that a verdict on its mechanism must survive; each returns a new model."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import ModelConfig, Transformer
from circuits.reference.wiring import random_rotation
from circuits.tasks.arithmetic.operand_square import check_share
from circuits.tasks.base import Task
from circuits.tasks.renamed import RenamedTokens

READS_STREAM = ("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U")
IN = ("W_in", "W_gate")
WRITES_STREAM = ("W_E", "W_pos", "W_O", "b_O", "W_out", "b_out")


def rotation(model: Transformer, *, seed: int = 0) -> Transformer:
    """Return the model with its residual stream turned by a random rotation: equal logits.

    Args:
        model: a model without norms, which would look at the stream's coordinates.
        seed: draws the rotation.

    Raises:
        UnsupportedModel: the model has norms.

    Source: the residual stream has no privileged basis: Elhage et al. 2021, A Mathematical Framework for Transformer
        Circuits.
    """
    if model.config.normalization is not None:
        raise UnsupportedModel(
            f"a model with {model.config.normalization} norms has a basis of its own: rotate one without norms"
        )
    turn = random_rotation(model.config.d_model, torch.Generator().manual_seed(seed))
    state = {}
    for name, weight in model.state_dict().items():
        rotate, part = turn.to(weight.device), name.rpartition(".")[2]
        if part in READS_STREAM:
            weight = (rotate.T @ weight.double()).to(weight.dtype)
        elif part in WRITES_STREAM:
            weight = (weight.double() @ rotate).to(weight.dtype)
        state[name] = weight
    return _rebuilt(model, model.config, state)


def dead_neurons(model: Transformer, *, seed: int = 0, share: float = 0.25) -> Transformer:
    """Return the model with neurons in each MLP that never fire, among the others in random order: equal logits.

    Args:
        model: a model with MLPs.
        seed: draws what the dead neurons would write, and the order.
        share: how many are added, as a share of the neurons there are.

    Raises:
        BadInput: ``share`` is not between 0 and 1.
        UnsupportedModel: no neuron can be dead, because the activation function is never zero on an interval.

    Source: ours.
    """
    config = model.config
    if not config.gated and config.act_fn != "relu":
        raise UnsupportedModel(f"a neuron with {config.act_fn} is never quite dead: expected relu, or a gated MLP")
    generator = torch.Generator().manual_seed(seed)
    _check_mlps(model)
    check_share("share", share, one=True)

    def widened(mlp: dict[str, Tensor]) -> dict[str, Tensor]:
        width, d_model = mlp["W_out"].shape
        added = max(1, round(share * width))
        spread = float(mlp["W_out"].square().mean().sqrt())
        wider = {name: torch.cat([w, w.new_zeros(w.shape[0], added)], 1) for name, w in mlp.items() if name in IN}
        if "b_in" in mlp:
            # The bias of a gated MLP is added after the gate.
            off = mlp["b_in"].new_full((added,), 0.0 if config.gated else -1.0)
            wider["b_in"] = torch.cat([mlp["b_in"], off])
        written = torch.randn(added, d_model, generator=generator).to(mlp["W_out"]) * spread
        wider["W_out"] = torch.cat([mlp["W_out"], written])
        return wider

    return _with_mlps(model, widened, generator)


def duplicate_neurons(model: Transformer, *, seed: int = 0, share: float = 0.25) -> Transformer:
    """Return the model with some neurons of each MLP in two copies that share what they write: equal logits.

    Args:
        model: a model with MLPs.
        seed: draws which neurons, what part each copy writes, and the order.
        share: how many of the neurons.

    Raises:
        BadInput: ``share`` is not between 0 and 1.
        UnsupportedModel: the model has no MLP.

    Source: ours.
    """
    generator = torch.Generator().manual_seed(seed)
    _check_mlps(model)
    check_share("share", share, one=True)

    def widened(mlp: dict[str, Tensor]) -> dict[str, Tensor]:
        width = mlp["W_out"].shape[0]
        chosen = torch.randperm(width, generator=generator)[: max(1, round(share * width))].to(mlp["W_out"].device)
        part = 0.25 + 0.5 * torch.rand(len(chosen), 1, generator=generator).to(mlp["W_out"])
        wider = {name: torch.cat([w, w[..., chosen]], -1) for name, w in mlp.items() if name in (*IN, "b_in")}
        out = mlp["W_out"].clone()
        out[chosen] *= part
        wider["W_out"] = torch.cat([out, mlp["W_out"][chosen] * (1 - part)])
        return wider

    return _with_mlps(model, widened, generator)


def weight_noise(model: Transformer, *, seed: int = 0, level: float = 0.01) -> Transformer:
    """Return the model with noise on every weight and bias: nearly equal logits where ``level`` is small.

    Args:
        model: any model.
        seed: draws the noise.
        level: standard deviation, as a share of the root mean square of each tensor; tensors of zeros stay zero.

    Raises:
        BadInput: ``level`` is negative or not finite.

    Source: ours.
    """
    if not 0 <= level < float("inf"):
        raise BadInput(f"level = {level}: expected a finite number of at least 0")
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in model.state_dict().items():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        state[name] = weight + level * weight.square().mean().sqrt() * noise
    return _rebuilt(model, model.config, state)


def renamed_tokens(model: Transformer, task: Task, *, seed: int = 0) -> tuple[Transformer, RenamedTokens]:
    """Return the model and its task with the numbers of the tokens shuffled: equal logits, in another order.

    Args:
        model: a model of the task.
        task: the task.
        seed: draws the new numbers.

    Raises:
        BadInput: model and task have vocabularies of different sizes.

    Source: ours.
    """
    if task.d_vocab != model.config.d_vocab or model.config.d_vocab_out not in (None, task.d_vocab):
        raise BadInput(f"the task has {task.d_vocab} tokens, the model {model.config.d_vocab}: expected as many")
    order = torch.randperm(task.d_vocab, generator=torch.Generator().manual_seed(seed))
    old = order.argsort().to(model.W_E.device)
    state = dict(model.state_dict())
    for name, weight in state.items():
        part = name.rpartition(".")[2]
        if part == "W_E":
            state[name] = weight[old]
        elif part in ("W_U", "b_U"):
            state[name] = weight[..., old]
    return _rebuilt(model, model.config, state), RenamedTokens(task, tuple(order.tolist()))


NUISANCES: dict[str, Callable[..., Transformer]] = {
    "rotation": rotation,
    "dead-neurons": dead_neurons,
    "duplicate-neurons": duplicate_neurons,
    "weight-noise": weight_noise,
}
"""Every nuisance by its name."""


def transform(model: Transformer, kind: str, *, seed: int = 0, **options: float) -> Transformer:
    """Return the model changed by a nuisance; the given one stays as it is.

    Args:
        model: the model.
        kind: a key of ``NUISANCES``; underscores are accepted for hyphens.
        seed: seed of everything that the nuisance draws.
        options: keyword arguments of the nuisance, such as ``level`` or ``share``.

    Raises:
        UnknownName: no nuisance has that name, or it has no such option.
        BadInput: an option has a value that cannot be used.
        UnsupportedModel: the nuisance does not exist for this model.
    """
    key = kind.replace("_", "-")
    if key not in NUISANCES:
        raise UnknownName("nuisance", kind, NUISANCES)
    known = [name for name in inspect.signature(NUISANCES[key]).parameters if name not in ("model", "seed")]
    for option in options:
        if option not in known:
            raise UnknownName(f"option of {key}", option, known)
    return NUISANCES[key](model, seed=seed, **options)


def _check_mlps(model: Transformer) -> None:
    if model.config.attn_only:
        raise UnsupportedModel("an attention-only model has no neurons: choose 'rotation' or 'weight-noise'")


def _with_mlps(
    model: Transformer, widened: Callable[[dict[str, Tensor]], dict[str, Tensor]], generator: torch.Generator
) -> Transformer:
    """Every MLP's weights by neuron replaced by wider ones, whose neurons are then put in random order."""
    state, width = dict(model.state_dict()), 0
    for layer in range(model.config.n_layers):
        prefix = f"blocks.{layer}.mlp."
        by_neuron = {name: state[prefix + name] for name in (*IN, "b_in", "W_out") if prefix + name in state}
        wider = widened(by_neuron)
        width = wider["W_out"].shape[0]
        order = torch.randperm(width, generator=generator).to(wider["W_out"].device)
        state |= {prefix + name: w[order] if name == "W_out" else w[..., order] for name, w in wider.items()}
    return _rebuilt(model, dataclasses.replace(model.config, d_mlp=width), state)


def _rebuilt(model: Transformer, config: ModelConfig, state: dict[str, Tensor]) -> Transformer:
    """A model of that shape with those weights, on the device, in the precision and in the mode of the given one."""
    rebuilt = Transformer(config).to(model.W_E)
    rebuilt.load_state_dict(state)
    return rebuilt.train(model.training)
