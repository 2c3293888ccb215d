"""An engine behind any OpenAI-compatible endpoint (POST BASE_URL/chat/completions).

Answers are cached by what was asked, so that nothing is paid for twice and a study that was interrupted goes on. Endpoints fail in
many ways: what may pass is tried again with growing pauses; what won't ends in one line. Tokens are counted before a question
is sent, by an upper bound, so that a budget is never exceeded.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from sae_stability.errors import UserError
from sae_stability.explanations.windows import Window
from sae_stability.files import read_json, write_json
from sae_stability.study import Explainer

ATTEMPTS = 5  # of a question that an endpoint fails to answer
TIMEOUT = 60  # seconds for an answer
LONGEST = {"explain": 120, "detect": 200}  # tokens of an answer
ROOM = 16  # times as many, for models that think before they answer
SAID = 200  # characters that are shown of an endpoint's reason
SPENT = "spent.json"
OVERHEAD = 16  # tokens a message that endpoints add to its text
FAILED_FOR_GOOD = {400, 401, 403, 404, 422}

EXPLAIN = (
    "You see pieces of text. In each, the tokens on which one feature of a language model is active stand between << and >>. Say "
    "in one short sentence what these tokens, or the texts around them, have in common. Be specific. Answer with the sentence only."
)
DETECT = (
    "A feature of a language model is described in one sentence. You see numbered pieces of text. Is the feature active somewhere "
    "in each? Answer with a JSON list of 0 and 1, one for each piece in order, and nothing else."
)


class BudgetSpent(Exception):
    """The next question could exceed the budget. What was answered is kept."""


class _Passing(Exception):
    """A failure that may pass."""


class _CutShort(Exception):
    """The tokens of an answer were used up before it said anything."""


@dataclass
class LanguageModel:
    """The engine.

    Raises `UserError` for an endpoint that is down, refuses the key or says nothing, and `BudgetSpent` before a budget is exceeded.
    """

    settings: Explainer
    cache: Path
    """A folder for the answers."""
    pause: float = 1.0
    """Seconds before a second try; each further one waits twice as long."""
    spent: int = 0
    """Tokens that were used, or may have been, since the folder was made."""
    room: int = 1
    """Times the usual tokens that the model needs for an answer: more from the first one that was cut short."""
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=TIMEOUT))

    @property
    def name(self) -> str:
        return self.settings.model

    def __post_init__(self):
        self.cache.mkdir(parents=True, exist_ok=True)
        if (self.cache / SPENT).is_file():
            self.spent = read_json(self.cache / SPENT)["tokens"]

    def explain(self, shown: list[Window]) -> "Described | None":
        text = self._ask("explain", explain_messages(shown), lambda answer: answer.strip() or None)
        return Described(text, self) if text else None

    def detect(self, text: str, windows: list[list[str]]) -> list[bool]:
        found = self._ask("detect", detect_messages(text, windows), lambda answer: _flags(answer, len(windows)))
        return [False] * len(windows) if found is None else found

    def _ask(self, kind: str, messages: list[dict], read: Callable):
        """The answer as `read` understands it; None for a refusal. An answer that can't be read is asked for again.

        One that was cut short before it said anything is asked for once more, with more room, and is not kept.
        """
        request = {"model": self.settings.model, "messages": messages, "temperature": 0, "max_tokens": LONGEST[kind]}
        asked = {"base_url": self.settings.base_url, **request}
        kept = self.cache / f"{hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]}.json"
        if kept.is_file():
            return read_json(kept)["answer"]
        retrying = Retrying(
            retry=retry_if_exception_type(_Passing),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self.pause),
        )
        used: list[int] = []
        try:
            answer = self._with_room(request, lambda wider: retrying(self._once, wider, read, used))
        except RetryError as error:
            reason = error.last_attempt.exception()
            where = f"{self.settings.base_url} did not answer {ATTEMPTS} times ({reason})"
            raise UserError(f"explainer: {where}; check base_url, or call again later: what was answered is kept") from None
        finally:
            self.spent += sum(used)
            write_json(self.cache / SPENT, {"tokens": self.spent})
        write_json(kept, {"answer": answer})
        return answer

    def _with_room(self, request: dict, ask: Callable):
        """The answer to a request with the tokens that the model has needed so far, or else with `ROOM` times the usual ones."""
        for room in sorted({self.room, ROOM}):
            try:
                answer = ask({**request, "max_tokens": room * request["max_tokens"]})
            except _CutShort:
                continue
            self.room = room
            return answer
        said_nothing = f"{self.settings.model} said nothing in {ROOM * request['max_tokens']:,} tokens"
        raise UserError(f"explainer.model: {said_nothing}; name a model that thinks less before it answers")

    def _once(self, request: dict, read: Callable, used: list[int]):
        """One try; what it used, or may have used, goes to `used`, and to disk before it is sent: a kill forgets nothing."""
        bound = bound_on_tokens(request)
        if self.spent + sum(used) + bound > self.settings.budget:
            spent = f"{self.spent + sum(used):,} of {self.settings.budget:,} tokens"
            raise BudgetSpent(f"{spent} are spent, and the next question may take {bound:,}")
        key = key_of(self.settings)
        used.append(bound)  # until an answer says what it used; what fails on the way may have been answered all the same
        write_json(self.cache / SPENT, {"tokens": self.spent + sum(used)})
        try:
            response = self.client.post(
                f"{self.settings.base_url.rstrip('/')}/chat/completions", json=request, headers={"Authorization": f"Bearer {key}"}
            )
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                used[-1] = 0  # nothing was sent
            raise _Passing(type(error).__name__) from None
        if response.status_code != 200:
            used[-1] = 0
        if response.status_code in FAILED_FOR_GOOD:
            answers = f"{self.settings.base_url} answers {response.status_code}{_reason(response, key)}"
            raise UserError(f"explainer: {answers}; check the model's name and the key in {self.settings.key}")
        if response.status_code != 200:
            raise _Passing(f"status {response.status_code}")
        try:
            body = response.json()
            choice = body["choices"][0]
            message = choice["message"]
            used[-1] = int((body.get("usage") or {}).get("total_tokens") or bound)
            if message.get("refusal"):
                return None
            if not message.get("content"):
                if choice.get("finish_reason") == "length":
                    raise _CutShort
                return None
            return read(message["content"])
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _Passing(f"an answer that can't be read: {type(error).__name__}") from None


@dataclass(frozen=True)
class Described:
    """An explanation that the language model wrote, and reads again to be scored."""

    text: str
    engine: LanguageModel

    def detect(self, windows: list[list[str]]) -> list[bool]:
        return self.engine.detect(self.text, windows)


def explain_messages(shown: list[Window]) -> list[dict]:
    pieces = []
    for window in shown:
        pairs = zip(window.tokens, window.activations, strict=True)
        marked = [f"<<{token}>>" if activation > 0 else token for token, activation in pairs]
        pieces.append("".join(marked).replace("\n", "\\n"))
    return _messages(EXPLAIN, _numbered(pieces))


def detect_messages(text: str, windows: list[list[str]]) -> list[dict]:
    return _messages(DETECT, f"Description: {text}\n\n" + _numbered(["".join(tokens).replace("\n", "\\n") for tokens in windows]))


def bound_on_tokens(request: dict) -> int:
    """No tokenizer makes more tokens of a text than it has bytes."""
    return sum(len(message["content"].encode()) + OVERHEAD for message in request["messages"]) + request["max_tokens"]


def key_of(settings: Explainer) -> str:
    """The key, from the environment only. Raises `UserError` where it is missing."""
    key = os.environ.get(settings.key, "")
    if not key:
        raise UserError(
            f"explainer.key: the environment has no {settings.key}; set it to the endpoint's key (any word where it needs none)"
        )
    return key


def _reason(response: httpx.Response, key: str) -> str:
    """What an endpoint says about a failure, in one short line without the key; empty where it says nothing."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except ValueError:  # no JSON
        said = response.text
    line = " ".join(str(said or "").replace(key, "***").split())
    return f" ({line[:SAID]})" if line else ""


def _messages(instruction: str, text: str) -> list[dict]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": text}]


def _numbered(pieces: list[str]) -> str:
    return "\n".join(f"{number}. {piece}" for number, piece in enumerate(pieces, 1))


def _flags(answer: str, count: int) -> list[bool]:
    """The list of 0 and 1 in an answer. Raises `ValueError` where there is none of that length."""
    listed = re.search(r"\[[01,\s]*\]", answer)
    flags = json.loads(listed.group()) if listed else None
    if not flags or len(flags) != count:
        raise ValueError(f"no list of {count} flags")
    return [bool(flag) for flag in flags]
