"""Does a network continue prefixes of one state alike, and of different states differently?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuits.errors import BadInput
from circuits.model import HookedModel
from circuits.tasks.arithmetic.operand_square import check_integer
from circuits.tasks.games import Game
from circuits.tasks.games.automaton import NOWHERE, Automaton, rows_of
from circuits.worldmodels.activations import check_fits, last_probabilities, mean_interval, next_probabilities, top_sets
from circuits.worldmodels.boundary import boundary, minimal_classes, table_of
from circuits.worldmodels.prefixes import Prefixes, distinct, sample_prefixes
from circuits.worldmodels.reading import NAN, Curve, Reading

RULES = ("epsilon", "share", "top")
DEPTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Acceptance:
    """When a network takes a token for possible.

    ``epsilon``: its probability is above ``threshold``; ``share``: above ``threshold`` over the number of legal tokens;
    ``top``: it is among as many most probable ones as there are legal tokens (no threshold).
    """

    rule: str = "share"
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise BadInput(f"rule = {self.rule!r}: expected one of {', '.join(RULES)}")
        if not 0 <= self.threshold < 1:
            raise BadInput(f"threshold = {self.threshold}: expected a probability")

    def __call__(
        self, probabilities: Float[Tensor, "*batch d_vocab"], sizes: Int[Tensor, "*batch"]
    ) -> Bool[Tensor, "*batch d_vocab"]:
        """Return the tokens that are taken for possible, where ``sizes`` are the numbers of legal ones."""
        if self.rule == "top":
            return top_sets(probabilities, sizes)
        if self.rule == "share":
            return probabilities > self.threshold / sizes[..., None].clamp_min(1)
        return probabilities > self.threshold


def myhill_nerode(
    model: HookedModel,
    game: Game,
    *,
    acceptance: Acceptance | None = None,
    pairs: int = 48,
    samples: int = 8,
    depth: int = 5,
    seed: int = 0,
) -> Reading:
    """Return the compression of a network, and how it tells states apart, against the exact boundary of the game.

    ``value`` is compression: of pairs of prefixes of one Myhill-Nerode class, the share in which every continuation
    that the network draws after the one (``samples`` of them, to the end) is possible after the other, by the network.
    ``details`` has the softer ``overlap`` (Jaccard index of what is possible next along them), and
    ``distinction_recall`` and ``distinction_precision`` over pairs of different classes; curves have all of them by
    depth.

    Formula: compression at k = mean over pairs of 1[all sampled continuations of k tokens after h1 are accepted after
        h2]; recall = share of the boundary MNB(q1, q2) that the network accepts after h1 and not after h2; precision =
        share of the continuations accepted after h1 and rejected at their last token after h2 that are legal after q1
        and not after q2, 1 where there are none; both in the mean over pairs. Of a boundary of more than 32 strings
        as many are drawn.

    Args:
        model: any hooked model that reads the game's tokens.
        game: one whose states can be listed.
        acceptance: when a token is taken for possible; None: above half of an even split among the legal tokens. As
            published it is ``Acceptance("epsilon", 0.01)``, by which an untrained network, to which everything is
            possible, compresses perfectly.
        pairs: pairs of prefixes of each kind.
        samples: continuations of each pair.
        depth: tokens of the longest continuation that tells states apart.
        seed: of prefixes and continuations.

    Raises:
        BadInput: the model does not fit the game, or the game has too many states.
        UnsupportedModel: the model is not causal.

    Source: Vafa et al. 2024 (arXiv 2406.03689), definitions 2.3 to 2.5; that the boundary is exact, by search of the
        product of the minimal automaton with itself, is ours.
    Fails when: a network takes everything for possible, as an untrained one does under a low threshold, or where most
        tokens are
        legal: then it compresses whatever it knows, and ``distinction_recall`` is low. One token just above the
        threshold spoils a continuation: look at the curve in depth and at ``overlap``. States that differ in nothing
        legal ever (in nim: whose turn it is) are one state to it.
    """
    check_fits(model, game)
    for name, value in (("pairs", pairs), ("samples", samples), ("depth", depth)):
        check_integer(name, value, 1, 10**5)
    accept = acceptance or Acceptance()
    pool = distinct(sample_prefixes(game, 1000, seed=seed, length=max(1, game.n_ctx // 2)))
    depth = min(depth, game.n_ctx - int(pool.lengths.max()) if len(pool) else 0)
    if depth < 1:
        return Reading("myhill-nerode", NAN, note="no token of the context is left to continue with")
    generator = torch.Generator().manual_seed(seed)
    rows = rows_of(game, pool.states)
    same, different = _pairs(pool, rows, minimal_classes(game), pairs, generator)
    alike, overlaps, depths = _compression(model, game, accept, pool, rows, same, samples, generator)
    recall = _recall(model, game, accept, pool, rows, different, depth, generator)
    precision = _precision(model, game, accept, pool, rows, different, samples, depth, generator)
    compressed = [float(row[-1]) for row in alike]
    return Reading(
        "myhill-nerode",
        _mean(compressed),
        mean_interval(compressed),
        details={
            "overlap": _mean(overlaps),
            "distinction_recall": recall[-1],
            "distinction_precision": precision[-1],
            "pairs": float(len(same[0])),
        },
        curves={
            "compression": Curve("continuation (tokens)", "share of pairs", depths, tuple(alike.mean(0).tolist())),
            "distinction recall": Curve("continuation (tokens)", "share", tuple(range(1, depth + 1)), recall),
            "distinction precision": Curve("continuation (tokens)", "share", tuple(range(1, depth + 1)), precision),
        },
        source="arXiv 2406.03689, definitions 2.3 to 2.5",
    )


def _pairs(
    pool: Prefixes, rows: Tensor, classes: object, n: int, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Pairs of prefixes of the same class, and of different classes, every class as likely as any."""
    known = torch.as_tensor(classes)[rows]
    order = torch.randperm(len(known), generator=generator)
    # Sorted by class in random order within: neighbours are pairs of one class.
    order = order[known[order].argsort(stable=True)]
    together = (known[order[1:]] == known[order[:-1]]).nonzero()[:, 0]
    of_class = known[order[together]]
    weights = 1 / torch.bincount(of_class)[of_class].double()
    n_same = min(n, len(together))
    chosen = together[torch.multinomial(weights, n_same, generator=generator)] if n_same else together
    first = torch.randint(len(known), (4 * n,), generator=generator)
    second = torch.randint(len(known), (4 * n,), generator=generator)
    apart = (known[first] != known[second]).nonzero()[:n, 0]
    return (order[chosen], order[chosen + 1]), (first[apart], second[apart])


def _continue(
    model: HookedModel,
    game: Game,
    accept: Acceptance,
    pool: Prefixes,
    rows: Tensor,
    starts: Tensor,
    length: int,
    generator: torch.Generator,
) -> Int[Tensor, "m length"]:
    """Continuations that the network draws after some prefixes among the tokens that it takes for possible."""
    table = table_of(game)
    lengths, at = pool.lengths[starts], rows[starts]
    tokens = _with_room(pool, starts, length)
    each = torch.arange(len(starts))
    drawn = []
    for step in range(length):
        probabilities = last_probabilities(model, tokens, lengths + step, game)
        sizes = _number_legal(table, at)
        possible = accept(probabilities, sizes)
        weights = torch.where(possible, probabilities, 0.0)
        # Where nothing is taken for possible, the network draws as it would without a threshold.
        weights[~possible.any(1)] = probabilities[~possible.any(1)]
        token = torch.multinomial(weights, 1, generator=generator)[:, 0]
        tokens[each, lengths + step] = token
        drawn.append(token)
        at = _after(table, at, token)
    return torch.stack(drawn, 1)


def _with_room(pool: Prefixes, starts: Tensor, length: int) -> Int[Tensor, "m room"]:
    """The tokens of some prefixes, with room for so many more behind each."""
    whole = pool.tokens[starts]
    tokens = whole.new_zeros(len(starts), int(pool.lengths[starts].max()) + length)
    width = min(tokens.shape[1], whole.shape[1])
    tokens[:, :width] = whole[:, :width]
    return tokens


def _number_legal(table: Automaton, at: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
    """How many tokens are legal in some states; after an illegal token the half of all, since there is no state."""
    return torch.where(at == NOWHERE, max(1, table.legal.shape[1] // 2), table.legal[at.clamp_min(0)].sum(1))


def _after(table: Automaton, at: Int[Tensor, " m"], token: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
    """The rows of the states behind one more token; what is nowhere stays there."""
    return torch.where(at == NOWHERE, NOWHERE, table.successors[at.clamp_min(0), token])


def _accepted(
    model: HookedModel,
    game: Game,
    accept: Acceptance,
    pool: Prefixes,
    rows: Tensor,
    starts: Tensor,
    strings: Int[Tensor, "m length"],
) -> tuple[Bool[Tensor, "m length"], Bool[Tensor, "m length d_vocab"]]:
    """Which tokens of continuations the network takes for possible after some prefixes, and all that it does there."""
    table = table_of(game)
    lengths, at = pool.lengths[starts], rows[starts]
    length = strings.shape[1]
    tokens = _with_room(pool, starts, length)
    tokens.scatter_(1, lengths[:, None] + torch.arange(length), strings)
    probabilities = next_probabilities(model, tokens, game)
    where = (lengths - 1)[:, None] + torch.arange(length)
    sizes = []
    for token in strings.unbind(1):
        sizes.append(_number_legal(table, at))
        at = _after(table, at, token)
    possible = accept(probabilities[torch.arange(len(starts))[:, None], where], torch.stack(sizes, 1))
    # A game that is over only waits: what the network makes of that is not asked.
    return possible.gather(2, strings[..., None])[..., 0] | _waits(game, strings), possible


def _waits(game: Game, strings: Int[Tensor, "m length"]) -> Bool[Tensor, "m length"]:
    """Which tokens of continuations come after ``end``."""
    ended = (strings == game.n_actions).long() if game.n_actions < game.d_vocab else torch.zeros_like(strings)
    return ended.cumsum(1) - ended > 0


def _compression(
    model: HookedModel,
    game: Game,
    accept: Acceptance,
    pool: Prefixes,
    rows: Tensor,
    pairs: tuple[Tensor, Tensor],
    samples: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "pairs depths"], list[float], tuple[float, ...]]:
    """Whether all continuations of the one are possible after the other, by depth; and the overlap of each pair."""
    longest = game.n_ctx - int(pool.lengths.max())
    depths = (*(d for d in DEPTHS if d < longest), longest)
    first, second = (side.repeat_interleave(samples) for side in pairs)
    if not len(first):
        return torch.zeros(0, len(depths)), [], tuple(map(float, depths))
    strings = _continue(model, game, accept, pool, rows, first, longest, generator)
    fine, theirs = _accepted(model, game, accept, pool, rows, second, strings)
    _, own = _accepted(model, game, accept, pool, rows, first, strings)
    whole = fine.long().cumprod(1)[:, [d - 1 for d in depths]]
    alike = whole.view(-1, samples, len(depths)).amin(1).float()
    # Where they have parted ways, what is possible next is no longer asked of the same state.
    until = torch.cat((torch.ones_like(fine[:, :1]), fine[:, :-1].long().cumprod(1).bool()), 1)
    until = until & ~_waits(game, strings)
    jaccard = (own & theirs).sum(2) / (own | theirs).sum(2).clamp_min(1)
    overlaps = (jaccard * until).sum(1) / until.sum(1)
    return alike, overlaps.view(-1, samples).mean(1).tolist(), tuple(map(float, depths))


def _recall(
    model: HookedModel,
    game: Game,
    accept: Acceptance,
    pool: Prefixes,
    rows: Tensor,
    pairs: tuple[Tensor, Tensor],
    depth: int,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """Share of the boundary that the network accepts after the one prefix and not after the other, by depth."""
    first, second, strings, lengths, pair = [], [], [], [], []
    for number, (a, b) in enumerate(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True)):
        found, ends = boundary(game, int(rows[a]), int(rows[b]), depth)
        some = torch.randperm(len(found), generator=generator)[:32]
        strings.append(found[some])
        lengths.append(ends[some])
        first += [a] * len(some)
        second += [b] * len(some)
        pair += [number] * len(some)
    if not first:
        return (NAN,) * depth
    all_strings, all_lengths = torch.cat(strings), torch.cat(lengths)
    inside = torch.arange(depth) < all_lengths[:, None]
    after = [
        (_accepted(model, game, accept, pool, rows, torch.tensor(side), all_strings)[0] | ~inside).all(1)
        for side in (first, second)
    ]
    right, of = (after[0] & ~after[1]).float(), torch.tensor(pair)
    scores = []
    for k in range(1, depth + 1):
        short = all_lengths <= k
        share, known = _by_pair(right[short], of[short], len(pairs[0]))
        scores.append(_mean(share[known].tolist()))
    return tuple(scores)


def _by_pair(
    values: Float[Tensor, " m"], of: Int[Tensor, " m"], n: int
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """The mean of the values of each of n pairs, and which pairs have any."""
    count = torch.bincount(of, minlength=n)
    return torch.zeros(n).index_add_(0, of, values) / count.clamp_min(1), count > 0


def _precision(
    model: HookedModel,
    game: Game,
    accept: Acceptance,
    pool: Prefixes,
    rows: Tensor,
    pairs: tuple[Tensor, Tensor],
    samples: int,
    depth: int,
    generator: torch.Generator,
) -> tuple[float, ...]:
    """Share of the network's own boundary that is in the language of the one state and not of the other, by depth."""
    first, second = (side.repeat_interleave(samples) for side in pairs)
    if not len(first):
        return (NAN,) * depth
    strings = _continue(model, game, accept, pool, rows, first, depth, generator)
    fine, _ = _accepted(model, game, accept, pool, rows, second, strings)
    closes = ~fine & (fine.long().cumprod(1).sum(1)[:, None] == torch.arange(depth))  # the first that is rejected
    legal = [_legal_until(game, rows[side], strings) for side in (first, second)]
    scores = []
    for k in range(1, depth + 1):
        which = closes[:, :k].any(1)
        end = closes.long().argmax(1)[which]
        at = (torch.arange(len(fine))[which], end)
        right = legal[0][at] & ~legal[1][at]
        of = torch.arange(len(fine))[which] // samples
        share, bordered = _by_pair(right.float(), of, len(pairs[0]))
        # a pair that the network tells apart by nothing has no wrong border either
        scores.append(float(torch.where(bordered, share, 1.0).mean()))
    return tuple(scores)


def _legal_until(game: Game, at: Tensor, strings: Int[Tensor, "m length"]) -> Bool[Tensor, "m length"]:
    """Whether continuations are legal up to each of their tokens."""
    table = table_of(game)
    alive = []
    for token in strings.unbind(1):
        at = _after(table, at, token)
        alive.append(at != NOWHERE)
    return torch.stack(alive, 1)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else NAN
