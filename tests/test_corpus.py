import numpy as np
import pytest

from sae_stability.errors import UserError
from sae_stability.language import corpus
from sae_stability.language.corpus import load, pack


@pytest.fixture(scope="module")
def tokenizer(model_folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folders["gpt2"])


def test_the_split_is_by_document_and_the_same_every_time(text_file):
    one, again = load(str(text_file)), load(str(text_file))
    assert one == again
    assert not set(one.train) & set(one.evaluation)
    assert len(one.evaluation) == round(corpus.EVALUATION_SHARE * (len(one.train) + len(one.evaluation)))


def test_the_order_of_files_and_copies_of_documents_do_not_matter(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "zyx")):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("first text", "second text", "first text"), strict=True):
            (tmp_path / folder / f"{name}.txt").write_text(text)
    one, other = load(str(tmp_path / "a")), load(str(tmp_path / "b"))
    assert (one.train, one.evaluation, one.sha256) == (other.train, other.evaluation, other.sha256)
    assert len(one.train + one.evaluation) == 2


def test_packing_keeps_every_token_in_order_behind_bos(tokenizer):
    documents = [f"document {number} the sum of the axis" for number in range(20)]
    packed = pack(documents, tokenizer, context=16)
    assert (packed.tokens[:, 0] == tokenizer.bos_token_id).all()
    stream = packed.tokens[:, 1:].ravel()
    expected = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert stream.tolist() == expected[: len(stream)]
    assert len(expected) - len(stream) < 15
    special = np.isin(packed.tokens, [tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert (packed.is_text == ~special).all()
    for number, text in enumerate(documents[:10]):
        ids = packed.tokens[(packed.document == number) & packed.is_text]
        assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(
    ("content", "named"),
    [(b"", "empty"), (b"\n \n", "empty"), (b"caf\xe9 \xff", "not UTF-8"), (b"one document on one line", "by blank lines")],
)
def test_unusable_files_are_said_in_one_line(tmp_path, content, named):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=named) as error:
        load(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_dataset_on_disk_is_read_like_its_texts(tmp_path):
    from datasets import Dataset

    texts = [f"text number {number}" for number in range(30)]
    Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    Dataset.from_dict({"text": texts}).to_json(tmp_path / "rows.jsonl")
    (tmp_path / "plain.txt").write_text("\n\n".join(texts))
    loaded = [load(str(tmp_path / name)) for name in ("saved", "rows.jsonl", "plain.txt")]
    assert len({found.sha256 for found in loaded}) == 1


@pytest.mark.parametrize("name", ["no/such-thing", "missing.txt", "/no/such/folder", "./neither"])
def test_a_name_that_is_nothing_is_said(name):
    with pytest.raises(UserError, match=f"corpus: .*{name}"):
        load(name)


def test_docstrings_are_found_wherever_they_stand(tmp_path):
    long = "x" * 100
    source = f'"""{long} module"""\nif True:\n    class A:\n        """{long} class"""\n'
    source += f'        async def f(self):\n            """{long} method"""\n'
    (tmp_path / "m.py").write_text(source + 'def g():\n    """too short"""\n')
    assert corpus._docstrings_in(tmp_path / "m.py") == [f"{long} module", f"{long} class", f"{long} method"]
    (tmp_path / "broken.py").write_text("def (")
    assert corpus._docstrings_in(tmp_path / "broken.py") == []


def test_another_embedded_corpus_gives_a_warning_that_names_its_hash(monkeypatch):
    monkeypatch.setattr(corpus, "docstrings", lambda: ["one docstring", "another docstring"])
    with pytest.warns(UserWarning, match=corpus.EMBEDDED_SHA256) as warned:
        found = load("docstrings")
    assert found.sha256 in str(warned[0].message)
