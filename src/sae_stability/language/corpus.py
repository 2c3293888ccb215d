"""Text: the embedded corpus, a text file or folder, or a Hugging Face dataset.

A corpus is a list of documents. It is split into training and evaluation *by document* and packed into contexts that
begin with BOS; BOS positions never reach an SAE.
"""

import ast
import gc
import hashlib
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from tqdm import tqdm

from sae_stability import places
from sae_stability.errors import UserError

EMBEDDED_PACKAGES = ("numpy", "scipy", "pandas", "matplotlib", "sympy", "networkx", "torch", "transformers")
EMBEDDED_SHA256 = "b9163110618962da8f7a188601e117ce7cfcabc06ec7749dae8d2d059ea0948d"
DATASET_FILES = (".json", ".jsonl", ".parquet", ".csv")
SHORTEST_DOCSTRING = 80  # characters; below that a docstring is a label, not prose
EVALUATION_SHARE = 0.12  # of the documents: one million tokens of the embedded corpus
CHARACTERS_A_TOKEN = 8  # more than tokenizers pack on average: how much of a large dataset is read


@dataclass(frozen=True)
class Corpus:
    name: str
    train: list[str]
    """Documents that language models and SAEs are trained on."""
    evaluation: list[str]
    """Held-out documents: no document stands in both."""
    sha256: str
    """Of all documents in order: two corpora with one hash are the same text."""


@dataclass(frozen=True)
class Contexts:
    """Packed text. A context is BOS, then documents end to end with a separator behind each."""

    tokens: Int[np.ndarray, "context position"]
    document: Int[np.ndarray, "context position"]
    """The document that each token comes from, for intervals that resample documents."""
    is_text: Bool[np.ndarray, "context position"]
    """False at BOS and separators, which no SAE sees."""

    def holding(self, tokens: int) -> int:
        """How many contexts, from the first, it takes to hold `tokens` text tokens; all where there are fewer."""
        return min(len(self.tokens), int(np.searchsorted(np.cumsum(self.is_text.sum(axis=1)), tokens)) + 1)

    def spread(self, tokens: int) -> "Contexts":
        """About `tokens` text tokens in contexts spread evenly over all, so that they meet many documents."""
        chosen = np.linspace(0, len(self.tokens) - 1, self.holding(tokens)).astype(int)
        return Contexts(self.tokens[chosen], self.document[chosen], self.is_text[chosen])


def load(name: str, characters: int | None = None) -> Corpus:
    """Read and split the corpus called `name`: `docstrings`, a path, or the id of a Hugging Face dataset.

    `characters` bounds what is read from a dataset, which may be larger than the disk.
    Raises `UserError` where there is no such text or it can't be split.
    """
    path = Path(name).expanduser()
    if name == places.CORPUS:
        documents = docstrings()
    elif path.is_file() and path.suffix not in DATASET_FILES:
        documents = _passages(path)
    elif path.is_dir() and any(path.rglob("*.txt")):
        documents = [_read(file) for file in sorted(path.rglob("*.txt"))]
    elif not path.exists() and (path.is_absolute() or name.count("/") > 1 or name.startswith(".") or path.suffix == ".txt"):
        raise UserError(f"corpus: there is no {name}; give '{places.CORPUS}', a text file or folder, or the id of a dataset")
    else:
        documents = _dataset(name, path, characters)
    documents = sorted({document.strip() for document in documents} - {""})
    if len(documents) < 2:
        raise UserError(
            f"corpus: {name} holds {len(documents)} document(s), and a split by document needs two or more; "
            "separate documents by blank lines, or give a folder of .txt files"
        )
    sha256 = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    if name == places.CORPUS and sha256 != EMBEDDED_SHA256:
        warnings.warn(
            f"corpus: the docstrings installed here have SHA-256 {sha256}, the published ones {EMBEDDED_SHA256}; "
            "numbers will differ a little; install requirements.lock to get the published corpus",
            stacklevel=2,
        )
    # In the order of their hashes documents are shuffled in the same way on every machine.
    documents.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
    held_out = max(1, round(EVALUATION_SHARE * len(documents)))
    return Corpus(name, train=documents[held_out:], evaluation=documents[:held_out], sha256=sha256)


def is_bounded(name: str) -> bool:
    """Whether no more of a corpus is read than is needed: of datasets, which may be larger than the disk."""
    path = Path(name).expanduser()
    plain = path.is_file() and path.suffix not in DATASET_FILES
    return not (name == places.CORPUS or plain or (path.is_dir() and any(path.rglob("*.txt"))))


def docstrings() -> list[str]:
    """The docstrings of the packages that `requirements.lock` installs anyway: real prose and real code, no network.

    Test suites are left out: they are many files with few words.
    """
    folders = [_package_folder(package) for package in EMBEDDED_PACKAGES]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py")) if "tests" not in file.relative_to(folder).parts]
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are millions of small objects without cycles: collecting them takes twice the parsing
    try:
        return sorted({text for file in tqdm(files, "docstrings", unit="file", disable=None) for text in _docstrings_in(file)})
    finally:
        if collecting:
            gc.enable()


def pack(documents: list[str], tokenizer, context: int) -> Contexts:
    """Tokenise `documents` and lay them end to end into rows of `context` tokens, each of which begins with BOS.

    The tail that fills no row is dropped. Raises `UserError` where the tokenizer has no BOS or EOS token.
    """
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise UserError("model: its tokenizer has neither a BOS nor an EOS token; set one in tokenizer_config.json")
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else bos
    batches = [tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in _batches(documents, 256)]
    encoded = [np.asarray([*ids, separator], dtype=np.int32) for ids in chain.from_iterable(batches)]
    stream = np.concatenate(encoded)
    origin = np.repeat(np.arange(len(encoded), dtype=np.int32), [len(ids) for ids in encoded])

    width = context - 1
    count = len(stream) // width
    rows, origins = (array[: count * width].reshape(count, width) for array in (stream, origin))
    tokens = np.concatenate([np.full((count, 1), bos, dtype=np.int32), rows], axis=1)
    document = np.concatenate([origins[:, :1], origins], axis=1)
    return Contexts(tokens, document, is_text=(tokens != bos) & (tokens != separator))


def _docstrings_in(file: Path) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates, and files that are broken on purpose
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in _statements(tree) if isinstance(node, documented))
    return [text for text in texts if text and len(text) >= SHORTEST_DOCSTRING]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """`node` and every statement below it; expressions hold no docstrings, and are most of a tree."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _statements(child)


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"corpus: {places.CORPUS} needs the package {package}; install requirements.lock")
    return Path(next(iter(spec.submodule_search_locations)))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except PermissionError:
        raise UserError(f"corpus: {path} may not be read; check its permissions") from None
    except UnicodeDecodeError as error:
        raise UserError(f"corpus: {path} is not UTF-8 (byte {error.start}); convert it, with iconv for example") from None
    if not text.strip():
        raise UserError(f"corpus: {path} is empty; give a file that holds text")
    return text


def _passages(path: Path) -> list[str]:
    """A file's documents stand between blank lines; in a file without any, each line is one."""
    text = _read(path)
    passages = text.replace("\r\n", "\n").split("\n\n")
    return passages if len(passages) > 1 else text.splitlines()


def _dataset(name: str, path: Path, characters: int | None) -> list[str]:
    from datasets import load_dataset, load_from_disk  # a second of imports that most studies don't need

    try:
        if path.is_file():
            kind = {".jsonl": "json"}.get(path.suffix, path.suffix[1:])
            rows = load_dataset(kind, data_files=str(path), split="train", streaming=True)
        elif path.is_dir() and (path / "state.json").exists():
            rows = load_from_disk(str(path))
        else:
            rows = load_dataset(name, split="train", streaming=True)
        return list(_texts(name, rows, characters))
    except UserError:
        raise
    except Exception as error:  # every backend of datasets raises its own kind
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"corpus: {name} can't be read as a text file, a folder or a dataset: {reason}") from None


def _texts(name: str, rows, characters: int | None) -> Iterator[str]:
    read = 0
    for row in rows:
        if "text" not in row:
            raise UserError(f"corpus: {name} has no column 'text' but {', '.join(row)}; rename the one that holds the text")
        text = row["text"] or ""
        yield text
        read += len(text)
        if characters is not None and read >= characters:
            return


def _batches(documents: list[str], size: int):
    return (documents[start : start + size] for start in range(0, len(documents), size))
