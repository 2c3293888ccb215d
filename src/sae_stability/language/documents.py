"""Documents out of files, folders and datasets: what something is gets decided by its content, and told in one line.

A name can say more behind a question mark, as an address does: `folder?column=body`, `hub/id?config=en&split=validation`.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

import pandas as pd

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import exists, path_of, readings

OPTIONS = ("column", "split", "config")
COLUMN, SPLIT = "text", "train"
COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
"""How the first bytes of a compressed file begin."""
ARCHIVES = {b"\x28\xb5\x2f\xfd": "packed with zstd", b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive"}
PDF = b"%PDF"
WORDS = 8  # in the name of a column: one of more is a text, and the table has no header
"""How files begin that are not unpacked here."""
PARQUET = b"PAR1"
ENCODINGS = {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
PACKED = (".gz", ".bz2", ".xz")
ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PLAIN = (".txt", ".text", ".md", ".rst")
DELIMITERS = ",;\t|"
NAME = 40  # characters: a longer string is text, and no name or version
BESIDE = ("readme", "license", "licence", "requirements", "notice", "changelog", "citation")
"""Names of files that stand beside data and describe it."""
BLANK_LINE = re.compile(r"\n[^\S\n]*\n")  # by its look: blanks and tabs in it are not seen


@dataclass(frozen=True)
class Name:
    """What is to be read, as a study names it; of a corpus that is fetched by its name, the folder where it lies."""

    place: str
    column: str | None = None
    split: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, name: str) -> "Name":
        """A file whose name has a question mark is that file. Raises `UserError` for an option that there is none of."""
        there = (read for read in readings(name) if exists(path_of(read[0])))
        place, told = next(there, readings(name)[-1])
        options = dict(parse_qsl(told, keep_blank_values=True))
        for option in options:
            if option not in OPTIONS:
                raise UserError(f"corpus: there is no option {option} behind the ? of {name}; give {', '.join(OPTIONS)}")
        return cls(str(places.corpus(place)) if place in places.FETCHED_CORPORA else place, **options)

    @property
    def path(self) -> Path:
        return path_of(self.place)


@dataclass
class Documents:
    """What was read, and from what."""

    texts: list[str]
    told: str
    """From what, in a few words."""
    empty: list[Path] = field(default_factory=list)
    """Files that hold no text, which are left out."""


def is_dataset(name: Name) -> bool:
    """Whether a name is of a dataset that the library of that name reads, on the hub or on the disk."""
    return not name.path.is_file() and not (name.path.is_dir() and files(name.path) and not _is_of_library(name))


def files(folder: Path) -> list[Path]:
    """The files of a folder that are read: its texts, or else its files of rows. Hidden ones are not."""
    there = [file for file in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    there = [file for file in there if not file.is_dir()]
    if any(_suffix(file) in ROWS for file in there):  # what describes them is no text of theirs
        there = [file for file in there if file.stem.lower() not in BESIDE]
    for suffixes in (PLAIN[:1], ROWS, PLAIN):
        found = [file for file in there if _suffix(file) in suffixes]
        if found:
            return found
    return []


def read(name: Name, characters: int | None = None) -> Documents:
    """The documents of a file, a folder or a dataset. `characters` bounds what is read of a dataset.

    Raises `UserError` for what can't be read, and where no column holds text.
    """
    if not is_dataset(name):
        return _of_file(name.path, name.column) if name.path.is_file() else _of_folder(name)
    return _of_dataset(name, characters)


def _of_file(path: Path, column: str | None) -> Documents:
    content = _content(path)
    if content[:4] == PARQUET:
        return _of_rows(path, _table(path, pd.read_parquet, io.BytesIO(content)), column)
    text, suffix = _decoded(path, content), _suffix(path)
    if suffix in (".csv", ".tsv"):
        heading = text.lstrip().partition("\n")[0]
        between = "\t" if suffix == ".tsv" else max(DELIMITERS, key=heading.count)  # some countries' tables have semicolons
        table = _table(path, pd.read_csv, io.StringIO(text), sep=between, keep_default_na=False, index_col=False)
        return _of_rows(path, table, column)
    rows = _json_rows(path, text, column, must=suffix in (".json", ".jsonl", ".ndjson"))
    if rows is not None:
        return _of_rows(path, rows, column)
    passages = BLANK_LINE.split(re.sub(r"\r\n?", "\n", text))
    between = "between blank lines" if len(passages) > 1 else "one a line"
    return Documents(passages if len(passages) > 1 else passages[0].split("\n"), f"{path.name}, {between}")


def _of_folder(name: Name) -> Documents:
    """A text file is a document; of files of rows every row is one."""
    found, texts, empty, told = files(name.path), list[str](), list[Path](), ""
    for file in found:
        if not file.exists():
            raise UserError(f"corpus: {file} is a link to a file that is not there; take it away, or get the file again")
        content = _content(file, may_be_empty=True)
        if not content.strip():
            empty.append(file)
        elif _suffix(file) in PLAIN:
            texts.append(_decoded(file, content))
        else:
            of_file = _of_file(file, name.column)
            texts, told = texts + of_file.texts, of_file.told.partition(", ")[2]
    kind = f"{len(found) - len(empty):,} files" if told == "" else f"{len(found) - len(empty):,} files, {told}"
    return Documents(texts, f"{name.path.name}, {kind}", empty)


def _table(path: Path, read: Callable[..., pd.DataFrame], *arguments, **options) -> list[dict]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the heading would be cut off
            return read(*arguments, **options).rename(columns=str).to_dict("records")
    except Exception as error:  # pandas and pyarrow raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"corpus: {path} can't be read as a table ({reason}); mend it, or save it again") from None


def _of_rows(path: Path, rows: list, column: str | None) -> Documents:
    chosen = _column(path, rows[0] if rows else {}, column)
    return Documents([text for text in (_text(path, row, chosen) for row in rows) if text], f"{path.name}, column {chosen}")


def _column(path: Path | str, row: object, column: str | None) -> str:
    """The column that holds text: the one that is asked for, `text`, or the only one of strings."""
    if not isinstance(row, dict):
        raise UserError(f"corpus: {path} holds {_kind(row)} for a row, and should hold objects with a text each")
    strings = [key for key, value in row.items() if isinstance(value, str)]
    wanted = column or (COLUMN if COLUMN in row or len(strings) != 1 else strings[0])
    if wanted not in row:
        raise UserError(f"corpus: {path} has no column {wanted!r} but {', '.join(map(str, row))}; name one: {path}?column=NAME")
    if column is None and len(wanted.split()) > WORDS:
        raise UserError(f"corpus: {path} has a text where columns have their names; add a header, such as {COLUMN}")
    return wanted


def _text(path: Path | str, row: object, column: str) -> str:
    value = row.get(column) if isinstance(row, dict) else row
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, str):
        raise UserError(
            f"corpus: column {column!r} of {path} holds {_kind(value)} and should hold text; name another: ?column=NAME"
        )
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a sign is none


def _kind(value: object) -> str:
    named = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "nothing"}
    return named.get(type(value), "a number")


def _json_rows(path: Path, text: str, column: str | None, must: bool) -> list | None:
    """The rows of JSON, as a list or one a line; None for what is none. Where it `must` be JSON, a line that is not is said."""
    start = text.lstrip()[:1]
    if start not in ("{", "[") and not must:
        return None
    try:
        whole = json.loads(text)
        rows = whole if isinstance(whole, list) else _inside(whole, column or COLUMN) or [whole]
    except RecursionError:
        raise UserError(f"corpus: {path} is nested too deeply to be rows of text; save its text in a file of its own") from None
    except ValueError:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # JSON may hold other signs that end a line
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError:
                if not must:
                    return None
                raise UserError(f"corpus: line {number} of {path} is no JSON; mend it, or call the file .txt") from None
    return rows if must or (rows and isinstance(rows[0], dict)) else None


def _inside(whole: object, column: str) -> list | None:
    """The rows of an object that holds nothing but them: one list of objects with the column, and no text of its own."""
    if not isinstance(whole, dict) or any(isinstance(value, str) and len(value) > NAME for value in whole.values()):
        return None
    lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
    return lists[0] if len(lists) == 1 and column in lists[0][0] else None


def _content(path: Path, may_be_empty: bool = False) -> bytes:
    """The bytes of a file, unpacked."""
    try:
        content = path.read_bytes()
        for begin, unpack in COMPRESSED.items():
            content = unpack(content) if content.startswith(begin) else content
    except PermissionError:
        raise UserError(f"corpus: {path} may not be read; check its permissions") from None
    except (EOFError, ValueError, lzma.LZMAError, zlib.error, OSError) as error:
        reason = getattr(error, "strerror", None) or "damaged"
        raise UserError(f"corpus: {path} can't be read ({reason}); get the file again") from None
    for begin, archive in ARCHIVES.items():
        if content.startswith(begin):
            raise UserError(f"corpus: {path} is {archive}, which is not read; unpack it first")
    if content.startswith(PDF):
        raise UserError(f"corpus: {path} is a PDF, which is not read; save its text as a .txt file")
    if not content.strip() and not may_be_empty:
        raise UserError(f"corpus: {path} is empty; give a file that holds text")
    return content


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode(ENCODINGS.get(content[:2], "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"corpus: {path} is not UTF-8 (byte {error.start}); convert it, with iconv for example") from None


def _suffix(path: Path) -> str:
    """Of what a file holds, in lower case, without that of its packing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in PACKED), "")


def _is_of_library(name: Name) -> bool:
    """Whether a folder is one that the library of datasets wrote or describes itself to."""
    written = any((name.path / file).exists() for file in ("state.json", "dataset_dict.json"))
    return written or name.split is not None or name.config is not None


def _of_dataset(name: Name, characters: int | None) -> Documents:
    from datasets import load_dataset, load_from_disk  # a second of imports that most studies don't need

    split = name.split or SPLIT
    try:
        if name.path.is_dir() and any((name.path / file).exists() for file in ("state.json", "dataset_dict.json")):
            found = load_from_disk(str(name.path))
            rows: Iterable = found[split] if isinstance(found, dict) else found
        else:
            rows = load_dataset(name.place, name.config, split=split, streaming=True)
        iterator = iter(rows)
        first: object = next(iterator, {})
        column = _column(name.place, first, name.column)
        texts = list(_until(characters, (_text(name.place, row, column) for row in _chained(first, iterator))))
    except UserError:
        raise
    except Exception as error:  # every backend of datasets raises its own kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        mend = {"Bad split": f"; name one: {name.place}?split=NAME", "Config name": f"; name one: {name.place}?config=NAME"}
        hint = next((told for begin, told in mend.items() if reason.startswith(begin)), "")
        can_not = "can't be read as a text file, a folder or a dataset"
        if name.path.is_dir():
            can_not = "holds no text, and can't be read as a dataset"
        raise UserError(f"corpus: {name.place} {can_not}: {reason}{hint}") from None
    return Documents([text for text in texts if text], f"{name.place}, split {split}, column {column}")


def _chained(first: object, others: Iterator) -> Iterator:
    yield first
    yield from others


def _until(characters: int | None, texts: Iterable[str]) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if characters is not None and read >= characters:
            return
