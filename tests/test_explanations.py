"""Windows, rules and scores against planted text; the language model against a local server that also misbehaves."""

import contextlib
import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from tenacity import RetryCallState

from sae_stability.errors import UserError
from sae_stability.explanations import (
    BudgetSpent,
    LanguageModel,
    Rules,
    Window,
    agreement,
    explain,
    explain_messages,
    says_surface,
    tasks,
)
from sae_stability.explanations.answers import seconds_to_wait, used_tokens
from sae_stability.explanations.language_model import (
    HOPELESS,
    LONGEST,
    LONGEST_WAIT,
    ROOM,
    SPENT,
    _Passing,
    bound_on_tokens,
)
from sae_stability.explanations.scoring import LeftOut
from sae_stability.explanations.windows import REACH, SCORED, SHOWN
from sae_stability.files import read_json
from sae_stability.language.corpus import Contexts
from sae_stability.statistics import Interval
from sae_stability.study import Explainer

WORDS = ["<bos>", " array", " arrays", "(", ",", " the", " matrix", " compute", " computing", " 12", " NaN"]


def decode(ids: np.ndarray) -> list[str]:
    return [WORDS[token] for token in ids]


@pytest.fixture(scope="module")
def text() -> Contexts:
    rng = np.random.default_rng(0)
    ids = rng.integers(1, len(WORDS), (400, 30))
    ids[:, 0] = 0
    return Contexts(ids, np.broadcast_to(np.arange(400)[:, None], ids.shape), ids > 0)


def feature(text: Contexts, *names: str) -> np.ndarray:
    """Activations of a feature that fires on some tokens in a third of the contexts, stronger in later ones."""
    fires = np.isin(text.tokens, [WORDS.index(name) for name in names]) & (np.arange(len(text.tokens)) % 3 == 0)[:, None]
    return (fires * (1 + np.arange(len(text.tokens))[:, None] / 100))[text.is_text]


def test_marks_are_those_of_firing_tokens_and_of_nothing_in_the_text():
    window = Window(["cout", " <<", " x", "", "山", "", "", "\n"], [0.0, 0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    (_, shown) = explain_messages([window])
    assert shown["content"] == "1. cout < <<< x>><<山>><<\\n>>"


def test_a_token_without_text_of_its_own_is_called_part_of_a_character():
    window = Window(["the", "", "山", " a"], [0.0, 1.0, 0.0, 0.0])
    assert Rules().explain([window] * 3).text == "a token that is part of a character"


def test_windows_are_of_the_text_around_and_scored_ones_are_of_other_documents(text):
    activations = sparse.csc_array(np.stack([feature(text, " matrix"), feature(text, "(", ",")], 1))
    one, other = tasks(activations, np.array([1, 0]), text, decode)
    assert (one.feature, other.feature) == (1, 0)
    assert len(one.shown) == SHOWN
    assert len(one.scored) == 2 * SCORED
    assert sum(window.fires for window in one.scored) == SCORED
    assert all(len(window.tokens) <= 2 * REACH + 1 for window in one.shown)
    strongest = [max(window.activations) for window in one.shown]
    assert all(above >= below for above, below in pairwise(strongest))
    for window in [*other.shown, *other.scored]:
        assert all(token == " matrix" for token, strength in zip(window.tokens, window.activations, strict=True) if strength > 0)
    assert {tuple(window.tokens) for window in one.shown}.isdisjoint(tuple(window.tokens) for window in one.scored)
    assert tasks(activations, np.array([1, 0]), text, decode) == [one, other]


def test_windows_end_where_the_document_does():
    """Short ones stand end to end in a context, and the next one may be of the half that is shown."""
    ids = np.arange(40 * 31).reshape(40, 31)
    document = np.arange(40 * 31).reshape(40, 31) // 6
    contexts = Contexts(ids, document, np.ones(ids.shape, dtype=bool))
    fires = np.random.default_rng(0).random(ids.size) < 0.3
    (found,) = tasks(
        sparse.csc_array(fires[:, None].astype(float)), np.array([0]), contexts, lambda tokens: [str(each) for each in tokens]
    )
    for half, windows in enumerate((found.shown, found.scored)):
        for window in windows:
            (of_document,) = {int(token) // 6 for token in window.tokens}
            assert of_document % 2 == half


def shown(*contexts: str, fires: str) -> list[Window]:
    """Windows of words; those that `fires` holds are where the feature does."""
    windows = []
    for context in contexts:
        tokens = [f" {word}" for word in context.split()]
        windows.append(Window(tokens, [float(token.strip() in fires.split()) for token in tokens]))
    return windows


@pytest.mark.parametrize(
    ("contexts", "fires", "said"),
    [
        (
            ("a computed matrix", "they compute it", "while computing the sum", "a computer is not"),
            "computed compute computing computer",
            "begin with 'comp",
        ),
        (("see 12 of them", "at 7 or 100", "no one"), "12 7 100", "a number"),
        (("it is in the room", "in a house", "house is big in summer"), "in", "the token ' in'"),
        (("if NOT set", "the DEFAULT is one", "a word"), "NOT DEFAULT", "capitals"),
    ],
)
def test_rules_find_what_was_planted(contexts, fires, said):
    found = Rules().explain(shown(*contexts, fires=fires))
    assert said in found.text
    assert "; or " not in found.text
    assert found.detect([[" " + fires.split()[0], " x"], [" y"]]) == [True, False]
    assert says_surface(found.text)


def test_rules_are_scored_on_contexts_that_were_not_shown(text):
    activations = sparse.csc_array(np.stack([feature(text, "(", ",")], 1))
    (found,) = explain(Rules(), tasks(activations, np.array([0]), text, decode))
    assert found.recall == 1  # the feature fires on brackets and commas only,
    assert found.precision < 0.7  # but not on all of them: other contexts hold them too
    assert found.f1 == pytest.approx(2 * found.precision / (1 + found.precision))
    assert found.surface


SURFACE = [
    "The token 'array' and its plural.",
    "Words that begin with 'pre'.",
    "Opening brackets and commas.",
    "The token '(' in function signatures",
    "the word 'return' in descriptions of return values",
    "the word return in descriptions of return values",
    "The word 'mean', which refers to the average in statistics.",
    "The token 'don't' where a meaning isn't given.",
    "This feature fires mainly on the suffix 'ing' in verbs that express an action.",
    "Commas separating the arguments of a function.",
    "Occurrences of the letter 'x' about which nothing else is said",
    "The first word of a sentence.",
    "Capitalized words.",
    "Tokens following an opening bracket.",
    "The words 'in', 'on' and 'at'. They often introduce a topic.",
    "a number; or the token after 'axis'",
    "Digits, as in the description of a shape.",
    "Hyphens (used in related terms).",
    '"return" or "yield"',
]
NOT_SURFACE = [
    "Descriptions of what a function returns.",
    "The concept of convergence.",
    "Words that refer to linear algebra.",
    "Probability theory.",
    "'token'",  # an answer in quotes, that says nothing of the token
    "Words that don't refer to things that aren't there.",
    "Tokens in discussions of letters and digits.",
    "The meaning of the word 'return'.",
    "Synonyms of 'big'.",
    "Terms from statistics such as 'mean' and 'variance'.",
    "The number of samples in each batch.",
    "The 'returns' section of a docstring.",
    "the token ','; or the topic of punctuation",
    "Words before a conclusion.",
    "Discussions of prefixes and suffixes.",
    "Nouns.",
    "Strings describing errors.",
    "",
]


@pytest.mark.parametrize(("text", "surface"), [*((text, True) for text in SURFACE), *((text, False) for text in NOT_SURFACE)])
def test_the_head_of_what_is_said_decides_whether_it_is_of_surface_form(text, surface):
    assert says_surface(text) is surface


@given(st.text(st.characters(blacklist_characters="'\"`‘’“”"), min_size=1))
def test_what_is_quoted_is_a_string_whatever_it_says(quoted):
    assert says_surface(f"The token '{quoted}' in function signatures")
    assert not says_surface(f"The meaning of '{quoted}'")


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_kappa_is_agreement_beyond_that_of_every_pair_of_texts(pairs):
    labels, answers = np.array(pairs).T
    found = agreement(labels, answers)
    observed = (labels == answers).mean()
    chance = (labels[:, None] == answers).mean()  # the label of one text with the answer for another
    assert found.share.value == pytest.approx(observed)
    assert found.share.low <= observed <= found.share.high
    if chance == 1:
        assert np.isnan(found.kappa.value)
        return
    assert found.kappa.value == pytest.approx((observed - chance) / (1 - chance))
    again = agreement(~labels, ~answers)
    assert again.kappa.value == pytest.approx(found.kappa.value)
    assert again.share == found.share


def test_kappa_is_1_where_all_agree_0_by_chance_and_its_interval_narrows():
    labels = np.arange(40) % 2 == 0
    assert agreement(labels, labels).kappa == Interval(1, 1, 1)
    assert agreement(labels, np.arange(40) % 4 < 2).kappa.value == pytest.approx(0)
    few, many = (agreement(np.tile(labels, times), np.tile(np.arange(40) < 20, times)).kappa for times in (1, 16))
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.15)
    assert few.low < 0 < few.high


class Endpoint:
    """A server of chat completions that answers what it is told to, one after another, and the last for ever."""

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                status, reply, *more = answer(self.path, body) if callable(answer) else answer
                if status is None:  # hangs up
                    self.connection.close()
                    return
                self.send_response(status)
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.encode())

            def do_GET(self):  # as a redirection may turn a question into
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()  # seconds that a shutdown waits
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def says(content, tokens: int = 50, **message) -> tuple[int, str]:
    return 200, json.dumps({"choices": [{"message": {"content": content, **message}}], "usage": {"total_tokens": tokens}})


WINDOWS = shown("a computed matrix", "it is in", fires="computed")


def model(url: str, folder, budget: int = 100_000, **options) -> LanguageModel:
    settings = Explainer(base_url=url, model="m", budget=budget, key="TEST_API_KEY")
    return LanguageModel(settings, folder, pause=0.001, **options)


@pytest.fixture(autouse=True)
def _key(monkeypatch):
    monkeypatch.setenv("TEST_API_KEY", "hidden-word")


def test_a_language_model_explains_and_detects_and_is_asked_once(tmp_path):
    with Endpoint(says("Words about computing."), says("Here: [1, 0]")) as endpoint:
        found = model(endpoint.url, tmp_path).explain(WINDOWS)
        assert found.text == "Words about computing."
        assert found.detect([["a"], ["b"]]) == [True, False]
        again = model(endpoint.url, tmp_path)
        assert again.spent == 100
        assert again.explain(WINDOWS).detect([["a"], ["b"]]) == [True, False]
    assert len(endpoint.requests) == 2
    path, headers, body = endpoint.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer hidden-word"
    assert "<< computed>>" in body["messages"][1]["content"]
    assert "computed" in endpoint.requests[0][2]["messages"][1]["content"]
    assert not any("hidden-word" in file.read_text() for file in tmp_path.rglob("*.json"))
    assert not any(band in json.dumps(body) for band in ("stable", "unstable"))


@pytest.mark.parametrize(
    "trouble",
    [
        (500, "oops"),
        (429, "slow down"),
        (200, '{"choices": [{"mess'),
        (200, "{}"),
        (None, ""),
    ],
)
def test_what_may_pass_is_tried_again(tmp_path, trouble):
    with Endpoint(trouble, trouble, says("Numbers.")) as endpoint:
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Numbers."
    assert len(endpoint.requests) == 3


def test_an_answer_that_is_no_list_is_asked_for_again(tmp_path):
    with Endpoint(says("maybe"), says("[1]"), says("[1, 0]")) as endpoint:
        assert model(endpoint.url, tmp_path).detect("x", [["a"], ["b"]]) == [True, False]
    assert len(endpoint.requests) == 3


def test_a_slow_endpoint_times_out(tmp_path):
    slow = httpx.MockTransport(lambda request: (_ for _ in ()).throw(httpx.ReadTimeout("slow")))
    with pytest.raises(UserError, match=r"did not answer .* \(ReadTimeout\)"):
        model("https://nowhere", tmp_path, client=httpx.Client(transport=slow)).explain(WINDOWS)


def test_a_refusal_leaves_the_feature_out(tmp_path, text):
    activations = sparse.csc_array(np.stack([feature(text, " matrix")], 1))
    given = tasks(activations, np.array([0]), text, decode)
    with Endpoint(says(None, refusal="I can't.")) as endpoint:
        assert list(explain(model(endpoint.url, tmp_path), given)) == []
        assert list(explain(model(endpoint.url, tmp_path), given)) == []
    assert len(endpoint.requests) == 1  # a refusal is an answer, and is kept


@pytest.mark.parametrize(("status", "named"), [(401, "key in TEST_API_KEY"), (404, "model's name")])
def test_what_will_not_pass_is_one_line(tmp_path, status, named):
    with Endpoint((status, "no")) as endpoint, pytest.raises(UserError, match=named):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "Use max_completion_tokens\\nin its place."}}', "(Use max_completion_tokens in its place.)"),
        ('{"error": "no such model"}', "(no such model)"),
        ('{"detail": "wrong field"}', "(wrong field)"),
        ("plain words", "(plain words)"),
        ('["odd"]', "odd"),
        ("", "answers 400; "),
        ('{"error": {"message": "bad key hidden-word"}}', "(bad key ***)"),
        ("x" * 5000, "x" * 200 + ")"),
    ],
)
def test_an_endpoint_s_own_reason_is_in_the_line(tmp_path, body, said):
    with Endpoint((400, body)) as endpoint, pytest.raises(UserError) as error:
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert "hidden-word" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": None}])
def test_an_answer_that_does_not_say_what_it_used_is_counted_by_its_bound(tmp_path, usage):
    reply = json.dumps({"choices": [{"message": {"content": "Numbers."}}], "usage": usage})
    with Endpoint((200, reply)) as endpoint:
        engine = model(endpoint.url, tmp_path)
        assert engine.explain(WINDOWS).text == "Numbers."
    assert [engine.spent] == [bound_on_tokens(body) for _, _, body in endpoint.requests]  # asked once


def cut_short(content: str | None = "", tokens: int = 300) -> tuple[int, str]:
    choice = {"message": {"content": content}, "finish_reason": "length"}
    return 200, json.dumps({"choices": [choice], "usage": {"total_tokens": tokens}})


@pytest.mark.parametrize("content", ["", None])
def test_a_model_that_thinks_first_is_given_more_room_once(tmp_path, content):
    with Endpoint(cut_short(content), says("Numbers."), says("[1, 0]"), says("Words.")) as endpoint:
        engine = model(endpoint.url, tmp_path)
        assert engine.explain(WINDOWS).text == "Numbers."
        assert engine.detect("x", [["a"], ["b"]]) == [True, False]
        assert engine.spent == 300 + 50 + 50
        usual, *wide = [body["max_tokens"] for _, _, body in endpoint.requests]
        assert (usual, wide) == (LONGEST["explain"], [ROOM * LONGEST["explain"], ROOM * LONGEST["detect"]])
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Numbers."  # kept
    assert len(endpoint.requests) == 3


def test_a_model_that_only_thinks_is_one_line_and_nothing_is_kept(tmp_path):
    with Endpoint(cut_short(), cut_short(), says("Numbers.")) as endpoint:
        with pytest.raises(LeftOut, match=r"^m came to no end in 1,920 tokens"):
            model(endpoint.url, tmp_path).explain(WINDOWS)
        assert len(endpoint.requests) == 2
        again = model(endpoint.url, tmp_path)
        assert again.spent == 600
        assert again.explain(WINDOWS).text == "Numbers."


def test_more_room_counts_against_the_budget(tmp_path):
    bound = bound_on_tokens({"messages": explain_messages(WINDOWS), "max_tokens": LONGEST["explain"]})
    with Endpoint(cut_short(tokens=bound)) as endpoint, pytest.raises(BudgetSpent):
        model(endpoint.url, tmp_path, budget=2 * bound).explain(WINDOWS)
    assert len(endpoint.requests) == 1


def test_what_was_answered_before_the_budget_was_spent_is_handed_on(tmp_path, text):
    activations = sparse.csc_array(np.stack([feature(text, " matrix"), feature(text, "(", ",")], 1))
    given = tasks(activations, np.array([0, 1]), text, decode)
    flags = json.dumps([1] * len(given[0].scored))
    answered = []
    with Endpoint(says("Matrices.", tokens=100), says(flags, tokens=19_800), says("more")) as endpoint, pytest.raises(BudgetSpent):
        for explanation in explain(model(endpoint.url, tmp_path, budget=20_000), given):
            answered.append(explanation)
    assert [(explanation.feature, explanation.text) for explanation in answered] == [(0, "Matrices.")]


def test_an_endpoint_that_is_down_is_one_line(tmp_path):
    with Endpoint(says("x")) as endpoint:
        pass
    with pytest.raises(UserError, match="check base_url") as error:
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert "\n" not in str(error.value)
    assert model(endpoint.url, tmp_path).spent == 0  # nothing was sent


def test_a_missing_key_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_API_KEY")
    with Endpoint(says("x")) as endpoint, pytest.raises(UserError, match="the environment has no TEST_API_KEY"):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert endpoint.requests == []


@pytest.mark.parametrize("answers", [[says("Numbers.", tokens=700)], [(None, "")]])
def test_a_budget_is_never_exceeded(tmp_path, answers):
    budget = 2500
    with Endpoint(*answers) as endpoint:
        engine = model(endpoint.url, tmp_path, budget=budget)
        with pytest.raises((BudgetSpent, UserError)):
            for number in range(20):
                engine.explain(shown(f"word {number}", fires="word"))
        again = model(endpoint.url, tmp_path, budget=budget)
        if again.spent:
            with pytest.raises(BudgetSpent, match="of 2,500 tokens"):
                again.explain(shown("another", fires="another"))
    most = sum(bound_on_tokens(body) for _, _, body in endpoint.requests)
    paid = 700 * len(endpoint.requests) if answers[0][0] == 200 else most
    assert 0 < paid <= budget


def test_a_question_is_counted_before_it_is_sent(tmp_path):
    """A process that is killed while it waits for an answer has asked, and may have to pay."""
    bound = bound_on_tokens({"messages": explain_messages(WINDOWS), "max_tokens": LONGEST["explain"]})
    counted = []

    def answers(request):
        counted.append(read_json(tmp_path / SPENT)["tokens"])
        status, text = says("Numbers.", tokens=50)
        return httpx.Response(status, text=text)

    model("https://nowhere", tmp_path, client=httpx.Client(transport=httpx.MockTransport(answers))).explain(WINDOWS)
    assert counted == [bound]
    assert read_json(tmp_path / SPENT)["tokens"] == 50


def test_the_bound_on_tokens_is_above_the_bytes_of_the_text():
    request = {"messages": explain_messages(WINDOWS), "max_tokens": 10}
    assert bound_on_tokens(request) > sum(len(message["content"].encode()) for message in request["messages"]) + 10


def test_a_study_that_leaves_explanations_out_is_told_how_to_ask_for_them(call, house):
    for more in ([], ["--dry-run"]):
        status, _, error = call("explain", "quick", "--set", "experiments=[stability]", *more)
        assert (status, len(error)) == (2, 1)
        assert "--set 'experiments=[stability, explanations]'" in error[0]
    assert not house.exists()


def test_a_budget_of_zero_is_one_line(call):
    settings = ["--set", "explainer.base_url=https://x", "--set", "explainer.model=m", "--set", "explainer.budget=0"]
    status, _, error = call("explain", "quick", *settings)
    assert status == 2
    assert len(error) == 1
    assert "explainer.budget" in error[0]


# Endpoints as they really answer


@pytest.mark.parametrize(
    "answer",
    ["[1, 0]", "Here: [1, 0].", "[true, false]", '["yes", "no"]', "1, 0", "1 0", '{"1": 1, "2": 0}', '{"0": true, "1": false}',
     "1. yes\n2. no", "1) Yes\n2) No", "1: active\n2: inactive", '{"2": 0, "1": 1}', "[1.0, 0.0]", '{"answers": {"1": 1, "2": 0}}',
     "[1, 0,]", "Piece [1] is, [2] is not: [1, 0]", "1. **1**\n2. **0**", '{"piece 10": 0, "piece 9": 1}'],
)  # fmt: skip
def test_flags_are_read_however_they_are_written(tmp_path, answer):
    with Endpoint(says(answer)) as endpoint:
        assert model(endpoint.url, tmp_path).detect("x", [["a"], ["b"]]) == [True, False]
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("answer", ["[1, 0, 1]", "maybe", "[2, 0]", '{"1": 1}', "1. yes"])
def test_flags_that_can_not_be_read_leave_the_feature_out(tmp_path, answer):
    with Endpoint(says(answer)) as endpoint:
        engine = model(endpoint.url, tmp_path)
        with pytest.raises(LeftOut, match="no list of 2 flags"):
            engine.detect("x", [["a"], ["b"]])
        assert engine.spent == 50 * len(endpoint.requests)  # what was answered was paid


@pytest.mark.parametrize(
    "content",
    [
        "<think>Let me see.\nHm.</think>Numbers.",
        "Let me see</think>\n\nNumbers.",
        "<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|message|>Numbers.",
        [{"type": "text", "text": "Num"}, {"type": "text", "text": "bers."}],
        [{"type": "reasoning", "text": "Hm."}, {"type": "text", "text": "Numbers."}],
        [{"type": "output_text", "text": "Num"}, "bers."],
        "[THINK]Let me see.[/THINK]Numbers.",
        "◁think▷Hm.◁/think▷Numbers.",
        "<thought>Hm.</thought> Numbers.",
        "<seed:think>Hm.</seed:think>Numbers.",
    ],
)
def test_thoughts_and_parts_are_no_part_of_an_explanation(tmp_path, content):
    with Endpoint(says(content)) as endpoint:
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Numbers."


@pytest.mark.parametrize("content", [None, "", "<think>Let me see.", "<|channel|>analysis<|message|>Hm.", [{"type": "image"}]])
def test_thoughts_alone_or_nothing_are_no_answer_and_are_not_kept(tmp_path, content):
    with Endpoint(says(content)) as endpoint:
        for ask in (lambda engine: engine.explain(WINDOWS), lambda engine: engine.detect("x", [["a"], ["b"]])):
            with pytest.raises(LeftOut, match="an empty answer"):
                ask(model(endpoint.url, tmp_path))
    assert [file.name for file in tmp_path.glob("*.json")] == ["spent.json"]


def test_who_refuses_to_say_where_a_feature_is_active_does_not_say_nowhere(tmp_path):
    refusal = (200, json.dumps({"choices": [{"message": {"content": None, "refusal": "I can't."}}], "usage": {"total_tokens": 5}}))
    with Endpoint(refusal) as endpoint, pytest.raises(LeftOut, match="refuses"):
        model(endpoint.url, tmp_path).detect("x", [["a"], ["b"]])


@pytest.mark.parametrize(
    ("reason", "asked", "said"),
    [("model_length", 2, "came to no end"), ("error", 5, "ended by error"), ("content_filter", 1, "filters its answer")],
)
def test_an_answer_that_did_not_end_by_itself_is_none(tmp_path, reason, asked, said):
    body = {"choices": [{"message": {"content": "Words that"}, "finish_reason": reason}], "usage": {"total_tokens": 5}}
    with Endpoint((200, json.dumps(body))) as endpoint, pytest.raises(LeftOut, match=said):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert len(endpoint.requests) == asked


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "The response was filtered due to the prompt triggering Azure's content management policy: content_filter"),
        (403, "Your chosen model requires moderation and your input was flagged"),
        (400, "the request exceeds the available context size"),
    ],
)
def test_what_one_question_meets_leaves_one_feature_out(tmp_path, status, said):
    with Endpoint((status, json.dumps({"error": {"message": said}}))) as endpoint, pytest.raises(LeftOut):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert len(endpoint.requests) == 1


def test_an_account_without_money_is_not_asked_again(tmp_path):
    broke = (429, json.dumps({"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}))
    with Endpoint(broke) as endpoint, pytest.raises(UserError, match="top the account up"):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert len(endpoint.requests) == 1


def test_half_a_character_is_written_down_as_a_sign(tmp_path):
    raw = '{"choices": [{"message": {"content": "Faces \\ud83d."}}], "usage": {"total_tokens": 5}}'
    with Endpoint((200, raw)) as endpoint:
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Faces ?."
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Faces ?."  # from what was kept


@pytest.mark.parametrize(("headers", "seconds"), [({"retry-after-ms": "250"}, 0.25), ({"retry-after": "3"}, 3.0), ({}, None)])
def test_how_long_an_endpoint_wants_to_be_left_alone(headers, seconds):
    assert seconds_to_wait(httpx.Headers(headers)) == seconds


def test_an_endpoint_may_say_when_by_a_date():
    soon = datetime.now(UTC) + timedelta(seconds=30)
    assert 25 < seconds_to_wait(httpx.Headers({"retry-after": format_datetime(soon, usegmt=True)})) <= 30
    assert seconds_to_wait(httpx.Headers({"retry-after": "soon"})) is None


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [({"total_tokens": -1}, 0), ({"prompt_tokens": 40, "completion_tokens": 5}, 45), ({"prompt_tokens": 40}, 0), (None, 0)],
)
def test_what_an_answer_used_is_never_less_than_nothing(usage, tokens):
    assert used_tokens(usage) == tokens


def test_an_address_that_is_none_is_one_line(tmp_path):
    engine = model("http://localhost:80", tmp_path)
    engine.settings = engine.settings.model_copy(update={"base_url": "http://localhost:abc/v1"})
    with pytest.raises(UserError, match="base_url"):
        engine.explain(WINDOWS)
    assert engine.spent == 0


def test_an_explanation_that_was_cut_off_is_asked_for_again_with_more_room(tmp_path):
    with Endpoint(cut_short("Words that refer to the"), says("Numbers.")) as endpoint:
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Numbers."
    assert len(endpoint.requests) == 2


@pytest.mark.parametrize("usage", [None, [], {"total_tokens": None}, {"total_tokens": "50"}, {"prompt_tokens": 5}, "many"])
def test_usage_in_any_form_costs_no_answer(tmp_path, usage):
    reply = json.dumps({"choices": [{"message": {"content": "Numbers."}}], "usage": usage})
    with Endpoint((200, reply)) as endpoint:
        engine = model(endpoint.url, tmp_path)
        assert engine.explain(WINDOWS).text == "Numbers."
    told = usage if isinstance(usage, dict) else {}
    assert engine.spent == (50 if told.get("total_tokens") == "50" else bound_on_tokens(endpoint.requests[0][2]))


def refuses(word: str, said: str):
    """An endpoint that does not take a parameter, or a role, and says so."""

    def answer(path, body):
        there = word in body or any(message["role"] == word for message in body["messages"])
        return (400, json.dumps({"error": {"message": said}})) if there else says("Numbers.")

    return answer


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_tokens", "max_tokens is not taken here, max_completion_tokens is"),
        ("temperature", "Unsupported value: 'temperature' does not support 0"),
        ("system", "System role not supported"),
    ],
)
def test_an_endpoint_is_spoken_to_in_its_own_terms(tmp_path, word, said):
    with Endpoint(refuses(word, said)) as endpoint:
        engine = model(endpoint.url, tmp_path)
        assert engine.explain(WINDOWS).text == "Numbers."
        assert engine.explain(shown("another", fires="another")).text == "Numbers."
        assert engine.spent == 100  # what was refused costs nothing
    assert len(endpoint.requests) == 3  # it was learnt once
    last = endpoint.requests[-1][2]
    assert "<< another>>" in last["messages"][-1]["content"]
    assert last.get("max_completion_tokens", last.get("max_tokens")) == LONGEST["explain"]


def test_a_question_that_is_too_long_leaves_its_feature_out_and_the_next_is_asked(tmp_path, text):
    activations = sparse.csc_array(np.stack([feature(text, " matrix"), feature(text, "(", ",")], 1))
    given = tasks(activations, np.array([0, 1]), text, decode)
    flags = json.dumps([1] * len(given[1].scored))
    long = (400, json.dumps({"error": {"message": "This model's maximum context length is 64 tokens"}}))
    left_out: dict[int, str] = {}
    with Endpoint(long, says("Brackets."), says(flags)) as endpoint:
        found = list(explain(model(endpoint.url, tmp_path), given, left_out))
    assert [explanation.feature for explanation in found] == [1]
    assert list(left_out) == [0]
    assert "maximum context length is 64" in left_out[0]


def test_where_all_features_are_left_out_the_run_ends_in_one_line(tmp_path):
    with Endpoint(cut_short()) as endpoint:
        engine = model(endpoint.url, tmp_path)
        for number in range(HOPELESS - 1):
            with pytest.raises(LeftOut):
                engine.explain(shown(f"word {number}", fires="word"))
        with pytest.raises(UserError, match=r"5 features in a row were left out \(m came to no end"):
            engine.explain(shown("one more", fires="one"))


def test_where_no_explanation_can_be_scored_the_run_ends_too(tmp_path):
    def answer(path, body):
        return says("Numbers.") if body["max_tokens"] == LONGEST["explain"] else says("no list")

    with Endpoint(answer) as endpoint:
        engine = model(endpoint.url, tmp_path)
        with pytest.raises(UserError, match="5 features in a row were left out"):
            for number in range(HOPELESS):
                described = engine.explain(shown(f"word {number}", fires="word"))
                with contextlib.suppress(LeftOut):
                    described.detect([["a"], [f"{number}"]])


def test_the_query_of_an_address_is_shown_nowhere(tmp_path):
    with Endpoint((404, "no")) as endpoint, pytest.raises(UserError) as error:
        model(endpoint.url + "?api-version=7", tmp_path).explain(WINDOWS)
    assert "api-version" not in str(error.value)
    for secret in ("https://user:word@host/v1", "https://host/v1?api_key=word", "https://host/v1?key=word"):
        with pytest.raises(ValueError, match="it holds a secret"):
            Explainer(base_url=secret, model="m", budget=5)


def test_an_endpoint_is_waited_for_as_long_as_it_says(tmp_path):
    waited = []
    with Endpoint((429, "slow down", {"Retry-After": "0.05"}), (503, "", {"Retry-After": "soon"}), says("Numbers.")) as endpoint:
        engine = model(endpoint.url, tmp_path)
        start = time.monotonic()
        assert engine.explain(WINDOWS).text == "Numbers."
        waited.append(time.monotonic() - start)
    assert len(endpoint.requests) == 3
    state = RetryCallState(None, None, (), {})
    for told, expected in ((30.0, 30.0), (1e6, LONGEST_WAIT), (0.0, engine.pause), (-1.0, engine.pause)):
        state.set_exception((_Passing, _Passing("busy", told), None))
        assert engine._wait(state) == expected


def test_a_redirection_is_followed(tmp_path):
    def answer(path, body):
        return says("Numbers.") if path == "/v2/chat/completions" else (308, "", {"Location": "/v2/chat/completions"})

    with Endpoint(answer) as endpoint:
        assert model(endpoint.url, tmp_path).explain(WINDOWS).text == "Numbers."


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirection_that_drops_the_question_is_said(tmp_path, status):
    said = rf"has moved \({status}, to http://127.0.0.1:\d+/v2\); correct base_url"
    with Endpoint((status, "", {"Location": "/v2/chat/completions"})) as endpoint, pytest.raises(UserError, match=said):
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/v1/chat/completions"),
        ("/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("?api-version=2024-06-01", "/v1/chat/completions?api-version=2024-06-01"),
    ],
)
def test_the_address_is_completed_where_it_has_to_be(tmp_path, suffix, path):
    with Endpoint(says("Numbers.")) as endpoint:
        assert model(endpoint.url + suffix, tmp_path).explain(WINDOWS).text == "Numbers."
    assert endpoint.requests[0][0] == path


@pytest.mark.parametrize(
    ("answer", "said", "asked"),
    [
        ((404, "404 page not found"), "page not found.*often ends in /v1", 1),
        ((402, '{"error": {"message": "insufficient credits"}}'), "402 .insufficient credits.; top the account up", 1),
        ((200, '{"error": {"message": "no credit is left", "code": 402}}'), "402 .no credit is left.", 1),
        ((200, 'data: {"choices": []}\n\ndata: [DONE]\n\n'), "a stream of events", 1),
        ((503, '{"error": {"message": "the model is being loaded"}}'), "503 .the model is being loaded.", 5),
        ((200, "<!doctype html><title>Sign in</title>"), "a page for people; correct base_url", 1),
        ((200, "Sign in", {"Content-Type": "text/html; charset=utf-8"}), "a page for people", 1),
        ((200, '{"model": "m", "message": {"content": "Numbers."}, "done": true}'), "an object of model, message, done", 1),
    ],
)
def test_an_endpoint_s_words_are_in_the_line_whatever_its_status(tmp_path, answer, said, asked):
    with Endpoint(answer) as endpoint:
        engine = model(endpoint.url, tmp_path)
        with pytest.raises(UserError, match=said) as error:
            engine.explain(WINDOWS)
    assert len(str(error.value).splitlines()) == 1
    assert len(endpoint.requests) == asked


@pytest.mark.parametrize("answer", [(200, "[]"), (200, '{"choices": []}'), (200, '{"choices": [7]}'), (200, '{"choices": [{}]}')])
def test_answers_without_an_answer_leave_the_feature_out(tmp_path, answer):
    with Endpoint(answer) as endpoint, pytest.raises(LeftOut):
        model(endpoint.url, tmp_path).explain(WINDOWS)


@pytest.mark.parametrize(("value", "sent"), [("sk-abc\n", "sk-abc"), ("  sk-abc  ", "sk-abc")])
def test_blanks_around_a_key_are_taken_off(tmp_path, monkeypatch, value, sent):
    monkeypatch.setenv("TEST_API_KEY", value)
    with Endpoint(says("Numbers.")) as endpoint:
        model(endpoint.url, tmp_path).explain(WINDOWS)
    assert endpoint.requests[0][1]["Authorization"] == f"Bearer {sent}"


@pytest.mark.parametrize("value", ["sk-\u200babc", "schlüssel", "two words", "sk\nabc"])
def test_a_key_that_can_be_none_is_said_before_anything_is_counted(tmp_path, monkeypatch, value):
    monkeypatch.setenv("TEST_API_KEY", value)
    with Endpoint(says("Numbers.")) as endpoint:
        engine = model(endpoint.url, tmp_path)
        with pytest.raises(UserError, match="TEST_API_KEY holds signs that no key has"):
            engine.explain(WINDOWS)
    assert engine.spent == 0
    assert endpoint.requests == []
    assert not (tmp_path / SPENT).is_file() or read_json(tmp_path / SPENT)["tokens"] == 0


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080", "socks5://127.0.0.1:1080"])
def test_a_proxy_that_can_not_be_used_is_one_line_or_goes_unused(tmp_path, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    with Endpoint(says("Numbers.")) as endpoint:
        with pytest.raises(UserError, match="a proxy of the environment can't be used"):
            model(endpoint.url, tmp_path / "one").explain(WINDOWS)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        assert model(endpoint.url, tmp_path / "two").explain(WINDOWS).text == "Numbers."


def test_a_model_that_is_called_rules_is_not_taken_for_the_rules(tmp_path):
    engine = LanguageModel(Explainer(base_url="https://nowhere", model="rules", budget=10), tmp_path)
    assert engine.name != Rules.name
