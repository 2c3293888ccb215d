import hashlib
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_stability.errors import UserError
from sae_stability.language import corpus, installed
from sae_stability.language.corpus import load, pack


@pytest.fixture(scope="module")
def tokenizer(model_folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folders["gpt2"])


def test_the_split_is_the_same_every_time_and_by_document_where_none_are_alike(text_file):
    one, again = load(str(text_file)), load(str(text_file))
    assert one == again
    assert not set(one.train) & set(one.evaluation)
    assert len(one.evaluation) == round(corpus.EVALUATION_SHARE * (len(one.train) + len(one.evaluation)))
    assert one.moved == 0  # random words have no near-duplicates


def test_the_order_of_files_and_copies_of_documents_do_not_matter(tmp_path):
    for folder, names in (("a", "xyz"), ("b", "zyx")):
        (tmp_path / folder).mkdir()
        for name, text in zip(names, ("first text", "second text", "first text"), strict=True):
            (tmp_path / folder / f"{name}.txt").write_text(text)
    one, other = load(str(tmp_path / "a")), load(str(tmp_path / "b"))
    assert (one.train, one.evaluation, one.sha256) == (other.train, other.evaluation, other.sha256)
    assert len(one.train + one.evaluation) == 2


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A corpus and the variants of its documents: 200 documents have two, with another word in the place of one of 40."""
    rng = random.Random(0)
    words = [[f"w{rng.randrange(1000)}" for _ in range(40)] for _ in range(300)]
    variants = [{" ".join([*of[:place], "another", *of[place + 1 :]]) for place in rng.sample(range(40), 2)} for of in words[:200]]
    variants += [{" ".join(of)} for of in words[200:]]
    path = tmp_path_factory.mktemp("planted") / "text.txt"
    path.write_text("\n\n".join(sorted(set().union(*variants))))
    return load(str(path)), variants


def test_planted_near_duplicates_stand_on_one_side_in_one_cluster(planted):
    found, variants = planted
    cluster_of = dict(zip(found.evaluation, found.clusters, strict=True))
    whole = [len(of & set(cluster_of)) for of in variants]
    assert all(count in (0, len(of)) for count, of in zip(whole, variants, strict=True))
    assert any(count > 1 for count in whole)
    clusters = [{cluster_of[text] for text in of} for of in variants if of <= set(cluster_of)]
    assert all(len(numbers) == 1 for numbers in clusters)
    assert len(set().union(*clusters)) == len(clusters)


def test_held_out_documents_are_among_those_before_the_cut_and_the_rest_of_these_is_first_in_training(planted):
    found, variants = planted
    by_hash = sorted(set().union(*variants), key=lambda text: hashlib.sha256(text.encode()).digest())
    cut = round(corpus.EVALUATION_SHARE * len(by_hash))
    assert set(found.evaluation) < set(by_hash[:cut])
    assert found.train[: found.moved] == [text for text in by_hash[:cut] if text not in found.evaluation]
    assert found.train[found.moved :] == by_hash[cut:]


@settings(max_examples=30)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=12).map(" ".join), min_size=2, max_size=12, unique=True))
def test_the_order_of_documents_changes_no_cluster(documents):
    def groups(texts: list[str]) -> set[frozenset[str]]:
        cluster = corpus.near_duplicates(texts)
        return {frozenset(np.array(texts)[cluster == number]) for number in set(cluster)}

    assert groups(documents) == groups(documents[::-1])


def test_documents_meet_as_often_as_their_overlap_says():
    """Pairs of 5 words in which 1 of 3 shingles is shared, Jaccard index 1/3, meet with probability 1 - (1 - J^3)^128, 0.99."""
    pairs = 400
    documents = [f"{pair}a {pair}b {pair}c {pair}d {side}{pair}" for pair in range(pairs) for side in "xy"]
    cluster = corpus.near_duplicates(documents).reshape(pairs, 2)
    met = (cluster[:, 0] == cluster[:, 1]).mean()
    expected = 1 - (1 - (1 / 3) ** corpus.ROWS) ** corpus.BANDS
    assert met == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / pairs))
    assert len(set(cluster[:, 0])) == pairs  # and none of another pair


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40))
def test_a_cluster_is_held_out_if_all_of_it_stands_before_the_cut(drawn):
    cluster = np.unique(drawn, return_inverse=True)[1]
    held_out, cut = corpus.split(cluster)
    whole = [all(number < cut for number in np.flatnonzero(cluster == of)) for of in cluster]
    assert held_out.tolist() == whole
    wanted = round(corpus.EVALUATION_SHARE * len(drawn))
    assert cut >= wanted
    assert held_out.any()
    if cut > wanted:  # nothing stood before it as a whole: one cluster does now, which ends first
        assert len(set(cluster[held_out])) == 1
        assert not any(set(cluster) - set(cluster[end:]) for end in range(cut))


def test_near_duplicates_alone_are_split_one_by_one_with_a_warning(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join("a b c d e f g h i j k l m n".replace(letter, "z") for letter in "aby"))
    with pytest.warns(UserWarning, match="near-duplicates of each other"):
        found = load(str(tmp_path / "text.txt"))
    assert (len(found.train), len(found.evaluation), found.moved) == (2, 1, 0)


@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(1, 7),
    st.sampled_from([3, 1000]),
)
def test_the_leak_is_that_of_brute_force(train, held_out, length, chunk):
    def sequences(tokens: list[int]) -> list[tuple[int, ...]]:
        windows = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
        return [window for window in windows if 0 not in window]

    own, others = sequences(held_out), set(sequences(train))
    expected = sum(window in others for window in own) / len(own) if own else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "CHUNK", chunk)
        found = corpus.leak(np.array(train, dtype=np.int32), np.array(held_out, dtype=np.int32), length)
    assert found == pytest.approx(expected)


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
        ids = packed.tokens[(packed.cluster == number) & packed.is_text]
        assert tokenizer.decode(ids.tolist()) == text
    text = packed.sequence()
    assert text[text > 0].tolist() == (packed.tokens[packed.is_text] + 1).tolist()
    assert np.count_nonzero(text == 0) == np.count_nonzero(stream == tokenizer.eos_token_id)
    joined = pack(documents, tokenizer, 16, clusters=[number // 2 for number in range(20)])
    assert (joined.cluster == packed.cluster // 2).all()


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
    assert installed._docstrings_in(tmp_path / "m.py") == [f"{long} module", f"{long} class", f"{long} method"]
    (tmp_path / "broken.py").write_text("def (")
    assert installed._docstrings_in(tmp_path / "broken.py") == []


def test_another_embedded_corpus_gives_a_warning_that_names_its_hash(monkeypatch):
    monkeypatch.setattr(installed, "docstrings", lambda: ["one docstring", "another docstring"])
    with pytest.warns(UserWarning, match=corpus.EMBEDDED_SHA256) as warned:
        found = load("docstrings")
    assert found.sha256 in str(warned[0].message)


def test_code_is_the_python_files_of_what_the_lock_names(tmp_path, monkeypatch):
    files = {"mine/a.py": "a = 1", "mine/deep/b.py": "b = 2", "mine/tests/c.py": "left = out", "mine/data.txt": "no code"}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "mine-1.0.dist-info").mkdir()
    (tmp_path / "mine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (tmp_path / "mine-1.0.dist-info" / "RECORD").write_text("".join(f"{name},,\n" for name in [*reversed(files), "mine/gone.py"]))
    (tmp_path / "studies").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAE_STABILITY_ROOT", str(tmp_path))
    with pytest.raises(UserError, match=r"corpus: code needs requirements\.lock"):
        load("code")
    (tmp_path / "requirements.lock").write_text("--extra\nmine==1.0\n")
    found = load("code")
    assert sorted(found.train + found.evaluation) == ["a = 1", "b = 2"]
    assert found.told == "2 documents from the Python files of the packages that requirements.lock names"
    assert not corpus.is_bounded("code")
    assert installed.packages("code") == ("mine",)
    (tmp_path / "requirements.lock").write_text("mine==1.0\nyours==2.0\n")
    with pytest.raises(UserError, match=r"corpus: code needs the package yours; install requirements\.lock"):
        load("code")
