"""A chat model on this machine that explains features: what it is asked, says and is scored on, against its own logits."""

import shutil

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from sae_stability.errors import UserError
from sae_stability.explanations import LocalModel, Window, explain, local_model
from sae_stability.explanations.asking import LONGEST_EXPLANATION, detect_in_one_messages, explain_messages
from sae_stability.explanations.scoring import LeftOut
from sae_stability.explanations.windows import Task
from sae_stability.loading import load_study
from sae_stability.pipeline import Plan

CHAT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
WINDOWS = [Window([" the", " array", " of"], [0.0, 2.0, 0.0]), Window([" an", " array"], [0.0, 1.0])]
PIECES = [[" the", " array", " of"], [" a"], [" each", " axis", " is", " a", " float"]]


@pytest.fixture(scope="module")
def folder(model_folders, tmp_path_factory):
    """An untrained model with room for questions."""
    where = tmp_path_factory.mktemp("chat")
    shutil.copytree(model_folders["gpt2"], where, dirs_exist_ok=True)
    config = GPT2Config.from_pretrained(where, n_positions=2048)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).eval().save_pretrained(where)
    return where


def engine(folder, cache, template: str | None = CHAT) -> LocalModel:
    model = LocalModel(str(folder), cache)
    model._tokenizer.chat_template = template
    return model


def test_what_it_says_is_its_greedy_answer_to_the_conversation(folder, tmp_path):
    model = engine(folder, tmp_path)
    said = model.explain(WINDOWS)
    system, user = (message["content"] for message in explain_messages(WINDOWS))
    ids = model._tokenizer(f"[system] {system}\n[user] {user}\n[assistant] ", add_special_tokens=False).input_ids
    answer: list[int] = []
    with torch.inference_mode():
        while len(answer) < LONGEST_EXPLANATION and (not answer or answer[-1] != model._weights.generation_config.eos_token_id):
            answer.append(int(model._weights(torch.tensor([ids + answer])).logits[0, -1].argmax()))
    lines = [line.strip() for line in model._tokenizer.decode(answer, skip_special_tokens=True).splitlines() if line.strip()]
    assert (said.text if said else None) == (lines[0] if lines else None)


def test_where_it_finds_a_feature_is_read_off_yes_and_no_less_what_an_empty_piece_gives(folder, tmp_path):
    model = engine(folder, tmp_path)

    def leaning(piece: list[str]) -> float:
        system, user = (message["content"] for message in detect_in_one_messages("Arrays.", piece))
        ids = model._tokenizer(f"[system] {system}\n[user] {user}\n[assistant] ", add_special_tokens=False).input_ids
        likely = model._weights(torch.tensor([ids])).logits[0, -1].softmax(0)
        first = [{model._ids(word)[0] for word in words} for words in (local_model.YES, local_model.NO)]
        yes, no = (sum(likely[token] for token in words) for words in first)
        return float(yes.log() - no.log())

    with torch.inference_mode():
        expected = [leaning(piece) > leaning([]) for piece in PIECES]
    assert model.detect("Arrays.", PIECES) == expected
    assert model.detect("Arrays.", PIECES[::-1]) == expected[::-1]


def test_what_a_piece_gives_does_not_depend_on_the_others(folder, tmp_path):
    model = engine(folder, tmp_path)
    asked = [model._prompt(detect_in_one_messages("Arrays.", piece)) for piece in PIECES]
    together = model._leaning(asked)
    torch.testing.assert_close(together, torch.cat([model._leaning([ids]) for ids in asked]), atol=1e-4, rtol=1e-4)


def test_answers_for_many_features_at_once_are_those_of_each_alone(folder, tmp_path, monkeypatch):
    """In any order, and whatever stands beside them: questions of other lengths, and one that does not fit."""

    def said_of(model: LocalModel) -> list[str | None]:
        return [described and described.text for described in map(model.explain, features)]

    features = [WINDOWS[:1], WINDOWS * 9, *([window] for window in WINDOWS), WINDOWS]
    expected = said_of(engine(folder, tmp_path / "alone"))
    too_long, together, asked = [Window([" array"] * 3000, [1.0] * 3000)], engine(folder, tmp_path / "together"), []
    said = LocalModel._said
    monkeypatch.setattr(LocalModel, "_said", lambda self, questions: asked.append(len(questions)) or said(self, questions))
    monkeypatch.setattr(local_model, "BATCH", 3)
    assert sum(together.explain_ahead([too_long, *features])) == 4  # one of them is asked twice
    assert said_of(together) == expected
    assert len(set(expected)) > 1
    again = engine(folder, tmp_path / "together")
    assert list(again.explain_ahead(features[::-1])) == [3, 1]  # the same together, in whatever order they come
    assert said_of(again) == expected
    assert asked == [3, 1]


def test_answers_are_kept(folder, tmp_path, monkeypatch):
    first = engine(folder, tmp_path)
    said, found = first.explain(WINDOWS), first.detect("Arrays.", PIECES)
    monkeypatch.setattr(LocalModel, "_said", lambda *_: pytest.fail("asked again"))
    monkeypatch.setattr(LocalModel, "_leaning", lambda *_: pytest.fail("asked again"))
    again = engine(folder, tmp_path)
    assert (again.explain(WINDOWS), again.detect("Arrays.", PIECES)) == (said and type(said)(said.text, again), found)


def test_a_model_without_a_role_for_instructions_gets_them_from_the_user(folder, tmp_path):
    model = engine(folder, tmp_path, WITHOUT_SYSTEM)
    system, user = (message["content"] for message in explain_messages(WINDOWS))
    assert model._prompt(explain_messages(WINDOWS)) == model._ids(f"[user] {system}\n\n{user}\n[assistant] ")


def test_a_model_that_knows_no_conversation_gets_plain_text(folder, tmp_path):
    model = engine(folder, tmp_path, None)
    text = model._tokenizer.decode(model._prompt(explain_messages(WINDOWS)), skip_special_tokens=True)
    assert text.endswith("<<array>> of\n2. an<< array>>\n\nAnswer:") or text.endswith("Answer:")
    assert "[user]" not in text


def test_windows_that_do_not_fit_are_left_out_the_weakest_first(folder, tmp_path, monkeypatch):
    model = engine(folder, tmp_path)
    many, asked = [Window([" the", " array", f" {number}"], [0.0, 1.0, 0.0]) for number in range(400)], []
    monkeypatch.setattr(LocalModel, "_said", lambda self, questions: asked.extend(questions) or ["Arrays."])
    assert model.explain(many).text == "Arrays."
    assert len(asked[0]) + LONGEST_EXPLANATION <= 2048
    assert model._tokenizer.decode(asked[0]).count("<<") - 1 in range(20, 400)  # the instruction has one more
    with pytest.raises(LeftOut, match="its question is too long"):
        model.explain([Window([" array"] * 3000, [1.0] * 3000)])
    with pytest.raises(LeftOut, match="a piece is too long"):
        model.detect("Arrays.", [[" array"] * 3000])


def test_a_tokenizer_that_does_not_tell_yes_from_no_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalModel, "_ids", lambda self, text: [7])
    with pytest.raises(UserError, match="does not tell yes from no"):
        engine(folder, tmp_path).detect("Arrays.", PIECES)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        LocalModel(str(tmp_path / "nowhere"), tmp_path).explain(WINDOWS)


def test_another_model_under_the_same_name_is_asked_anew(folder, tmp_path):
    """Neither its answers nor the explanations of a study are those of the one before it."""
    where = shutil.copytree(folder, tmp_path / "model")
    study = load_study("quick", [f"explainer.model={where}"])

    def key() -> str:
        return next(iter(Plan(study).stage(f"{study.main.id}/explanations").entries.values()))

    first, at_first = engine(where, tmp_path / "answers").detect("Arrays.", PIECES), key()
    kept = {file.name for file in (tmp_path / "answers").iterdir()}
    assert engine(where, tmp_path / "answers").detect("Arrays.", PIECES) == first
    assert {file.name for file in (tmp_path / "answers").iterdir()} == kept
    model = GPT2LMHeadModel.from_pretrained(where)
    torch.nn.init.normal_(model.lm_head.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(where)
    engine(where, tmp_path / "answers").detect("Arrays.", PIECES)
    assert len({file.name for file in (tmp_path / "answers").iterdir()} - kept) == 1
    assert key() != at_first


def test_a_study_whose_explainer_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"explainer\.model: there is no folder .*nowhere"):
        _ = Plan(load_study("quick", [f"explainer.model={tmp_path / 'nowhere'}"])).stages


def test_explanations_are_scored_by_what_the_model_finds(folder, tmp_path, monkeypatch):
    scored = [Window([" array"], [1.0]), Window([" a"], [0.0]), Window([" array"], [2.0]), Window([" of"], [0.0])]
    monkeypatch.setattr(LocalModel, "_said", lambda self, questions: ["Arrays."] * len(questions))
    monkeypatch.setattr(LocalModel, "detect", lambda self, text, windows: [True, False, False, False])
    (found,) = explain(engine(folder, tmp_path), [Task(3, WINDOWS, scored)])
    assert (found.feature, found.text, found.precision, found.recall, found.balanced_accuracy) == (3, "Arrays.", 1.0, 0.5, 0.75)
