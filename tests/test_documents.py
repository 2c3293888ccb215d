"""What a corpus is gets decided by its content; what can't be read is one line."""

import bz2
import gzip
import json
import lzma

import pandas as pd
import pytest

from sae_stability.errors import UserError
from sae_stability.experiments.texts import _content
from sae_stability.language import corpus, documents
from sae_stability.language.documents import Name, read

TEXTS = [f"document number {number}\nhas two lines" for number in range(30)]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS))
TABLE = pd.DataFrame(ROWS)
PACKINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def written(path, content: str | bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(table: pd.DataFrame, path) -> bytes:
    table.to_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.ndjson", LINES),
        ("ROWS.JSONL", LINES),
        ("rows.json", LINES),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=2)),
        ("rows", LINES),
        ("rows.txt", LINES),
        ("rows.csv", TABLE.to_csv(index=False)),
        ("ROWS.CSV", TABLE.to_csv(index=False)),
        ("rows.tsv", TABLE.to_csv(index=False, sep="\t")),
        ("rows.csv", TABLE.to_csv(index=False, sep=";")),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("text.txt", "\n\n".join(TEXTS)),
        ("text.md", "\n \n".join(TEXTS)),
        ("text", "\n\t\n".join(TEXTS)),
        ("text.txt", "\r\n\r\n".join(TEXTS)),
        ("text.txt", "\r\r".join(TEXTS)),
    ],
)
def test_a_file_is_read_by_its_content_whatever_it_is_called(tmp_path, name, content, packing):
    path = written(tmp_path / f"{name}{packing}", PACKINGS[packing](content.encode()))
    found = read(Name.of(str(path)))
    assert [text.strip() for text in found.texts] == TEXTS
    assert found.told.startswith(path.name)
    assert ("column text" in found.told) == ("document" not in content.splitlines()[0] or content.startswith(("{", "[")))


@pytest.mark.parametrize("name", ["rows.parquet", "rows.PARQUET", "rows"])
def test_parquet_is_known_by_its_first_bytes(tmp_path, name):
    path = written(tmp_path / name, parquet(TABLE, tmp_path / "made"))
    assert read(Name.of(str(path))).texts == TEXTS


def test_columns_without_a_name_are_called_by_their_number(tmp_path):
    pd.DataFrame(TEXTS).to_parquet(tmp_path / "x.parquet")
    for name in ("x.parquet", "x.parquet?column=0"):
        assert read(Name.of(str(tmp_path / name))).texts == TEXTS


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_script_is_read(tmp_path, encoding):
    texts = ["山川犬猫 一つ", "二つ目 😀", "третий текст"]
    path = written(tmp_path / "text.txt", "\n\n".join(texts).encode(encoding))
    assert read(Name.of(str(path))).texts == texts


def test_a_file_without_blank_lines_has_a_document_a_line(tmp_path):
    assert read(Name.of(str(written(tmp_path / "t.txt", "one\ntwo\nthree")))).texts == ["one", "two", "three"]
    braces = "{ a set is\n\nwritten in braces }"
    assert read(Name.of(str(written(tmp_path / "t.txt", braces)))).texts == braces.split("\n\n")  # no JSON


def test_the_column_is_the_one_that_is_named_or_text_or_the_only_one_of_strings(tmp_path):
    two = written(tmp_path / "two.jsonl", json.dumps({"title": "a", "body": "b"}))
    with pytest.raises(UserError, match=r"no column 'text' but title, body; name one: .*\?column=NAME"):
        read(Name.of(str(two)))
    assert read(Name.of(f"{two}?column=body")).texts == ["b"]
    assert read(Name.of(str(written(tmp_path / "one.jsonl", json.dumps({"id": 3, "body": "b"}))))).texts == ["b"]
    with pytest.raises(UserError, match="no option colum behind the"):
        Name.of(f"{two}?colum=body")


@pytest.mark.parametrize(
    ("value", "said"), [(["a", "b"], "a list"), ({"a": 1}, "an object"), (7, "a number"), (True, "true or false")]
)
def test_what_is_no_text_is_said(tmp_path, value, said):
    path = written(tmp_path / "rows.jsonl", "\n".join(json.dumps({"text": each}) for each in ("first", value)))
    with pytest.raises(UserError, match=f"column 'text' of .* holds {said}"):
        read(Name.of(str(path)))
    with pytest.raises(UserError, match="for a row"):
        read(Name.of(str(written(tmp_path / "bare.jsonl", '"only"\n"strings"'))))


def test_a_list_in_a_document_is_no_corpus(tmp_path):
    article = {"body": "A long article, of which there is one, and which says more than a name does.", "authors": [{"name": "A"}]}
    path = written(tmp_path / "a.json", json.dumps(article))
    assert read(Name.of(f"{path}?column=body")).texts == [article["body"]]
    line = written(tmp_path / "b.jsonl", json.dumps({"content": "the text", "tags": ["x", "y"]}))
    assert read(Name.of(str(line))).texts == ["the text"]


def test_signs_that_end_a_line_elsewhere_end_none_here(tmp_path):
    texts = ["one\u2028two", "three\u0085four"]
    path = written(tmp_path / "u.jsonl", "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    assert read(Name.of(str(path))).texts == texts


def test_half_a_sign_is_none(tmp_path):
    path = written(tmp_path / "t.jsonl", "\n".join(json.dumps({"text": f"cut off \ud83d {n}"}) for n in range(30)))
    assert all("\ufffd" in text for text in read(Name.of(str(path))).texts)
    assert corpus.load(str(path)).train


def test_tabs_alone_divide_a_table_of_tabs_and_rows_are_not_cut_off(tmp_path):
    path = written(tmp_path / "t.tsv", "text\tlabel; one of, two\nleft, right\tx\n")
    assert read(Name.of(str(path))).texts == ["left, right"]
    longer = written(tmp_path / "t.csv", "text\nleft part, right part\n")
    with pytest.raises(UserError, match="can't be read as a table"):
        read(Name.of(str(longer)))


def test_a_user_that_is_not_there_is_no_traceback():
    with pytest.raises(UserError):
        corpus.load("~nobody-of-this-name/x.txt")


def test_rows_without_text_are_left_out(tmp_path):
    path = written(tmp_path / "rows.jsonl", "\n".join(json.dumps({"text": each}) for each in ("first", None, "", "last")))
    assert read(Name.of(str(path))).texts == ["first", "last"]


UNREADABLE = [
    ("broken.jsonl", '{"text": "a"}\n{"text": ', "line 2 of .* is no JSON"),
    ("empty.txt", "", "is empty"),
    ("blank.txt", " \n\t\n", "is empty"),
    ("latin.txt", "grün".encode("latin-1"), "not UTF-8"),
    ("cut.gz", gzip.compress(b"text " * 1000)[:-20], "can't be read"),
    ("cut.bz2", bz2.compress(b"text " * 1000)[:-20], "can't be read"),
    ("broken.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 40, "can't be read"),
    ("deep.json", "[" * 100_000, "nested too deeply|is no JSON"),
    ("text.zst", b"\x28\xb5\x2f\xfd0000", "packed with zstd"),
    ("text.zip", b"PK\x03\x040000", "a zip archive"),
    ("paper.pdf", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3", "is a PDF, which is not read"),
    ("bare.csv", "\n".join(f'"document {number} of a table that has no header at all",1' for number in range(3)), "add a header"),
    ("rows.csv", 'text\n"never closed', "can't be read as a table"),
    ("rows.parquet", b"PAR1 and no more", "can't be read as a table"),
]


# Named by their files: a gzip header holds the time, and every process of a run has to give a test the same name.
@pytest.mark.parametrize(("name", "content", "said"), UNREADABLE, ids=[name for name, _, _ in UNREADABLE])
def test_what_cannot_be_read_is_one_line(tmp_path, name, content, said):
    with pytest.raises(UserError, match=said) as error:
        read(Name.of(str(written(tmp_path / name, content))))
    assert len(str(error.value).splitlines()) == 1
    assert name in str(error.value)


def folder_of_texts(path, count=20):
    for number in range(count):
        written(path / f"{number:02}.txt", f"text number {number}")
    return path


def test_empty_files_of_a_folder_are_left_out_and_told(tmp_path):
    folder = folder_of_texts(tmp_path / "texts")
    written(folder / "empty.txt", "")
    (folder / "a folder.txt").mkdir()
    found = read(Name.of(str(folder)))
    assert len(found.texts) == 20
    assert [file.name for file in found.empty] == ["empty.txt"]
    assert "1 empty files are left out, such as empty.txt" in corpus.load(str(folder)).told


def test_a_dangling_link_in_a_folder_is_named(tmp_path):
    folder = folder_of_texts(tmp_path / "texts")
    (folder / "a.txt").symlink_to("/nowhere")
    with pytest.raises(UserError, match=r"a\.txt is a link to a file that is not there"):
        read(Name.of(str(folder)))


def test_files_that_describe_rows_are_not_read_for_them(tmp_path):
    for name in ("LICENSE.txt", "requirements.txt", "README.md"):
        written(tmp_path / "D" / name, "no row")
    written(tmp_path / "D" / "train.jsonl", LINES)
    assert read(Name.of(str(tmp_path / "D"))).texts == TEXTS


def test_a_folder_of_rows_is_read_whatever_its_files_are_called(tmp_path):
    written(tmp_path / "D" / "test.jsonl", LINES)
    written(tmp_path / "D" / "more" / "rows.csv.gz", gzip.compress(TABLE.to_csv(index=False).encode()))
    assert sorted(read(Name.of(str(tmp_path / "D"))).texts) == sorted(TEXTS * 2)


def test_a_folder_of_other_text_is_read_and_what_describes_rows_is_not(tmp_path):
    for number in range(3):
        written(tmp_path / "notes" / f"{number}.md", f"note {number}")
    assert len(read(Name.of(str(tmp_path / "notes"))).texts) == 3
    written(tmp_path / "notes" / "rows.jsonl", LINES)
    assert read(Name.of(str(tmp_path / "notes"))).texts == TEXTS


def test_configurations_and_splits_of_a_dataset_are_named_behind_a_question_mark(tmp_path):
    for name in "ab":
        written(tmp_path / "E" / f"{name}.jsonl", json.dumps({"text": name}))
    configs = "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    written(tmp_path / "E" / "README.md", configs)
    assert read(Name.of(f"{tmp_path / 'E'}?config=b")).texts == ["b"]
    with pytest.raises(UserError, match=r"name one: .*split=NAME"):
        read(Name.of(f"{tmp_path / 'E'}?config=b&split=validation"))


def test_only_files_that_are_read_change_a_key(tmp_path):
    folder = folder_of_texts(tmp_path / "texts")
    before = _content(str(folder))
    written(folder / ".DS_Store", b"x")
    written(folder / ".git" / "0.txt", b"x")
    written(folder / "notes.pdf", b"x")
    assert _content(str(folder)) == before
    folder.rename(tmp_path / "moved")
    assert _content(str(tmp_path / "moved")) == before
    written(tmp_path / "moved" / "00.txt", "another text")
    assert _content(str(tmp_path / "moved")) != before


def test_documents_that_repeat_others_are_told(tmp_path):
    path = written(tmp_path / "t.txt", "\n\n".join(["the same again"] * 500))
    with pytest.raises(UserError, match="holds 500 that are all the same"):
        corpus.load(str(path))
    written(path, "\n\n".join([*(f"paragraph {number}: {chr(97 + number % 26) * 9}" for number in range(40))] * 3))
    found = corpus.load(str(path))
    assert found.repeated == 80
    assert found.told == "40 documents from t.txt, between blank lines; 80 that repeat others are left out"


def test_a_misspelt_name_is_corrected_before_any_network_is_asked(monkeypatch):
    monkeypatch.setattr(documents, "_of_dataset", lambda *_: pytest.fail("a network is asked"))
    for name in ("docstring", "doctsrings"):
        with pytest.raises(UserError, match="did you mean docstrings"):
            corpus.load(name)


def test_a_folder_without_a_text_says_so(tmp_path):
    written(tmp_path / "pictures" / "one.png", b"\x89PNG\r\n")
    with pytest.raises(UserError, match="pictures holds no text"):
        read(Name.of(str(tmp_path / "pictures")))


def test_a_question_mark_may_be_part_of_a_name(tmp_path):
    assert read(Name.of(str(written(tmp_path / "why?.txt", "one\n\ntwo")))).texts == ["one", "two"]
    rows = written(tmp_path / "what?.jsonl", json.dumps({"body": "a", "id": 1, "text": "b"}))
    assert read(Name.of(f"{rows}?column=body")).texts == ["a"]
