"""Backward passes that depart from the chain rule, for the gradients that attribution methods multiply with.

The forward pass stays the model's own, number for number: at the output y of a norm, an attention softmax or an
activation function, hooks put y + (s - s) in place of y, where the first s has the gradient that the rule wants and
neither y nor the second s has any. Nothing of the model is replaced, so our own model and any bridge will do, and a
place where a rule would not take hold is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuits._layers import ACTIVATIONS
from circuits.discovery.sites import Norm, Sites, norm_of
from circuits.errors import BadInput, UnknownName, UnsupportedModel
from circuits.model import Hook, HookedModel, module_of

SPELLINGS = {"gelu_pytorch_tanh": "gelu_new", "swish": "silu"}
"""Names that ``transformers`` has for activation functions of ours."""


@dataclass(frozen=True)
class GradientRules:
    """What a backward pass does otherwise than the chain rule; each rule by itself, all of them by default off.

    They are an option of the methods that take gradients: ``eap(model, pairs, rules="gim")``, or ``rules="relp"``, or
    rules of one's own. Attribution is as before, (a_u corrupt - a_u clean) . g, but g is not dm/dx:

    * GIM (``GIM``), against the self-repair of attention: a norm's scale is a constant; an attention softmax passes
      g = J(scores / 2)^T dm/dA back, with J the Jacobian of the softmax at temperature 2; the gradients of queries and
      keys are times 1/4, those of values and of both factors of a gated MLP times 1/2, since each is one of several
      factors of a product.
    * RelP (``RELP``), layer-wise relevance propagation: a norm's scale and attention patterns are constants (nothing
      goes back to queries and keys), a gated product passes half to each factor, and an activation function at x has
      the slope act(x) / x.

    ``dataclasses.replace(GIM, freeze_pattern=True)`` and the like combine them.

    Cost: none of its own: as many forwards and backwards as the method without rules.

    Conventions: the forward pass is the model's own, number for number; which end of a path is included is the
        method's. A factor multiplies the gradient, so that 1 is the chain rule.

    Source: Edin et al. 2025, GIM, arXiv 2505.17630 (norms, softmax temperature, factors), and its released code
        (corticph/gim: the factors, and that of gated MLPs); Rezaei Jafari et al. 2025, RelP, arXiv 2508.21258, and its
        released code (FarnoushRJ/RelP: LN-rule, AH-rule, half-rule, identity-rule).

    Fails when: the answer hangs on where a head looks (RelP gives every edge into a query or key zero), or on the very
    scale of a norm, which counts as a constant in both; the scores are no first-order effects then, and their sum is
    not the metric's change.
    """

    freeze_norm: bool = False
    """LN-rule: the scale that a LayerNorm or RMSNorm divides by counts as a constant."""
    freeze_pattern: bool = False
    """AH-rule: attention patterns count as constants, so that edges into queries and keys score zero."""
    softmax_temperature: float = 1.0
    """Attention softmaxes pass gradients back as one at this temperature does, without its factor 1 / temperature."""
    query: float = 1.0
    """Factor on the gradient of every query."""
    key: float = 1.0
    """Factor on the gradient of every key."""
    value: float = 1.0
    """Factor on the gradient of every value."""
    gate: float = 1.0
    """Half-rule: factor on the gradient of both factors of a gated MLP's product."""
    linear_activation: bool = False
    """Identity-rule: an activation function at x passes gradients back with the slope act(x) / x (zero at x = 0)."""

    def __post_init__(self) -> None:
        for name in ("softmax_temperature", "query", "key", "value", "gate"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise BadInput(f"{name} = {value!r}: expected a finite number above 0")
        if self.freeze_pattern and (self.softmax_temperature, self.query, self.key) != (1.0, 1.0, 1.0):
            raise BadInput(
                "freeze_pattern lets no gradient through to queries and keys: expected softmax_temperature, query and "
                "key to be 1 beside it"
            )

    def describe(self) -> str | dict[str, Any]:
        """Return the name of a published set, or the rules that are on."""
        for name, rules in RULES.items():
            if rules == self:
                return name
        plain = GradientRules()
        return {f.name: asdict(self)[f.name] for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)}


GIM = GradientRules(freeze_norm=True, softmax_temperature=2.0, query=0.25, key=0.25, value=0.5, gate=0.5)
"""Gradient interaction modifications: what attention's self-repair hides from the gradient is made to count."""
RELP = GradientRules(freeze_norm=True, freeze_pattern=True, gate=0.5, linear_activation=True)
"""Relevance patching: layer-wise relevance propagation's coefficients in place of gradients."""
RULES: Mapping[str, GradientRules] = {"gim": GIM, "relp": RELP}


def rules_of(rules: GradientRules | str | None) -> GradientRules | None:
    """Return the rules that a method's argument names; None for the chain rule.

    Raises:
        UnknownName: no set of rules has this name.
    """
    if isinstance(rules, str):
        if rules.lower() not in RULES:
            raise UnknownName("set of gradient rules", rules, RULES)
        return RULES[rules.lower()]
    if rules is not None and not isinstance(rules, GradientRules):
        raise BadInput(f"rules = {rules!r}: expected None, GradientRules, or the name of a set: {', '.join(RULES)}")
    return None if rules == GradientRules() else rules


def rules_details(rules: GradientRules | str | None) -> dict[str, Any]:
    """Return the entry of a circuit's details that says which rules it was found under; none for the chain rule."""
    found = rules_of(rules)
    return {} if found is None else {"rules": found.describe()}


def ruled_sites(sites: Sites, rules: GradientRules | None) -> Sites:
    """Return the sites with the norms in front of q, k and v as the rules have them."""
    if rules is None or not rules.freeze_norm:
        return sites
    return replace(sites, layers=tuple(replace(x, norm=replace(x.norm, frozen=True)) for x in sites.layers))


class Rewriting:
    """The hooks of one forward under rules, and whether the backward went the way that they lay."""

    def __init__(self, rules: GradientRules, model: HookedModel, sites: Sites) -> None:
        self.rules, self.model, self.sites = rules, model, sites
        self.known: Mapping[str, Any] = getattr(model, "hook_dict", {})
        self.seen: dict[str, Tensor] = {}
        self.expected: set[str] = set()
        self.reached: set[str] = set()

    @contextmanager
    def attached(self) -> Iterator[tuple[list[Hook], list[Hook]]]:
        """Yield the hooks to attach before and after those that keep activations, with the norms' rules in place.

        A pattern's own gradient is that from beyond the rule; those of q, k and v are what the rule makes of them.

        Raises:
            UnsupportedModel: the model lacks a place that a rule needs, named in the message.
        """
        patterns: list[Hook] = []
        hooks: list[Hook] = []
        gated = bool(getattr(self.model.cfg, "gated_mlp", False))
        for i, layer in enumerate(self.sites.layers):
            patterns += self._pattern(f"blocks.{i}.attn")
            hooks += self._inputs(layer.qkv)
            if layer.mlp_in is not None and (self.rules.linear_activation or (gated and self.rules.gate != 1)):
                hooks += self._mlp(f"blocks.{i}.mlp", gated)
        for name, _ in [*patterns, *hooks]:
            if name not in self.known:
                raise UnsupportedModel(f"{type(self.model).__name__} has no {name}, which the gradient rules need")
        norms = self._norms() if self.rules.freeze_norm else {}
        self.expected |= set(norms)
        with ExitStack() as stack:
            for name, module in norms.items():
                norm = norm_of(self.model, module)
                start, end = f"{name}.hook_in", f"{name}.hook_out"
                if start in self.known and end in self.known:
                    # On a bridge a reader's gradient is taken at the hook inside the norm, so that is where to begin.
                    hooks += [(start, self._remember(start)), (end, self._norm_at_hook(name, norm))]
                else:
                    handle = module.register_forward_hook(self._norm_of_module(name, norm))
                    stack.callback(handle.remove)
            yield patterns, hooks

    def check(self, without_gradient: Iterable[str]) -> None:
        """Check, after the backward of a plain run, that every hook lay on its way and every rule took hold.

        Args:
            without_gradient: Hooks at which a gradient was asked for and none arrived.

        Raises:
            UnsupportedModel: naming the first place where the gradient went another way.
        """
        blind = self.rules.freeze_pattern or self._softmax_share() == 0
        lost = set(without_gradient) - {name for layer in self.sites.layers for name in layer.qkv[:2] if blind}
        for name in sorted((self.expected ^ self.reached) | lost):
            raise UnsupportedModel(
                f"the gradient does not go through {name} of {type(self.model).__name__} as expected: the model "
                f"computes its output another way there than from this hook"
            )

    def _inputs(self, qkv: tuple[str, str, str]) -> list[Hook]:
        factors = (self.rules.query, self.rules.key, self.rules.value)
        frozen = [name for name in qkv[:2] if self.rules.freeze_pattern]
        return [
            (name, self._scaled(name, factor, name in frozen))
            for name, factor in zip(qkv, factors, strict=True)
            if factor != 1 or name in frozen
        ]

    def _pattern(self, attn: str) -> list[Hook]:
        scores, pattern = f"{attn}.hook_attn_scores", f"{attn}.hook_pattern"
        if self.rules.freeze_pattern:
            return [(pattern, _detached)]
        if self.rules.softmax_temperature == 1:
            return []
        self.expected.add(pattern)
        needed: list[Hook] = [(scores, self._remember(scores))] if self._softmax_share() < 1 else []
        return [*needed, (pattern, self._softmax(scores, pattern))]

    def _mlp(self, mlp: str, gated: bool) -> list[Hook]:
        names = [f"{mlp}.hook_pre", f"{mlp}.hook_pre_linear"][: 1 + gated]
        name = str(getattr(self.model.cfg, "act_fn", None))
        act = ACTIVATIONS.get(SPELLINGS.get(name, name))
        if act is None:
            raise UnsupportedModel(f"activation function {name!r}: the gradient rules know {', '.join(ACTIVATIONS)}")
        self.expected.add(f"{mlp}.hook_post")
        hooks: list[Hook] = [(n, self._remember(n)) for n in names]
        return [*hooks, (f"{mlp}.hook_post", self._activation(mlp, names, act))]

    def _norms(self) -> dict[str, torch.nn.Module]:
        names = ["ln_final"]
        for i, layer in enumerate(self.sites.layers):
            alone = layer.mlp_in is None or layer.shares_norm
            names += [f"blocks.{i}.ln1"] if alone else [f"blocks.{i}.ln1", f"blocks.{i}.ln2"]
        found = {name: module_of(self.model, name) for name in names}
        ruled = {id(part) for module in found.values() for part in module.modules()}
        for name, module in getattr(self.model, "named_modules", lambda: [])():
            if "norm" in type(module).__name__.lower() and id(module) not in ruled:
                raise UnsupportedModel(
                    f"{name} is a {type(module).__name__} beside the norms in front of attention, MLP and logits: the "
                    f"rule of constant scales does not reach it"
                )
        return {name: module for name, module in found.items() if not isinstance(module, torch.nn.Identity)}

    def _watched(self, name: str, slope: Tensor) -> Tensor:
        """The same, with a note when a gradient arrives."""
        if slope.requires_grad:
            slope.register_hook(lambda gradient: self._note(name))
        return slope

    def _note(self, name: str) -> None:
        self.reached.add(name)

    def _norm_at_hook(self, name: str, norm: Norm) -> Callable[..., Tensor]:
        def hook(y: Tensor, *, hook: Any) -> Tensor:
            return self._frozen_norm(name, norm, self.seen[f"{name}.hook_in"], y)

        return hook

    def _norm_of_module(self, name: str, norm: Norm) -> Callable[..., Tensor]:
        def hook(module: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
            return self._frozen_norm(name, norm, inputs[0], y)

        return hook

    def _frozen_norm(self, name: str, norm: Norm, x: Tensor, y: Tensor) -> Tensor:
        self._note(name)
        _same(name, y, norm(x[:1].detach()), "the norm that its config and weights say")
        with torch.no_grad():
            _, inverse = norm.standardise(x)
        centred = x - x.mean(-1, keepdim=True) if norm.kind == "LN" else x
        scaled = centred * inverse
        return _instead(y, scaled if norm.weight is None else scaled * norm.weight)

    def _scaled(self, name: str, factor: float, frozen: bool) -> Callable[..., Tensor]:
        def hook(tensor: Tensor, *, hook: Any) -> Tensor:
            passed = tensor.view_as(tensor)
            # Nothing is to come back from a frozen pattern; that something does is what ``check`` looks for.
            passed.register_hook(lambda gradient: self._note(name) if frozen else factor * gradient)
            return passed

        return hook

    def _remember(self, name: str) -> Callable[..., None]:
        def hook(tensor: Tensor, *, hook: Any) -> None:
            self.seen[name] = tensor

        return hook

    def _softmax(self, scores: str, pattern: str) -> Callable[..., Tensor]:
        """Have the softmax's own Jacobian J(s), for s = softmax(x), pass on what J at the temperature would.

        With t = softmax(x / T), proportional to s to the power 1 / T, a gradient g is to become t (g - t . g); as
        J(s) v = s v - s (s . v), and t (g - t . g) adds up to zero, that is J(s) v for v = t (g - t . g) / s.
        """
        temperature, share = self.rules.softmax_temperature, self._softmax_share()

        def hook(y: Tensor, *, hook: Any) -> Tensor:
            s = y.detach() if share == 1 else self.seen[scores].detach().softmax(-1)
            _same(pattern, s.sum(-1), torch.ones_like(s[:1].sum(-1)), "a softmax, whose rows add up to one")
            t = s.pow(1 / temperature)
            t = t / t.sum(-1, keepdim=True)
            ratio = torch.where(s > 0, t / s, 0)
            passed = y.view_as(y)

            def ruled(g: Tensor) -> Tensor:
                self._note(pattern)
                return ratio * (g - (t * g).sum(-1, keepdim=True))

            passed.register_hook(ruled)
            return passed

        return hook

    def _softmax_share(self) -> float:
        """How much of the pattern is a softmax: all of it, but for models of ours that mix in uniform weights."""
        return float(getattr(getattr(self.model, "config", None), "softmax_share", 1.0))

    def _activation(
        self, mlp: str, names: list[str], act: Callable[[Tensor], Tensor]
    ) -> Callable[..., Float[Tensor, "batch pos d_mlp"]]:
        def hook(y: Tensor, *, hook: Any) -> Tensor:
            name = f"{mlp}.hook_post"
            x, out = self.seen[names[0]], act(self.seen[names[0]])
            if self.rules.linear_activation:
                with torch.no_grad():
                    slope = torch.where(x == 0, 0, out / x)
                out = x * slope
            if len(names) == 2:
                out = out * self.seen[names[1]]
                rest = (y - out)[:1].detach()
                # A gated MLP may add a bias to its product: the same for every position.
                _same(name, y[:1].detach() - rest.mean((0, 1)), out[:1].detach(), "the product of gate and input")
                out = self.rules.gate * out
            else:
                _same(name, y, out[:1].detach(), f"the activation function of {names[0]}")
            return _instead(y, self._watched(name, out))

        return hook


def _instead(y: Tensor, slope: Tensor) -> Tensor:
    """The value of ``y`` with the gradient of ``slope``."""
    return y.detach() + (slope - slope.detach()).to(y.dtype)


def _detached(tensor: Tensor, *, hook: Any) -> Tensor:
    return tensor.detach()


def _same(name: str, y: Tensor, expected: Tensor, what: str) -> None:
    """Check on the first example that a rule is made for what the model does."""
    got = y[:1].detach()
    if got.shape != expected.shape:
        raise UnsupportedModel(f"{name} gives shape {tuple(got.shape)}: expected {tuple(expected.shape)}, {what}")
    wide = torch.promote_types(got.dtype, torch.float32)
    error, size = (got.to(wide) - expected.to(wide)).norm(), got.to(wide).norm()
    tolerance = 1e-3 if got.dtype in (torch.float32, torch.float64) else 3e-2
    if torch.isfinite(error) and error > tolerance * size + 1e-6:
        raise UnsupportedModel(
            f"{name} is not {what} (off by {float(error / size):.1e} of its norm): the gradient rules are not defined "
            f"for such a model"
        )
