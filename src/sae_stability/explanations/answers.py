"""What endpoints answer, in whatever form: text without the thoughts before it, flags, tokens used, times to wait."""

import contextlib
import json
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

SAID = 200  # characters that are shown of an endpoint's reason
BEGINS, ENDS = (
    r"<(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷",
    r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷",
)
THOUGHTS = re.compile(rf"^.*(?:{ENDS})|^\s*(?:{BEGINS}).*", re.DOTALL)
"""What a model thinks aloud before an answer; one that comes to no end is all there is."""
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis"
YES, NO = {"1", "1.0", "yes", "true", "active"}, {"0", "0.0", "no", "false", "inactive"}


def json_of(response: httpx.Response) -> dict | None:
    """The object that an endpoint answers; None for anything else."""
    try:
        body = response.json()
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def count_of(value) -> int | None:
    """A whole number that is written as one, or as text; None for anything else."""
    try:
        return int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None


def used_tokens(usage) -> int:
    """The tokens that an answer says it used; 0 where it does not say."""
    if not isinstance(usage, dict):
        return 0
    total, *parts = (count_of(usage.get(f"{part}_tokens")) for part in ("total", "prompt", "completion"))
    if total is None:
        total = 0 if None in parts else sum(part for part in parts if part is not None)
    return max(0, total)


def seconds_to_wait(headers: httpx.Headers) -> float | None:
    """After how many seconds an endpoint wants to be asked again: it says a number, or a date (RFC 9110)."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        told = headers.get(name)
        if told is None:
            continue
        try:
            return float(told) / unit
        except ValueError:
            with contextlib.suppress(ValueError):
                return max(0.0, (parsedate_to_datetime(told) - datetime.now(UTC)).total_seconds())
    return None


def text_of(content) -> str:
    """The text of an answer, of one part or several, without the thoughts before it, as signs that can be written down."""
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str) or (ANALYSIS in content and FINAL not in content):
        return ""
    text = THOUGHTS.sub("", content.rpartition(FINAL)[2], count=1).strip()
    return text.encode("utf-8", "replace").decode()  # half of a pair of surrogates is no character


def _part(part) -> str:
    if isinstance(part, dict):
        part = "" if part.get("type") in ("thinking", "reasoning") else part.get("text")
    return part if isinstance(part, str) else ""


def reason_of(response: httpx.Response, key: str) -> str:
    """What an endpoint says about a failure, in one short line without the key; empty where it says nothing."""
    try:
        body = response.json()
        error = body.get("error", body) if isinstance(body, dict) else body
        said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    except ValueError:  # no JSON
        said = response.text
    line = " ".join(str(said or "").replace(key, "***").split())
    return f" ({line[:SAID]})" if line else ""


def flags(answer: str, count: int) -> list[bool]:
    """The flags in an answer: a JSON list, an object by number, numbered lines, or words between commas.

    Raises `ValueError` where there are not as many.
    """
    found = _listed(answer)
    words = [str(word).strip().strip('"').lower() for word in found]
    if len(words) != count or not set(words) <= YES | NO:
        raise ValueError(f"no list of {count} flags")
    return [word in YES for word in words]


def _listed(answer: str) -> list:
    """The items of a list in an answer, however it is written: of several the last, of an object in the order of its numbers."""
    text = re.sub(r",(\s*[\]}])", r"\1", answer.lower())
    for pattern in (r"\[[^\[\]{}]*\]", r"\{[^{}]*\}"):
        for found in reversed(re.findall(pattern, text)):
            try:
                value = json.loads(found)
            except ValueError:
                continue
            return value if isinstance(value, list) else [value[key] for key in sorted(value, key=_by_number)]
    lines = re.findall(r"^\s*\d+\s*[.):-]\s*\**(\w+)", answer, re.MULTILINE)
    return lines or re.split(r"[\s,;]+", answer.strip().rstrip("."))


def _by_number(key: str) -> tuple[int, str]:
    """Keys such as `2` and `piece 10` in the order of their numbers."""
    number = re.search(r"\d+", key)
    return (int(number[0]) if number else 0, "" if number else key)
