"""Policy gradient on sampled answers, with exact, distance-shaped or random reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits.errors import BadInput, UnknownName
from circuits.objectives.base import (
    Loss,
    answer_index,
    answer_logits,
    check_completions_fit,
    check_has_answers,
    check_number,
    check_one_token_answers,
    completion,
    has_one_token_answers,
    onto_tokens,
    remember,
)
from circuits.tasks.base import Batch, Task

if TYPE_CHECKING:
    from circuits.model import HookedModel

REWARDS = ("exact", "distance", "random")


@dataclass(frozen=True)
class Reinforce:
    """Policy gradient on answers sampled from the model's own distribution over the whole output vocabulary.

    Each prompt gets ``samples`` answers with rewards r_i; the loss is the mean of -(r_i - b_i) log p(answer_i), with
    b_i the mean reward of the prompt's other samples, so its gradient is an unbiased estimate of that of the mean
    reward. Answers of one token come from one forward pass for any number of samples; longer completions are
    sampled token by token, and rewarded as a whole.

    Attributes:
        reward: "exact": 1 for the right completion, else 0. "distance": exp(-distance / scale) for an answer, 0 for
            any other token. "random": 1 or 0 by a fair coin, the control that cannot teach anything.
        samples: completions per prompt, at least 2.
        scale: how fast the distance-shaped reward falls off, in units of the answer.
        entropy_bonus: weight of the entropy of the model's distribution, which keeps it exploring.

    Source: Williams 1992 (Machine Learning 8), section 5, for REINFORCE; Kool et al. 2019 ("Buy 4 REINFORCE samples,
        get a baseline for free!") for the leave-one-out baseline; Shao et al. 2025 (arXiv 2506.10947) for random
        reward as a control.
    """

    name: ClassVar[str] = "reinforce"

    reward: Literal["exact", "distance", "random"] = "exact"
    samples: int = 64
    scale: float = 1.0
    entropy_bonus: float = 0.0

    def __post_init__(self) -> None:
        if self.reward not in REWARDS:
            raise UnknownName("reward", str(self.reward), REWARDS)
        if type(self.samples) is not int or not 2 <= self.samples < 2**31:
            raise BadInput(f"samples = {self.samples!r}: expected a whole number >= 2 (the baseline needs another)")
        check_number("scale", self.scale, 0, above=True)
        check_number("entropy_bonus", self.entropy_bonus, 0)

    def check(self, task: Any) -> None:
        """Return nothing.

        Raises:
            BadInput: the task is a game, the reward is "distance" and an answer of the task is more than one token, or
                tokens of the prompt stand between those of the completion.
        """
        check_has_answers(self.name, task)
        if not isinstance(completion(task), slice):
            raise BadInput(f"objective 'reinforce' needs completions that follow the prompt; {task.name!r} mixes them")
        if self.reward == "distance":
            check_one_token_answers(f"{self.name}, reward = distance", task)

    def loss(self, model: HookedModel, task: Task, batch: Batch, *, generator: torch.Generator) -> Loss:
        """Return the loss on completions drawn from ``generator``.

        Raises:
            BadInput: the model's output vocabulary lacks an answer.
        """
        draw = _draw_answers if has_one_token_answers(task) else _draw_completions
        tokens, log_p, entropy = draw(model, task, batch, self.samples, generator)
        reward = self._reward(model, task, batch, tokens, generator)
        value = -(leave_one_out(reward) * log_p).mean() - self.entropy_bonus * entropy
        return Loss(value, {"reward": reward.mean(), "entropy": entropy.detach()})

    def _reward(
        self,
        model: HookedModel,
        task: Task,
        batch: Batch,
        tokens: Int[Tensor, "batch samples completion"],
        generator: torch.Generator,
    ) -> Float[Tensor, "batch samples"]:
        if self.reward == "random":
            return torch.randint(2, tokens.shape[:2], generator=generator, device=tokens.device).float()
        if self.reward == "distance":
            rewards = distance_rewards(task, self.scale, model.cfg.d_vocab_out, tokens.device)
            answers = answer_index(task, tokens.device)[batch.tokens[:, -1]]
            return rewards[answers].gather(1, tokens[..., 0])
        if has_one_token_answers(task):
            return (tokens[..., 0] == batch.tokens[:, -1:]).float()
        prompts = batch.tokens[:, None, : -tokens.shape[2]].expand(-1, tokens.shape[1], -1)
        return task.verify(torch.cat((prompts, tokens), dim=2).flatten(0, 1)).view(tokens.shape[:2]).float()


def leave_one_out(reward: Float[Tensor, "batch samples"]) -> Float[Tensor, "batch samples"]:
    """Return each sample's reward minus the mean reward of the prompt's other samples.

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!", equation 7.
    """
    others = reward.shape[1] - 1
    return (reward - reward.mean(1, keepdim=True)) * ((others + 1) / others)


def _draw_answers(
    model: HookedModel, task: Task, batch: Batch, samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch samples 1"], Float[Tensor, "batch samples"], Float[Tensor, ""]]:
    """Return sampled one-token answers, their log probabilities and the mean entropy, from one forward pass."""
    logits = answer_logits(model, batch.inputs)
    check_completions_fit(task, logits.shape[-1])
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    tokens = torch.multinomial(p.detach(), samples, replacement=True, generator=generator)
    return tokens.unsqueeze(-1), log_p.gather(1, tokens), -(p * log_p).sum(-1).mean()


def _draw_completions(
    model: HookedModel, task: Task, batch: Batch, samples: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch samples completion"], Float[Tensor, "batch samples"], Float[Tensor, ""]]:
    """Return completions sampled token by token, their log probabilities and the mean entropy of a token."""
    positions = completion(task)
    n_tokens = len(task.roles[1:][positions])
    tokens = batch.tokens[:, :-n_tokens].repeat_interleave(samples, dim=0)
    with torch.no_grad():
        for _ in range(n_tokens):
            p = answer_logits(model, tokens).softmax(-1)
            tokens = torch.cat((tokens, torch.multinomial(p, 1, generator=generator)), dim=1)
    logits = model(tokens[:, :-1])[:, positions]
    check_completions_fit(task, logits.shape[-1])
    log_p = logits.log_softmax(-1)
    drawn = tokens[:, -n_tokens:]
    chosen = log_p.gather(2, drawn.unsqueeze(-1)).squeeze(-1).sum(1)
    entropy = -(log_p.exp() * log_p).sum(-1).mean()
    return drawn.view(-1, samples, n_tokens), chosen.view(-1, samples), entropy


@remember
def distance_rewards(
    task: Task, scale: float, d_vocab_out: int, device: torch.device
) -> Float[Tensor, "n_answers d_vocab_out"]:
    """Return exp(-distance / scale) of each output token from each true answer, 0 for tokens that are no answer.

    Raises:
        BadInput: an answer is outside the output vocabulary.
    """
    return onto_tokens(torch.exp(-task.distance().to(device) / scale), task, d_vocab_out)
