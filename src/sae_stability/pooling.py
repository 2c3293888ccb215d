"""One SAE out of many seeds (C9): the features of all of them, each kind once.

Features of several SAEs are grouped into *stars* (`matching.families`), of which each SAE has one member at most. A star gives one
feature, its medoid or the mean of its members; those met in most SAEs come first, and of these the strongest. A pool takes all
stars (`union`), those that a share of the SAEs have (`consensus`), or as many as one SAE has features (`width`). No two of its
directions reach the threshold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sae_stability.errors import UserError
from sae_stability.matching import families
from sae_stability.matching.pairs import CHUNK, ROUNDING, reaches
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.parameters import Parameters
from sae_stability.saes.sae import SAE

Kind = Literal["union", "consensus", "width"]
Representative = Literal["mean", "medoid"]
QUORUM = 0.5
"""Share of the SAEs that have to have a feature of a consensus."""
L0_WITHIN = 0.002
"""How near, as a share, the L0 of a pool is brought to that of its SAEs."""
TRIALS = 40
"""Most offsets that are tried for it."""
ROWS = 4096  # tokens encoded at a time
SHARED = ("b_dec", "threshold")  # weights that all features of an SAE have in common
HOMOGENEOUS = {"relu": (), "gated": ("b_mag",), "jumprelu": ()}
"""Variants in which a direction's length can move into its code, with what goes along beside the encoder's weights."""


@dataclass(frozen=True)
class Measured:
    """What the features of an SAE do on some activations."""

    firings: Int[Tensor, "d_sae"]
    energy: Float[Tensor, "d_sae"]
    """The mean over tokens of the squared length of what a feature adds."""
    l0: float


@dataclass(frozen=True)
class Stars:
    """Groups of features, at most one of each SAE, in the order in which pools take them."""

    members: Int[np.ndarray, "star sae"]
    """The feature of each SAE; -1 where it has none."""
    medoid: Int[np.ndarray, "star"]
    """The position of the SAE that the medoid is of."""
    energy: Float[np.ndarray, "star"]
    """The mean energy of the members; 0 where no activations were given."""

    def __len__(self) -> int:
        return len(self.members)

    @property
    def size(self) -> Int[np.ndarray, "star"]:
        """In how many SAEs each is met."""
        return (self.members >= 0).sum(1)

    @property
    def stability(self) -> Float[np.ndarray, "star"]:
        """In which share of the other SAEs a medoid comes back."""
        return (self.size - 1) / (self.members.shape[1] - 1)

    def take(self, chosen: Int[np.ndarray, "chosen"] | Bool[np.ndarray, "star"]) -> "Stars":
        return Stars(self.members[chosen], self.medoid[chosen], self.energy[chosen])

    def pick(self, kind: Kind, quorum: float, width: int) -> "Stars":
        """Those that a pool takes: all, those of at least a share of the SAEs, or as many as `width` says."""
        if kind == "consensus":
            return self.take(self.size >= quorum * self.members.shape[1] - ROUNDING)
        return self.take(np.arange(len(self))[: width if kind == "width" else None])

    def metadata(self) -> dict:
        """What a file says of each feature: its stability, and its star's members and medoid by the positions of their SAEs."""
        members = [{str(sae): int(feature) for sae, feature in enumerate(star) if feature >= 0} for star in self.members]
        return {"stability": self.stability.tolist(), "medoid": self.medoid.tolist(), "members": members}


@dataclass(frozen=True)
class Pool:
    """An SAE, and the star that each of its features is of."""

    sae: SAE
    stars: Stars


def pool(
    saes: Sequence[SAE],
    activations: Float[Tensor, "token d_in"] | None = None,
    kind: Kind = "width",
    threshold: float = 0.7,
    representative: Representative = "mean",
    quorum: float = QUORUM,
) -> Pool:
    """One SAE out of several of the same training.

    On `activations`, raw and held out, features that never fire are left out, energies are measured, and the pool is brought to the
    mean L0 of its SAEs. Without them directions alone are pooled, and the result does not encode.

    Raises `UserError` for a single SAE, for different d_in, variants or k, for SAEs that can't encode where there are activations,
    for a quorum that no feature meets, and for an L0 that can't be reached.
    """
    check(saes, activations is not None)
    if not 0 < threshold <= 1:
        raise UserError(f"threshold: {threshold:g} is no cosine between 0 and 1; give one such as 0.7")
    if activations is not None and activations.shape[1] != saes[0].directions.shape[1]:
        d_in = (activations.shape[1], saes[0].directions.shape[1])
        raise UserError(f"activations: d_in {d_in[0]}, and the SAEs have {d_in[1]}; give those of their site")
    saes = [_unit(sae) for sae in saes]
    measured = None
    if activations is not None:
        measured = [measure(sae, activations) for sae in tqdm(saes, "what fires", unit="SAE", disable=None)]
    width, found = round(np.mean([len(sae.directions) for sae in saes])), stars(saes, measured, threshold)
    if kind == "consensus":  # which are the first: others need not be compared
        found = found.pick(kind, quorum, width)
    found = unlike(found, saes, threshold, representative, width if kind == "width" else None).pick(kind, quorum, width)
    if not len(found) and kind != "consensus":
        raise UserError("activations: no feature of any SAE fires on them; give those of the site that the SAEs are of")
    if not len(found):
        raise UserError(f"quorum: no feature is met in {quorum:.0%} of the SAEs; lower it, or pool another kind")
    if activations is None or measured is None:
        directions = represent(found, _unit_rows(saes), representative)
        zero = torch.zeros(())
        nothing = (zero.expand_as(directions), zero.expand(len(directions)))
        return Pool(SAE(None, None, Parameters(*nothing, F.normalize(directions, dim=1), torch.zeros(directions.shape[1]))), found)
    joined = assembled(saes, found, representative)
    return Pool(calibrated(joined, activations, float(np.mean([of_sae.l0 for of_sae in measured]))), found)


def memory(saes: Sequence[SAE], activations: Float[Tensor, "token d_in"] | None = None) -> int:
    """About how many bytes `pool` will take: the SAEs, copies of their directions, and of the weights that are averaged."""
    directions = len(saes) * max(len(sae.directions) for sae in saes) * saes[0].directions.shape[1]
    copies = 3 if activations is None else 5
    return 4 * (copies * directions + (0 if activations is None else activations.numel()))


def summary(pooled: Pool, activations: Float[Tensor, "token d_in"] | None) -> str:
    """What came out, in a line."""
    everywhere = (pooled.stars.stability == 1).mean()
    told = f"{len(pooled.stars):,} features, {everywhere:.0%} of which all SAEs have"
    return told if activations is None else f"{told}; L0 {measure(pooled.sae, activations).l0:.1f}"


def measure(sae: SAE, activations: Float[Tensor, "token d_in"]) -> Measured:
    """How often and how strongly each feature fires."""
    firings, squares = torch.zeros(len(sae.directions), dtype=torch.int64), torch.zeros(len(sae.directions), dtype=torch.float64)
    for x in activations.split(ROWS):
        codes = sae.codes(x)
        firings += torch.bincount(codes.fired(), minlength=len(firings))
        squares.index_add_(0, codes.features, codes.values.double().square())
    energy = squares / len(activations) * sae.directions.double().square().sum(1)
    return Measured(firings, energy, float(firings.sum() / len(activations)))


def stars(saes: Sequence[SAE], measured: Sequence[Measured] | None, threshold: float = 0.7) -> Stars:
    """The stars of the features that fire: those met in most SAEs first, and of these the strongest.

    Memory is that of `matching.families` and two copies of the directions.
    """
    directions = _unit_rows(saes)
    alive, energy = directions.norm(dim=2) > 0, torch.zeros(directions.shape[:2], dtype=torch.float64)
    if measured is not None:
        alive &= _padded([of_sae.firings for of_sae in measured]) > 0
        energy = _padded([of_sae.energy for of_sae in measured])
    grouped = families(directions, threshold, alive)
    members = np.full((len(grouped.size), len(saes)), -1)
    position, feature = np.nonzero(grouped.family >= 0)
    members[grouped.family[position, feature], position] = feature
    found = Stars(members, grouped.medoid[:, 0], np.zeros(len(members)))
    found = replace(found, energy=represent(found, energy, "mean").numpy())
    return found.take(np.lexsort((-found.energy, -found.size)))


def unlike(found: Stars, saes: Sequence[SAE], threshold: float, representative: Representative, enough: int | None = None) -> Stars:
    """The stars without those whose representative reaches the threshold with that of one before them that stays.

    Once `enough` have been found to stay, the rest is left out.
    """
    return found.take(distinct(represent(found, _unit_rows(saes), representative), threshold, enough))


def represent(found: Stars, rows: Float[Tensor, "sae d_sae *any"], representative: Representative) -> Float[Tensor, "star *any"]:
    """What stars have of a quantity that features have: the mean over their members, or that of their medoid."""
    members = torch.from_numpy(found.members)
    if representative == "medoid":
        medoid = torch.from_numpy(found.medoid)
        return rows[medoid, members.gather(1, medoid[:, None])[:, 0]]
    total = torch.zeros(len(members), *rows.shape[2:], dtype=rows.dtype)
    for of_sae, feature in zip(rows, members.T, strict=True):  # one SAE at a time: a copy of all is several times their memory
        total[feature >= 0] += of_sae[feature[feature >= 0]]
    return total / (members >= 0).sum(1).view(-1, *[1] * (total.dim() - 1))


def distinct(rows: Float[Tensor, "row d_in"], threshold: float, enough: int | None = None) -> Bool[np.ndarray, "row"]:
    """The rows whose cosine with each such row before them lies below the threshold: all of them, or those of the first blocks of
    rows that have `enough`."""
    directions, kept = F.normalize(rows, dim=1), torch.zeros(len(rows), dtype=torch.bool)
    for start in range(0, len(rows), CHUNK):
        if enough is not None and kept.sum() >= enough:
            break
        block, before = directions[start : start + CHUNK], directions[:start][kept[:start]]
        free = torch.ones(len(block), dtype=torch.bool)
        for part in before.split(CHUNK):
            free &= ~reaches(block @ part.T, threshold).any(1)
        alike = reaches(block @ block.T, threshold)
        for row in range(len(block)):
            free[row] &= not (alike[row, :row] & free[:row]).any()
        kept[start : start + len(block)] = free
    return kept.numpy()


def assembled(saes: Sequence[SAE], found: Stars, representative: Representative) -> SAE:
    """The SAE whose features are stars. What all features of an SAE share is averaged over the SAEs.

    A direction has the average length of its members', whatever their cosines. A pool of Matryoshka SAEs is a BatchTopK SAE: its
    features are in another order.
    """

    def joined(name: str, tensors: list[Tensor]) -> Tensor:
        if name in SHARED:
            return torch.stack(tensors).mean(0)
        rows = _padded(tensors)
        of_stars = represent(found, rows, representative)
        if name != "W_dec":
            return of_stars
        return F.normalize(of_stars, dim=1) * represent(found, rows.norm(dim=2), representative)[:, None]

    weights = [sae.parameters._asdict() for sae in saes]
    tensors = {name: joined(name, [of_sae[name] for of_sae in weights]) for name in weights[0]}
    variant = "batchtopk" if saes[0].variant == "matryoshka" else saes[0].variant
    return SAE(variant, saes[0].k, type(saes[0].parameters)(**tensors))


def calibrated(sae: SAE, activations: Float[Tensor, "token d_in"], l0: float) -> SAE:
    """The SAE with one offset added to what every pre-activation has to exceed, so that `l0` features fire on a token.

    TopK keeps its k. Raises `UserError` for an L0 that can't be reached.
    """
    if sae.variant == "topk":
        return sae

    longest = float(activations.float().norm(dim=1).max())
    offset, step, ends, found = 0.0, longest / 256, dict[bool, float](), 0.0  # small steps first: without a threshold all fire
    within = max(L0_WITHIN * l0, 1 / len(activations))  # one firing more or less
    for _ in range(TRIALS):
        found = measure(_harder(sae, offset), activations).l0
        if abs(found - l0) <= within or abs(offset) > longest:
            break  # no nearer than that: the offset that halvings end with is just what some token has
        ends[found > l0] = offset
        offset, step = (sum(ends.values()) / 2 if len(ends) == 2 else offset + (step if found > l0 else -step)), 2 * step
    if abs(found - l0) > within:
        raise UserError(f"activations: the pool has an L0 of {found:.1f} and not {l0:.1f} at best; pool more features")
    return _harder(sae, offset)


def _harder(sae: SAE, offset: float) -> SAE:
    """The SAE with more, or less, for a pre-activation to exceed."""
    weights = sae.parameters._asdict()
    if "threshold" in weights:
        changed = {"threshold": (weights["threshold"] + offset).clamp(min=0)}
    elif "log_threshold" in weights:
        changed = {"log_threshold": (weights["log_threshold"].exp() + offset).clamp(min=1e-30).log()}
    else:
        changed = {"b_enc": weights["b_enc"] - offset}
    return replace(sae, parameters=sae.parameters._replace(**changed))


def _unit(sae: SAE) -> SAE:
    """The same SAE with each direction's length moved into its code, where the variant allows it."""
    if sae.variant not in HOMOGENEOUS:
        return sae
    norms, weights = sae.directions.norm(dim=1).clamp(min=1e-30), sae.parameters._asdict()
    changed = {"W_dec": weights["W_dec"] / norms[:, None], "W_enc_rows": weights["W_enc_rows"] * norms[:, None]}
    changed |= {name: weights[name] * norms for name in ("b_enc", *HOMOGENEOUS[sae.variant])}
    if sae.variant == "jumprelu":
        changed["log_threshold"] = weights["log_threshold"] + norms.log()
    return replace(sae, parameters=sae.parameters._replace(**changed))


def _unit_rows(saes: Sequence[SAE]) -> Float[Tensor, "sae d_sae d_in"]:
    """The directions of all SAEs at unit length."""
    return _padded([F.normalize(sae.directions, dim=1) for sae in saes])


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor with a leading axis, narrower ones filled up with zeros."""
    width = max(map(len, tensors))
    return torch.stack([F.pad(tensor, [0, 0] * (tensor.dim() - 1) + [0, width - len(tensor)]) for tensor in tensors])


def check(saes: Sequence[SAE], encode: bool) -> None:
    """Raise `UserError` for SAEs that can't be pooled; `encode` says whether they have to fire on activations."""
    if len(saes) < 2:
        raise UserError("PATH: a pool is made of several SAEs; give two or more, of the same training with other seeds")
    first = saes[0]
    for position, sae in enumerate(saes):
        if sae.directions.shape[1] != first.directions.shape[1]:
            d_in = (sae.directions.shape[1], first.directions.shape[1])
            raise UserError(f"PATH: SAE {position} has d_in {d_in[0]}, and the first {d_in[1]}; pool SAEs of one site")
        if encode and sae.variant is None:
            raise UserError(f"PATH: SAE {position} is a decoder only, which can't fire; give its encoder, or no --model")
        if encode and (sae.variant, sae.k) != (first.variant, first.k):
            kinds = [f"{each.variant} with k = {each.k}" if each.k else f"{each.variant}" for each in (sae, first)]
            raise UserError(f"PATH: SAE {position} is {kinds[0]}, and the first {kinds[1]}; pool SAEs of one training")


def joined(saes: Sequence[SAE], like: Ensemble) -> Ensemble:
    """SAEs of one width as an ensemble that takes the same activations as another: what evaluation and training ask for."""
    normalised = [sae.parameters.scaled(1 / like.scale, -like.mean * like.scale) for sae in saes]
    parameters = type(normalised[0])(*map(torch.stack, zip(*normalised, strict=True)))
    return replace(like, variant=str(saes[0].variant), seeds=list(range(len(saes))), parameters=parameters)
