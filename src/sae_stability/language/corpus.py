"""Text: what the installed packages hold, a corpus that is fetched, a text file or folder, or a Hugging Face dataset.

A corpus is a list of documents. It is split into training and evaluation *by clusters of near-duplicate documents* and
packed into contexts that begin with BOS; BOS positions never reach an SAE.
"""

import hashlib
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from zlib import crc32

import numpy as np
import pandas as pd
from datasketch import MinHash
from jaxtyping import Bool, Int, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.language import documents, installed
from sae_stability.language.documents import Documents

EMBEDDED_SHA256 = "b9163110618962da8f7a188601e117ce7cfcabc06ec7749dae8d2d059ea0948d"
EVALUATION_SHARE = 0.12  # of the documents stand before the cut; those that are held out are among them
SHINGLE = 4  # words in a row
BANDS, ROWS = 128, 3  # of MinHash: documents of Jaccard index J meet with probability 1 - (1 - J^3)^128, a half at J = 0.18
SEQUENCE = 16  # tokens of which the leak of a split is counted
BROKEN = np.uint64(0)  # in the place of the hash of a sequence that is not within one document
CHUNK = 1 << 23  # training tokens looked at together for that: half a gigabyte
CHARACTERS_A_TOKEN = 8  # more than tokenizers pack on average: how much of a large dataset is read

INSTALLED = {
    places.CORPUS: lambda: Documents(installed.docstrings(), "the embedded corpus"),
    places.CODE: lambda: Documents(installed.code(), "the Python files of the packages that requirements.lock names"),
}
"""Corpora that need nothing but what is installed."""


@dataclass(frozen=True)
class Corpus:
    name: str
    train: list[str]
    """Documents that language models and SAEs are trained on."""
    evaluation: list[str]
    """Held-out documents: none has a near-duplicate in training."""
    clusters: list[int]
    """Of each held-out document, the cluster of near-duplicates that it belongs to."""
    moved: int
    """So many training documents, the first ones, a split by document alone would hold out. Behind them is what the shipped
    language models were trained on."""
    sha256: str
    """Of all documents in order: two corpora with one hash are the same text."""
    repeated: int
    """Documents that were left out, since they are the same as another."""
    told: str
    """How many documents were read and from what, for readers."""


@dataclass(frozen=True)
class Contexts:
    """Packed text. A context is BOS, then documents end to end with a separator behind each."""

    tokens: Int[np.ndarray, "context position"]
    cluster: Int[np.ndarray, "context position"]
    """The cluster of near-duplicate documents that each token comes from, for intervals that resample clusters. In training text,
    which nothing resamples, the number of the document."""
    is_text: Bool[np.ndarray, "context position"]
    """False at BOS and separators, which no SAE sees."""

    def holding(self, tokens: int) -> int:
        """How many contexts, from the first, it takes to hold `tokens` text tokens; all where there are fewer."""
        return min(len(self.tokens), int(np.searchsorted(np.cumsum(self.is_text.sum(axis=1)), tokens)) + 1)

    def spread(self, tokens: int) -> "Contexts":
        """About `tokens` text tokens in contexts spread evenly over all, so that they meet many documents."""
        chosen = np.linspace(0, len(self.tokens) - 1, self.holding(tokens)).astype(int)
        return Contexts(self.tokens[chosen], self.cluster[chosen], self.is_text[chosen])

    def sequence(self) -> Int[np.ndarray, "token"]:
        """The tokens in the order of the text, raised by 1; 0 stands between documents."""
        return np.where(self.is_text, self.tokens + 1, 0)[:, 1:].ravel()


def load(name: str, characters: int | None = None) -> Corpus:
    """Read and split the corpus called `name`: one that is installed or fetched, a path, or the id of a Hugging Face dataset.

    `characters` bounds what is read from a dataset, which may be larger than the disk.
    Documents are ordered by their hashes, which shuffles them in the same way on every machine. A cluster of near-duplicates is
    held out if all of it stands before a cut, at `EVALUATION_SHARE` of the documents. Where all are one cluster, as in text made
    from a template, documents are split one by one, with a warning.
    Raises `UserError` where there is no such text or it can't be split.
    """
    read = INSTALLED[name]() if name in INSTALLED else documents.read(named(name), characters)
    texts = sorted({text.strip() for text in read.texts} - {""})
    given = sum(1 for text in read.texts if text.strip())
    repeated = given - len(texts)
    told = f"{len(texts):,} documents from {read.told}"
    told += f"; {repeated:,} that repeat others are left out" if repeated else ""
    told += f"; {len(read.empty):,} empty files are left out, such as {read.empty[0].name}" if read.empty else ""
    if len(texts) < 2:
        same = f"{given:,} that are all the same" if repeated else f"{len(texts)} document(s)"
        raise UserError(
            f"corpus: {name} holds {same}, and a split by document needs two or more that differ; "
            "separate documents by blank lines, or give a folder of .txt files"
        )
    sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    if name == places.CORPUS and sha256 != EMBEDDED_SHA256:
        warnings.warn(
            f"corpus: the docstrings installed here have SHA-256 {sha256}, the published ones {EMBEDDED_SHA256}; "
            "numbers will differ a little; install requirements.lock to get the published corpus",
            stacklevel=2,
        )
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    cluster = near_duplicates(texts)
    if cluster.max() == 0:
        warnings.warn(
            f"corpus: all documents of {name} are near-duplicates of each other, so they are split one by one: "
            "held-out text is much like the training text",
            stacklevel=2,
        )
        cluster = np.arange(len(texts))
    held_out, cut = split(cluster)
    train, evaluation = ([texts[number] for number in np.flatnonzero(side)] for side in (~held_out, held_out))
    return Corpus(name, train, evaluation, cluster[held_out].tolist(), cut - len(evaluation), sha256, repeated, told)


def near_duplicates(documents: list[str]) -> Int[np.ndarray, "document"]:
    """The cluster of each document: documents that a chain of near-duplicates joins.

    Near-duplicates share shingles, `SHINGLE` words in a row. They are found by MinHash with banding (Leskovec, Rajaraman & Ullman,
    Mining of Massive Datasets, chapter 3): two documents are joined if one band of their signatures is the same, without a look
    at all pairs. Time grows linearly with the text; memory is 1.5 kB a document.

    Shingles and bands were chosen on the embedded corpus, of which a split by document alone holds out 1.12 M tokens, with 27.7 %
    of the 16-token sequences seen in training. Shingles of 10, 8, 5, 4 and 3 words leave 736, 715, 630, 594 and 539 thousand
    tokens, and 9.98, 9.17, 7.32, 6.35 and 5.75 %: with 3 a point less costs twice the text that it costs before. Bands of two
    hashes do no better, and would join any documents by chance once there are a million.
    """
    sketches = MinHash.generator(map(_shingles, documents), num_perm=BANDS * ROWS, hashfunc=crc32)
    signatures = np.stack([sketch.hashvalues for sketch in sketches])
    joined = []
    for band in np.split(signatures, BANDS, axis=1):
        keys = np.ascontiguousarray(band).view(f"V{ROWS * band.itemsize}").ravel().tolist()
        firsts: dict[bytes, int] = {}  # the first document of each bucket
        first = np.array([firsts.setdefault(key, number) for number, key in enumerate(keys)])
        others = np.flatnonzero(first != np.arange(len(documents)))
        joined.append(np.stack([first[others], others]))
    ends = np.concatenate(joined, axis=1)
    graph = coo_array((np.ones(ends.shape[1]), tuple(ends)), shape=(len(documents), len(documents)))
    return connected_components(graph, directed=False)[1]


def split(cluster: Int[np.ndarray, "document"]) -> tuple[Bool[np.ndarray, "document"], int]:
    """Which documents are held out, and how many stand before the cut: those whose `cluster` stands before it as a whole.

    Where there is none, as may be among few documents, the cut moves behind the first cluster that ends.
    """
    last = np.zeros(cluster.max() + 1, dtype=int)
    np.maximum.at(last, cluster, np.arange(len(cluster)))
    cut = max(round(EVALUATION_SHARE * len(cluster)), int(last.min()) + 1)
    return last[cluster] < cut, cut


def leak(train: Int[np.ndarray, "place"], held_out: Int[np.ndarray, "token"], length: int = SEQUENCE) -> float:
    """The share of held-out sequences of `length` tokens that stand in the training text too; 0 where no document is so long.

    Tokens are positive, and 0 stands between documents: sequences lie within one. Sequences are compared by their hashes.
    """
    own = _sequences(held_out, length)
    seen = np.zeros(len(own), dtype=bool)
    for start in range(0, len(train), CHUNK):
        seen |= pd.Series(own).isin(_sequences(train[start : start + CHUNK + length - 1], length)).to_numpy()
    return float(seen[own != BROKEN].sum() / max(1, (own != BROKEN).sum()))


def _sequences(tokens: Int[np.ndarray, "token"], length: int) -> UInt64[np.ndarray, "place"]:
    """A hash for the sequence of `length` tokens at each place, `BROKEN` where a 0 is among them.

    A sum of tokens by odd random factors, modulo 2^64: two sequences that differ in one token never collide, others with a
    probability of about 2^-64 a pair.
    """
    factors = np.random.default_rng(0).integers(1 << 63, size=length, dtype=np.uint64) * 2 + 1
    places = max(0, len(tokens) - length + 1)
    codes, whole = np.zeros(places, dtype=np.uint64), np.ones(places, dtype=bool)
    for offset, factor in enumerate(factors):
        there = tokens[offset : offset + places]
        codes += there.astype(np.uint64) * factor
        whole &= there > 0
    return np.where(whole, codes, BROKEN)


def _shingles(document: str) -> set[bytes]:
    words = document.split()
    return {" ".join(words[start : start + SHINGLE]).encode() for start in range(max(1, len(words) - SHINGLE + 1))}


def characters(tokens: int, evaluation_tokens: int) -> int:
    """How much of a dataset fills both splits: so many training tokens, and so many that are held out."""
    return round(CHARACTERS_A_TOKEN * max(tokens / (1 - EVALUATION_SHARE), evaluation_tokens / EVALUATION_SHARE))


def is_bounded(name: str) -> bool:
    """Whether no more of a corpus is read than is needed: of datasets, which may be larger than the disk."""
    return name not in INSTALLED and documents.is_dataset(documents.Name.of(name))


def named(name: str) -> documents.Name:
    """Raises `UserError` for a path at which there is nothing, before any network is asked."""
    found = documents.Name.of(name)
    place = found.place
    if not found.path.exists():
        if found.path.parent == places.corpus(""):
            raise UserError(f"corpus: {found.path.name} is not here yet; run sae-stability fetch-corpus {found.path.name}")
        if found.path.is_absolute() or place.count("/") > 1 or place.startswith(".") or found.path.suffix == ".txt":
            raise UserError(f"corpus: there is no {place}; give '{places.CORPUS}', a text file or folder, or the id of a dataset")
        near = get_close_matches(place, [*INSTALLED, *places.FETCHED_CORPORA], cutoff=0.75)
        if near:
            raise UserError(f"corpus: there is no {place}; did you mean {near[0]}?")
    return found


def pack(documents: list[str], tokenizer, context: int, clusters: list[int] | None = None) -> Contexts:
    """Tokenise `documents` and lay them end to end into rows of `context` tokens, each of which begins with BOS.

    Without `clusters` each document is one. The tail that fills no row is dropped. Raises `UserError` where the tokenizer has no
    BOS or EOS token.
    """
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise UserError("model: its tokenizer has neither a BOS nor an EOS token; set one in tokenizer_config.json")
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else bos
    batches = [tokenizer(batch, add_special_tokens=False)["input_ids"] for batch in _batches(documents, 256)]
    encoded = [np.asarray([*ids, separator], dtype=np.int32) for ids in chain.from_iterable(batches)]
    stream = np.concatenate(encoded)
    numbers = np.arange(len(encoded)) if clusters is None else np.array(clusters)
    origin = np.repeat(numbers.astype(np.int32), [len(ids) for ids in encoded])

    width = context - 1
    count = len(stream) // width
    rows, origins = (array[: count * width].reshape(count, width) for array in (stream, origin))
    tokens = np.concatenate([np.full((count, 1), bos, dtype=np.int32), rows], axis=1)
    cluster = np.concatenate([origins[:, :1], origins], axis=1)
    return Contexts(tokens, cluster, is_text=(tokens != bos) & (tokens != separator))


def _batches(documents: list[str], size: int):
    return (documents[start : start + size] for start in range(0, len(documents), size))
