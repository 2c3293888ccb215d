"""An engine behind any OpenAI-compatible endpoint (POST BASE_URL/chat/completions).

Answers are cached by what was asked, so that nothing is paid for twice and a study that was interrupted goes on. Endpoints fail in
many ways: what may pass is tried again, after as long as the endpoint says or with growing pauses; what only one question meets
leaves that feature out; what no question will get past ends in one line. Tokens are counted before a question is sent, by an upper
bound, so that a budget is never exceeded.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from urllib.request import proxy_bypass

import httpx
from tenacity import RetryCallState, RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from sae_stability.errors import UserError
from sae_stability.explanations.answers import count_of, flags, json_of, reason_of, seconds_to_wait, text_of, used_tokens
from sae_stability.explanations.asking import LONGEST_EXPLANATION, detect_messages, explain_messages, place_of
from sae_stability.explanations.rules import Rules
from sae_stability.explanations.scoring import Described, LeftOut
from sae_stability.explanations.windows import Window
from sae_stability.files import read_json, write_json
from sae_stability.study import Explainer

ATTEMPTS = 5  # of a question that an endpoint fails to answer
TIMEOUT = 60  # seconds for an answer
LONGEST = {"explain": LONGEST_EXPLANATION, "detect": 200}  # tokens of an answer
ROOM = 16  # times as many, for models that think before they answer
LONGEST_WAIT = 120  # seconds that an endpoint may ask for
HOPELESS = 5  # features in a row that were left out, without one that was explained, after which no other is tried
SPENT = "spent.json"
OVERHEAD = 16  # tokens a message that endpoints add to its text
ANSWERS = "/chat/completions"
FAILED_FOR_GOOD = {400, 401, 402, 403, 404, 405, 413, 422}
TOO_LONG = ("context length", "context_length", "context size", "context window", "too long", "too many tokens", "maximum context")
"""What endpoints say of a question that is too long for their model."""
TERMS: dict[str, str | None] = {"temperature": None, "max_tokens": "max_completion_tokens", "system": "user"}
"""What some endpoints refuse, by the word of it in their reason, and what they take instead."""
FILTERED = ("content_filter", "content filter", "content_policy", "moderation", "flagged", "safety")
"""Words with which endpoints say that they filter a question or its answer."""
CUT_SHORT, BROKEN_OFF = {"length", "model_length", "max_tokens"}, {"error", "abort", "cancelled"}
"""How answers end that the model had no tokens left for, and those that something else broke off."""
UNPAID = ("insufficient_quota", "insufficient quota", "billing")


class BudgetSpent(Exception):
    """The next question could exceed the budget. What was answered is kept."""


class _Passing(Exception):
    """A failure that may pass, and after how many seconds, where the endpoint says so."""

    def __init__(self, reason: str, seconds: float | None = None, unreadable: bool = False):
        super().__init__(reason)
        self.seconds, self.unreadable = seconds, unreadable


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
    dialect: dict[str, str | None] = field(default_factory=dict)
    """What the endpoint calls a parameter of ours, or None for one that it does not take: learnt from what it refuses."""
    failures: int = 0
    """Features left out since the last that was explained."""
    client: httpx.Client | None = None
    """What asks; by default one that follows the proxies of the environment."""

    @property
    def name(self) -> str:
        """As the endpoint calls the model; apart from the engine of rules."""
        return f"{self.settings.model} (a language model)" if self.settings.model == Rules.name else self.settings.model

    @property
    def base_url(self) -> str:
        assert self.settings.base_url is not None  # without one, a model on this machine is asked
        return self.settings.base_url

    @property
    def budget(self) -> int:
        assert self.settings.budget is not None  # as the schema asks of every endpoint
        return self.settings.budget

    def __post_init__(self):
        self.cache.mkdir(parents=True, exist_ok=True)
        if (self.cache / SPENT).is_file():
            self.spent = read_json(self.cache / SPENT)["tokens"]

    @property
    def where(self) -> str:
        """The address without its query, for messages."""
        return self.base_url.partition("?")[0]

    @property
    def url(self) -> str:
        """Where questions go: the path of `base_url`, with its query."""
        parts = urlsplit(self.base_url)
        path = parts.path.rstrip("/")
        return urlunsplit(parts._replace(path=path if path.endswith(ANSWERS) else path + ANSWERS))

    @cached_property
    def _http(self) -> httpx.Client:
        """Raises `UserError` for a proxy of the environment that can't be used."""
        if self.client is not None:
            return self.client
        try:
            return httpx.Client(timeout=TIMEOUT, follow_redirects=True)
        except (ValueError, ImportError) as error:
            if proxy_bypass(urlsplit(self.base_url).hostname or ""):
                return httpx.Client(timeout=TIMEOUT, follow_redirects=True, trust_env=False)
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"explainer: a proxy of the environment can't be used ({reason}); correct ALL_PROXY, or name the host in NO_PROXY"
            ) from None

    def explain(self, shown: list[Window]) -> Described | None:
        text = self._answered("explain", explain_messages(shown), lambda answer: answer.strip() or None)
        return Described(text, self) if text else None

    def detect(self, text: str, windows: list[list[str]]) -> list[bool]:
        found = self._answered("detect", detect_messages(text, windows), lambda answer: flags(answer, len(windows)))
        if found is None:
            raise LeftOut(f"{self.settings.model} refuses to say where it is active")
        return found

    def _answered(self, kind: str, messages: list[dict], read: Callable):
        """An answer, with a count of how many were not to be had: where all fail, the first few say enough."""
        try:
            answer = self._ask(kind, messages, read)
        except LeftOut as reason:
            self.failures += 1
            if self.failures >= HOPELESS:
                raise UserError(f"explainer: {HOPELESS} features in a row were left out ({reason}); name another model") from None
            raise
        if kind == "detect":
            self.failures = 0
        return answer

    def _ask(self, kind: str, messages: list[dict], read: Callable):
        """The answer as `read` understands it; None for a refusal. An answer that can't be read is asked for again.

        One that was cut short is asked for once more, with more room, and is not kept.
        """
        request = {"model": self.settings.model, "messages": messages, "temperature": 0, "max_tokens": LONGEST[kind]}
        asked = {"base_url": self.base_url, **request}
        kept = place_of(asked, self.cache)
        if kept.is_file():
            return read_json(kept)["answer"]
        retrying = Retrying(
            retry=retry_if_exception_type(_Passing), stop=stop_after_attempt(ATTEMPTS), wait=self._wait, reraise=False
        )
        used: list[int] = []
        try:
            answer = self._with_room(request, lambda wider: retrying(self._once, wider, read, used))
        except RetryError as error:
            reason = error.last_attempt.exception()
            if isinstance(reason, _Passing) and reason.unreadable:
                raise LeftOut(f"{ATTEMPTS} times {reason}") from None
            where = f"{self.where} did not answer {ATTEMPTS} times ({reason})"
            raise UserError(f"explainer: {where}; check base_url, or call again later: what was answered is kept") from None
        finally:
            self.spent += sum(used)
            write_json(self.cache / SPENT, {"tokens": self.spent})
        write_json(kept, {"answer": answer})
        return answer

    def _wait(self, state: RetryCallState) -> float:
        """As long as the endpoint says, or each time twice as long as before."""
        failed = state.outcome.exception() if state.outcome is not None else None
        told = failed.seconds if isinstance(failed, _Passing) else None
        growing = wait_exponential(multiplier=self.pause)(state)
        return growing if told is None else max(growing, min(told, LONGEST_WAIT))

    def _with_room(self, request: dict, ask: Callable):
        """The answer to a request with the tokens that the model has needed so far, or else with `ROOM` times the usual ones."""
        for room in sorted({self.room, ROOM}):
            try:
                answer = ask({**request, "max_tokens": room * request["max_tokens"]})
            except _CutShort:
                continue
            self.room = room
            return answer
        raise LeftOut(f"{self.settings.model} came to no end in {ROOM * request['max_tokens']:,} tokens")

    def _once(self, request: dict, read: Callable, used: list[int]):
        """One try; what it used, or may have used, goes to `used`, and to disk before it is sent: a kill forgets nothing."""
        bound = bound_on_tokens(request)
        if self.spent + sum(used) + bound > self.budget:
            spent = f"{self.spent + sum(used):,} of {self.budget:,} tokens"
            raise BudgetSpent(f"{spent} are spent, and the next question may take {bound:,}")
        key, client = key_of(self.settings), self._http
        used.append(bound)  # until an answer says what it used; what fails on the way may have been answered all the same
        write_json(self.cache / SPENT, {"tokens": self.spent + sum(used)})
        try:
            response = client.post(self.url, json=self._spoken(request), headers={"Authorization": f"Bearer {key}"})
        except httpx.InvalidURL as error:
            used[-1] = 0
            raise UserError(f"explainer.base_url: {self.where} is no address ({error}); correct it") from None
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
                used[-1] = 0  # nothing was sent
            raise _Passing(type(error).__name__) from None
        if response.request.method != "POST":  # which standards allow, and which drops the question
            moved = f"{response.history[0].status_code}, to {str(response.url).partition('?')[0].removesuffix(ANSWERS)}"
            raise UserError(f"explainer: {self.where} has moved ({moved}); correct base_url")
        if response.status_code != 200:
            if response.status_code < 500:  # behind a gateway that gave up, a model may have answered
                used[-1] = 0
            return self._refused(response, request, read, used, key)
        body = json_of(response)
        choices = body.get("choices") if body is not None else None
        if body is None or not isinstance(choices, list) or not choices:
            return self._without_choices(response, body, key)
        used[-1] = used_tokens(body.get("usage")) or bound
        return self._read(choices[0], read)

    def _read(self, choice, read: Callable):
        """The answer of a choice: what stands before it, where a model thinks aloud, is no part of it."""
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise _Passing("an answer that can't be read: no message", unreadable=True)
        if message.get("refusal"):
            return None
        ended = str(choice.get("finish_reason") or "").lower()
        if ended in CUT_SHORT:
            raise _CutShort
        if ended in BROKEN_OFF:
            raise _Passing(f"an answer that ended by {ended}", unreadable=True)
        if any(word in ended for word in FILTERED):
            raise LeftOut(f"{self.where} filters its answer ({ended})")
        said = text_of(message.get("content"))
        if not said:
            raise _Passing("an empty answer", unreadable=True)
        try:
            return read(said)
        except (ValueError, TypeError) as error:
            raise _Passing(f"an answer that can't be read: {error}", unreadable=True) from None

    def _spoken(self, request: dict) -> dict:
        """The request as this endpoint takes it."""
        named = {self.dialect.get(name, name): value for name, value in request.items()}
        spoken = {name: value for name, value in named.items() if name is not None}
        if self.dialect.get("system") == "user":  # models without a role for instructions
            text = "\n\n".join(message["content"] for message in request["messages"])
            spoken["messages"] = [{"role": "user", "content": text}]
        return spoken

    def _refused(self, response: httpx.Response, request: dict, read: Callable, used: list[int], key: str):
        """Ask again in the endpoint's own terms, if it says which; leave a feature out whose question is too long; or give up."""
        status, reason = response.status_code, reason_of(response, key)
        said = response.text.lower()
        if any(word in said for word in UNPAID):
            raise UserError(f"explainer: {self.where} answers {status}{reason}; top the account up, and call again")
        if status not in FAILED_FOR_GOOD:
            raise _Passing(f"status {status}{reason}", seconds_to_wait(response.headers))
        if any(word in said for word in FILTERED):
            raise LeftOut(f"{self.where} filters its question{reason}")
        if status in (400, 413, 422):
            for term, instead in TERMS.items():
                if term in said and term not in self.dialect:
                    self.dialect[term] = instead
                    return self._once(request, read, used)
            if status == 413 or any(words in said for words in TOO_LONG):
                raise LeftOut(f"its question is too long for {self.settings.model}{reason}")
        mend = "check the model's name and the key in " + self.settings.key
        if status in (404, 405):
            mend = f"check the model's name and base_url: {ANSWERS} is added to it, and it often ends in /v1"
        elif status == 402:
            mend = "top the account up, and call again: what was answered is kept"
        elif status in (400, 422):
            mend = "check the model's name, or name another"
        raise UserError(f"explainer: {self.where} answers {status}{reason}; {mend}")

    def _without_choices(self, response: httpx.Response, body: dict | None, key: str):
        """What to make of a good status without an answer: some endpoints put their errors there."""
        error = body.get("error") if body else None
        code = count_of(error.get("code")) if isinstance(error, dict) else None
        reason = reason_of(response, key)
        if code in FAILED_FOR_GOOD:
            raise UserError(f"explainer: {self.where} answers {code}{reason}; what was answered is kept")
        if response.text.lstrip().startswith("data:"):
            raise UserError(f"explainer: {self.where} answers with a stream of events; name an endpoint that does not")
        page = "html" in response.headers.get("content-type", "") or response.text.lstrip().startswith("<")
        foreign = body is not None and error is None and "choices" not in body and len(body) > 0
        if page or foreign:
            what = "a page for people" if page else f"an object of {', '.join(list(body or ())[:3])} and no choices"
            raise UserError(f"explainer: {self.where} answers with {what}; correct base_url: {ANSWERS} is added to it")
        raise _Passing(f"an answer without choices{reason}", unreadable=error is None)


def bound_on_tokens(request: dict) -> int:
    """No tokenizer makes more tokens of a text than it has bytes."""
    return sum(len(message["content"].encode()) + OVERHEAD for message in request["messages"]) + request["max_tokens"]


def key_of(settings: Explainer) -> str:
    """The key, from the environment only, without spaces around it. Raises `UserError` where it is missing, or no key can be so."""
    key = os.environ.get(settings.key, "").strip()
    if not key:
        raise UserError(
            f"explainer.key: the environment has no {settings.key}; set it to the endpoint's key (any word where it needs none)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"explainer.key: {settings.key} holds signs that no key has, such as an invisible one; copy the key again")
    return key
