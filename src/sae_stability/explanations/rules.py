"""A deterministic engine: the rule of surface form that best tells the firing tokens of the shown contexts from the others.

It needs nothing and finds nothing but surface rules. So it says how well the surface explains a feature, and not whether a feature
is of the surface.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from sae_stability.explanations.windows import Window

PATTERNS = {
    "a number": r"\s*\d[\d.,]*",
    "a word in capitals": r"\s*[A-Z]{2,}",
    "a word with a capital first letter": r"\s*[A-Z][a-z]+",
    "a line break": r".*\n\s*",
    "white space": r"[^\S\n]+",
    "an opening bracket": r"\s*[(\[{]+",
    "a closing bracket": r"\s*[)\]}]+[.,:;]?",
    "a quotation mark or backtick": r"\s*['\"`]+",
    "punctuation": r"\s*[^\w\s]+",
    "a name with an underscore": r"\s*\w*_\w*",
}
LONGEST = 3  # rules joined by or
GAIN = 0.02  # of F1 that one more rule must bring
AFFIX = (3, 4, 5)  # letters of beginnings and endings that are tried


@dataclass(frozen=True)
class Rule:
    """A condition on a token and the one before it."""

    kind: str
    value: str

    def holds(self, token: str, before: str) -> bool:
        plain = token.strip().lower()
        match self.kind:
            case "token":
                return token == self.value
            case "word":
                return plain == self.value
            case "beginning":
                return plain.startswith(self.value)
            case "ending":
                return plain.endswith(self.value)
            case "before":
                return before.strip().lower() == self.value
            case _:
                return re.fullmatch(PATTERNS[self.value], token, re.DOTALL) is not None

    def __str__(self) -> str:
        match self.kind:
            case "token":
                return f"the token {self.value!r}" if self.value else "a token that is part of a character"
            case "word":
                return f"the word {self.value!r} in any case"
            case "beginning":
                return f"words that begin with {self.value!r}"
            case "ending":
                return f"words that end with {self.value!r}"
            case "before":
                return f"the token after {self.value!r}"
            case _:
                return self.value


@dataclass(frozen=True)
class AnyOf:
    """An explanation: the feature fires where one of its rules holds."""

    rules: tuple[Rule, ...]

    @property
    def text(self) -> str:
        return "; or ".join(map(str, self.rules))

    def detect(self, windows: list[list[str]]) -> list[bool]:
        return [any(rule.holds(token, before) for rule in self.rules for before, token in _pairs(tokens)) for tokens in windows]


@dataclass(frozen=True)
class Rules:
    """The engine. Its explanations have up to `LONGEST` rules, chosen one after another by the F1 of firing tokens."""

    name = "rules"

    def explain(self, shown: list[Window]) -> AnyOf:
        places = _Places(shown)
        chosen: list[Rule] = []
        held: set[int] = set()
        best = 0.0
        while len(chosen) < LONGEST and places.candidates:
            scores = {rule: places.f1(held | where) for rule, where in places.candidates.items()}
            rule = max(scores, key=lambda rule: (scores[rule], rule.kind == "token", rule.kind, rule.value))
            if scores[rule] < best + GAIN:
                break
            best, held = scores[rule], held | places.candidates[rule]
            chosen.append(rule)
        return AnyOf(tuple(chosen))


class _Places:
    """The tokens of the shown windows: which fire, and on which each possible rule holds."""

    def __init__(self, shown: list[Window]):
        pairs = [pair for window in shown for pair in _pairs(window.tokens)]
        fires = [activation > 0 for window in shown for activation in window.activations]
        self.pairs = pairs
        self.fires = {place for place, fire in enumerate(fires) if fire}

    @cached_property
    def candidates(self) -> dict[Rule, set[int]]:
        """Every rule that holds on some firing token, with the places on which it holds."""
        rules = {Rule("pattern", name) for name in PATTERNS}
        for place in self.fires:
            before, token = self.pairs[place]
            plain = token.strip().lower()
            rules.add(Rule("token", token))
            if plain:
                rules.add(Rule("word", plain))
            if before.strip():
                rules.add(Rule("before", before.strip().lower()))
            for letters in AFFIX:
                if len(plain) > letters and plain.isalpha():
                    rules |= {Rule("beginning", plain[:letters]), Rule("ending", plain[-letters:])}
        return {rule: {place for place, (before, token) in enumerate(self.pairs) if rule.holds(token, before)} for rule in rules}

    def f1(self, held: set[int]) -> float:
        both = len(held & self.fires)
        return 2 * both / (len(held) + len(self.fires)) if both else 0.0


def _pairs(tokens: list[str]) -> list[tuple[str, str]]:
    """Each token with the one before it; the first has none."""
    return list(zip(["", *tokens], tokens, strict=False))
