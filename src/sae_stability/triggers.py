"""What features fire on: how much of their activation the token itself, the one before it or the position tells (PAPER, Triggers).

Activations of a feature are averaged within groups of tokens (all `array`s, say) on one half of the documents. What those averages
explain of the variance on the other half is the share that the group tells. A shuffled text gives the null: the same counts, no
relation.
"""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import sparse

from sae_stability.groups import group_sums
from sae_stability.language.corpus import Contexts
from sae_stability.matching import Banding
from sae_stability.spelling import Spelling, is_signs
from sae_stability.statistics import Interval, matched_pairs, reach_without

FEWEST = 50  # firings on each half of the documents; with fewer, averages are noise
TELLS = 0.5  # share of the variance from which a trigger is one of a class
PARTS = 8  # of the text, each left out in turn: how far what is found depends on which documents were read
MASS = 0.8  # of a feature's activation: the tokens that hold so much of it are its trigger tokens
STEM = 4  # letters that the words of a family have in common at their beginning
CHANCE = 0.05  # share of random bundles that agree as much, below which trigger tokens are alike in form
CLASSES = (
    *("single token", "word family", "punctuation", "alike in form", "n-gram", "position"),
    *("bundle of tokens", "wider context", "too rare"),
)
CALIPER = 0.05  # standard deviations of log frequency by which two matched features may differ: one covariate is easy to match
COMPARED = ("frequency", "explained_token", "explained_previous", "explained_n-gram", "explained_position", "top_share", "rarity")
Parts = Sequence[pd.DataFrame] | None
"""The features as found without each part of the text in turn (`without_parts`); None where chance in the text is left out."""
SURFACE = CLASSES[:6]
"""Classes of surface form: the token, the one before it or the position tell when the feature fires, and several tokens are spelled
alike."""
WITH_BUNDLES = CLASSES[:7]
"""The wider definition: whatever the tokens have in common, if anything."""


@dataclass(frozen=True)
class Text:
    """Where each held-out token stands: one entry a token that SAEs see."""

    token: Int[np.ndarray, "token"]
    previous: Int[np.ndarray, "token"]
    position: Int[np.ndarray, "token"]
    fitted: np.ndarray
    """Whether the token's cluster is one of those on which averages are taken."""
    part: Int[np.ndarray, "token"]
    """Which part the token's cluster belongs to, of `PARTS` or as many as there are clusters for: each has some of either half."""

    @classmethod
    def of(cls, contexts: Contexts, rows: int) -> "Text":
        """The first `rows` text tokens; every other cluster is one on which averages are taken."""
        context, position = (along[:rows] for along in np.nonzero(contexts.is_text))
        cluster = np.unique(contexts.cluster[context, position], return_inverse=True)[1]
        token, previous = contexts.tokens[context, position], contexts.tokens[context, position - 1]
        part = cluster // 2 % max(1, min(PARTS, (cluster.max(initial=0) + 1) // 2))
        return cls(token.astype(np.int64), previous.astype(np.int64), position, cluster % 2 == 0, part)

    def at(self, rows: np.ndarray) -> "Text":
        """Some of the tokens."""
        return Text(self.token[rows], self.previous[rows], self.position[rows], self.fitted[rows], self.part[rows])

    def shuffled(self, seed: int = 0) -> "Text":
        """The same places in another order within each half: no relation to what stands there is left."""
        order, rng = np.arange(len(self.token)), np.random.default_rng(seed)
        for half in (self.fitted, ~self.fitted):
            order[half] = rng.permutation(order[half])
        return self.at(order)

    @property
    def groups(self) -> dict[str, Int[np.ndarray, "token"]]:
        """The groupings that may tell when a feature fires, each token's group."""
        pair = self.previous * (int(self.token.max()) + 1) + self.token
        return {"token": self.token, "previous": self.previous, "n-gram": pair, "position": self.position}


def explained(activations: sparse.csr_array, group: Int[np.ndarray, "token"], fitted: np.ndarray) -> Float[np.ndarray, "feature"]:
    """The share of each feature's variance that the group of a token explains.

    Averages come from the `fitted` tokens and are judged on the others, less those of groups that the fitted half lacks. Negative
    where averages mislead; NaN where a feature does not fire on one of the halves.
    """
    of_fitted, total, squares, crossed, predicted, judged = group_sums(activations, group, fitted)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = of_fitted / fitted.sum()
        spread = squares - 2 * mean * total + judged * mean**2
        share = 1 - (squares - 2 * crossed + predicted) / spread
    return np.where((squares > 0) & (mean > 0), share, np.nan)


def _with_values(matrix: sparse.csr_array, values: Float[np.ndarray, "firing"]) -> sparse.csr_array:
    """Other values in the same places."""
    return sparse.csr_array((values, matrix.indices, matrix.indptr), shape=matrix.shape)


def triggers(
    activations: sparse.csr_array, text: Text, words: list[str], frequency: Float[np.ndarray, "vocabulary"]
) -> pd.DataFrame:
    """One row per `feature` of an SAE: what tells when it fires, how concentrated that is, and which class it falls into.

    `activations` [token, feature]; `words` are the tokens as text, `frequency` their share of the training corpus. Columns:
    `firings` on the rarer half; `explained_token`, `_previous`, `_n-gram` and `_position`, and the same of a shuffled text as
    `null_token` and so on; `top_share`, the share of the activation on one token; `tokens`, how many hold `MASS` of it; `rarity`,
    minus the decimal logarithm of the trigger tokens' frequency, weighted by activation; `as_alike`, the share of random bundles of
    as many equally frequent tokens that are spelled as much alike, NaN below two; `trigger`, the class.
    """
    activations = activations.astype(np.float64)  # once, and not in each product below
    shuffled = text.shuffled()
    null = {f"null_{name}": explained(activations, group, shuffled.fitted) for name, group in shuffled.groups.items()}
    return _found(activations, text, words, frequency).assign(**null)


def without_parts(
    activations: sparse.csr_array, text: Text, words: list[str], frequency: Float[np.ndarray, "vocabulary"]
) -> pd.DataFrame:
    """What `triggers` finds without each part of the text in turn, the number of which is in the column `left_out`.

    `frequency` is the share of the tokens that are left on which a feature fires. The null is not taken again: a shuffled text
    tells next to nothing, whichever documents it has. No rows where the text has one part only.
    """
    activations, tables = activations.astype(np.float64), [pd.DataFrame(columns=["left_out", "feature"])]
    parts = np.unique(text.part)
    for part in parts if len(parts) > 1 else ():
        rows = np.flatnonzero(text.part != part)
        left = activations[rows]
        fires = np.bincount(left.indices[left.data > 0], minlength=left.shape[1]) / len(rows)
        tables.append(_found(left, text.at(rows), words, frequency).assign(left_out=part, frequency=fires))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def _found(activations: sparse.csr_array, text: Text, words: list[str], frequency: Float[np.ndarray, "vocabulary"]) -> pd.DataFrame:
    """The columns of `triggers` but for those of the null."""
    fires = _with_values(activations, np.sign(activations.data))
    table: dict = {"feature": np.arange(activations.shape[1])}
    table |= {"firings": np.minimum(*(half.astype(float) @ fires for half in (text.fitted, ~text.fitted))).astype(int)}
    table |= {f"explained_{name}": explained(activations, group, text.fitted) for name, group in text.groups.items()}
    rows = len(text.token)
    members = sparse.csr_array((np.ones(rows), (text.token, np.arange(rows))), shape=(len(words), rows))
    mass = (members @ activations).tocsc()
    tops = [_trigger_tokens(mass, feature) for feature in range(mass.shape[1])]
    table["top_share"] = np.array([shares[0] if len(shares) else np.nan for _, shares in tops])
    table["tokens"] = np.array([len(tokens) for tokens, _ in tops])
    rarest = -np.log10(np.maximum(frequency, 1 / (10 * rows)))  # a token that the training corpus lacks
    table["rarity"] = np.array([shares @ rarest[tokens] / shares.sum() if len(tokens) else np.nan for tokens, shares in tops])
    spelling = Spelling.of(words, frequency, np.unique(text.token))
    table["as_alike"] = np.array([spelling.as_alike(tokens) if len(tokens) > 1 else np.nan for tokens, _ in tops])
    found = pd.DataFrame(table)
    found["trigger"] = [
        classify(row, [words[token] for token in tokens]) for row, (tokens, _) in zip(found.to_dict("records"), tops, strict=True)
    ]
    return found


def classify(feature: dict, tokens: list[str]) -> str:
    """The class of a feature's trigger, by a rule; `tokens` are its trigger tokens, strongest first. The first that holds:

    - too rare: fewer than `FEWEST` firings on a half;
    - position: the position tells `TELLS` of the variance;
    - where the token does: punctuation if no trigger token has a letter or digit, a single token if one holds `MASS` of the
      activation, a word family if all are one word up to case and ending, alike in form if fewer than `CHANCE` of random bundles
      are spelled as much alike, a bundle of tokens else;
    - n-gram: the token with the one before it tells as much;
    - wider context: none of these does.
    """
    if feature["firings"] < FEWEST:
        return "too rare"
    if feature["explained_position"] >= TELLS:
        return "position"
    if feature["explained_token"] >= TELLS:
        if all(is_signs(token) for token in tokens):
            return "punctuation"
        if len(tokens) == 1:
            return "single token"
        if _one_family(tokens):
            return "word family"
        return "alike in form" if feature["as_alike"] < CHANCE else "bundle of tokens"
    return "n-gram" if feature["explained_n-gram"] >= TELLS else "wider context"


def _one_family(tokens: list[str]) -> bool:
    """Whether all tokens are one word up to case, accents, spaces around it and its ending."""
    plain = [_plain(token) for token in tokens]
    if len(set(plain)) == 1:
        return True
    return min(map(len, plain)) >= STEM and len({word[:STEM] for word in plain}) == 1


@cache
def _plain(token: str) -> str:
    """A token without case and spaces around it, and without the accents of Latin and Greek letters.

    Elsewhere what Unicode takes apart are letters of their own: Japanese ga is no ka, and a Korean syllable is not its first sound.
    """
    return "".join(map(_without_accent, unicodedata.normalize("NFKC", token))).strip().casefold()


def _without_accent(character: str) -> str:
    letter = unicodedata.normalize("NFD", character)[0]
    return letter if unicodedata.name(letter, "").startswith(("LATIN", "GREEK")) else character


def _trigger_tokens(mass: sparse.csc_array, feature: int) -> tuple[Int[np.ndarray, "trigger"], Float[np.ndarray, "trigger"]]:
    """The tokens that hold `MASS` of a feature's activation, strongest first, and the share that each holds."""
    column = slice(mass.indptr[feature], mass.indptr[feature + 1])
    tokens, weights = mass.indices[column], mass.data[column]
    if weights.sum() <= 0:
        return tokens[:0], weights[:0]
    order = np.lexsort((tokens, -weights))
    shares = weights[order] / weights.sum()
    kept = int(np.searchsorted(np.cumsum(shares), MASS - 1e-9)) + 1
    return tokens[order][:kept], shares[:kept]


def at_equal_frequency(features: pd.DataFrame) -> pd.DataFrame:
    """The unstable features of one seed that have a stable one that fires as often, and those, one to one.

    Columns: band, frequency. A feature that is rare is hard to learn twice, whatever it fires on; among these that is no reason.
    """
    unstable, stable = (features[features["band"] == band] for band in ("unstable", "stable"))
    spread = max(float(np.log(features["frequency"]).std()), 1e-12)
    ours, theirs = (np.log(part["frequency"].to_numpy())[:, None] / spread for part in (unstable, stable))
    chosen, partners = matched_pairs(ours, theirs, CALIPER)
    return pd.concat([unstable.iloc[chosen], stable.iloc[partners]])


def compare(features: pd.DataFrame, bands: Banding, parts: Parts = None) -> pd.DataFrame:
    """Unstable against stable features in each of `COMPARED`: Cliff's delta, all of them and at equal frequency.

    One row per quantity and choice of features. The delta is the chance that an unstable feature has more of it than a stable one,
    less the chance that it has less (Cliff 1993, doi:10.1037/0033-2909.114.3.494): the mean over seeds, jackknifed over seeds with
    bands derived again, and over the text where `parts` are the same features as found without each part of it. Columns of
    `features`: seed, feature, firings and what is compared. Too rare ones take no part, but for how often they fire.
    """
    rows = []
    for chosen in ("all", "equal frequency"):
        for quantity in COMPARED:
            interval = delta(features, bands, quantity, equal_frequency=chosen != "all", parts=parts)
            columns = {"delta": interval.value, "delta_low": interval.low, "delta_high": interval.high}
            rows.append({"features": chosen, "quantity": quantity, **columns})
    return pd.DataFrame(rows)


def delta(features: pd.DataFrame, bands: Banding, quantity: str, equal_frequency: bool = False, parts: Parts = None) -> Interval:
    """One row of `compare`.

    Features of equal frequency are paired again without a seed, and stay as they are without a part of the text: which of several
    equally close partners a feature gets is no matter of the text.
    """

    needed = {"seed", "feature", "firings", "frequency", quantity}
    features = features[[name for name in features if name in needed]]  # rows with all columns take their time to copy

    def compared(banded: pd.DataFrame) -> pd.DataFrame:
        if quantity == "frequency" and not equal_frequency:
            return banded
        known = banded[banded["firings"] >= FEWEST]
        return paired(known) if equal_frequency else known

    def mean_delta(chosen: pd.DataFrame) -> float:
        return over_seeds(chosen, lambda own: cliffs_delta(own, quantity))

    interval = bands.jackknife(features, lambda banded: mean_delta(compared(banded)))
    if parts is not None:
        held = compared(bands.banded(features))[["seed", "feature", "band"]]
        interval = interval.widened(reach_without([mean_delta(held.merge(part[["seed", "feature", quantity]])) for part in parts]))
    return interval.within(-1, 1)


def paired(features: pd.DataFrame) -> pd.DataFrame:
    """The features `at_equal_frequency` of every seed."""
    return pd.concat([features[:0], *(at_equal_frequency(own) for _, own in features.groupby("seed"))])


def over_seeds(features: pd.DataFrame, of_seed: Callable[[pd.DataFrame], float]) -> float:
    """The mean of a number of each seed, of the seeds that have it; NaN where none has."""
    numbers = np.array([of_seed(part) for _, part in features.groupby("seed")], dtype=float)
    known = numbers[np.isfinite(numbers)]
    return float(known.mean()) if len(known) else float("nan")


def cliffs_delta(features: pd.DataFrame, quantity: str) -> float:
    """How much more of a quantity unstable features have than stable ones, from -1 to 1; NaN where a band is empty."""
    values, band = features[quantity].to_numpy(dtype=float), features["band"].to_numpy()
    unstable, stable = (np.sort(values[(band == name) & ~np.isnan(values)]) for name in ("unstable", "stable"))
    if not len(unstable) or not len(stable):
        return float("nan")
    below = np.searchsorted(stable, unstable, "left")
    above = len(stable) - np.searchsorted(stable, unstable, "right")
    return float((below - above).mean() / len(stable))


def surface_share(
    features: pd.DataFrame,
    bands: Banding,
    band: str,
    less: str | None = None,
    classes: tuple[str, ...] = SURFACE,
    parts: Parts = None,
) -> Interval:
    """The share of a band's features whose trigger is of one of some classes, of those that are not too rare: mean over seeds.

    With `less`, less the share of another band: `shuffled` is the unstable band in a text whose tokens are shuffled.
    """

    def share(own: pd.DataFrame, of: str) -> float:
        inside = own[(own["band"] == of) & (own["firings"] >= FEWEST)]
        return float(inside["trigger"].isin(classes).mean()) if len(inside) else float("nan")

    def of_seed(own: pd.DataFrame) -> float:
        if less is None:
            return share(own, band)
        return share(own, band) - (by_chance(own, band) if less == "shuffled" else share(own, less))

    interval = bands.jackknife(features, lambda banded: over_seeds(banded, of_seed))
    if parts is None:
        return interval
    return interval.widened(reach_without([over_seeds(bands.banded(part), of_seed) for part in parts]))


def by_chance(features: pd.DataFrame, band: str) -> float:
    """The share of a band's features of which a text with shuffled tokens tells as much: what chance gives."""
    known = features[(features["band"] == band) & (features["firings"] >= FEWEST)]
    nulls = [f"null_{name}" for name in ("token", "previous", "n-gram", "position")]
    return float((known[nulls] >= TELLS).any(axis=1).mean()) if len(known) else float("nan")
