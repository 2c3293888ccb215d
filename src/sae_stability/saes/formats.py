"""SAEs in the files of other libraries: read by `load`, written for SAELens and sparsify by `save`.

`libraries/` says what each library computes from its tensors; `reading.py` checks that a file has them.
"""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sae_stability.errors import UserError
from sae_stability.files import read_metadata, save_tensors, write_json
from sae_stability.saes import variant
from sae_stability.saes.ensemble import Ensemble
from sae_stability.saes.libraries import dictionary_learning, saelens, scopes, sparsify
from sae_stability.saes.reading import INDEX, WEIGHTS, About, Loaded, Weights, directions_only
from sae_stability.saes.sae import SAE

FORMATS = ("saelens", "sparsify")
SAELENS_FORMAT = "6.0.0"  # that a file is of: SAELens takes one that says nothing for an older one, and drops its metadata
READERS: dict[str, Callable[[Path], Loaded]] = {
    saelens.WEIGHTS: saelens.read,
    sparsify.WEIGHTS: sparsify.read,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
    scopes.GEMMA: scopes.read_gemma,
    scopes.GEMMA_2: scopes.read_gemma,
    **dict.fromkeys(scopes.OPENMOSS, scopes.read_openmoss),
}
"""By the name that the weights have in an SAE's folder."""
CONFIGS = {
    saelens.WEIGHTS: (saelens.CONFIG, "config.json"),
    sparsify.WEIGHTS: (sparsify.CONFIG,),
    dictionary_learning.WEIGHTS: (dictionary_learning.CONFIG,),
}
"""The files beside them, by one of which a file of weights that is given is known for an SAE of that library."""
NO_CONFIG = (scopes.GEMMA, scopes.GEMMA_2)  # known by their names alone
ENSEMBLE = "ensemble.safetensors"  # of a study of this project: all of its seeds
SHOWN = 5  # folders that a message names


def load(path: Path | str) -> Loaded:
    """Read an SAE: a folder of one of the `libraries`, or a file of weights with a named decoder. Weights come out in float32.

    Where the encoder is not understood, or a file holds a decoder only, the SAE has no `variant`: its directions can be compared,
    and it does not fire; `about.encoder` says why.

    Raises `UserError` for anything else: no such file, a folder without an SAE, a damaged or pickled file, weights that are not
    finite or that don't fit each other, a k that can't be, a transcoder or crosscoder, and an ensemble of several SAEs.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: {_missing(path)}")
    if path.is_dir():
        return _from_folder(path)
    if path.name in READERS and (path.name in NO_CONFIG or _configured(path)):
        return READERS[path.name](path.parent)
    if path.suffix not in WEIGHTS and not path.name.endswith(INDEX):
        raise UserError(f"{path}: other files than {', '.join(WEIGHTS)} are not read; give an SAE's folder, or one of these")
    return directions_only(Weights.read(path).directions(), About(path))


def load_all(path: Path | str) -> dict[str, SAE]:
    """The SAEs of a path, by what tells them apart: one, without a name, or all seeds of an ensemble that a study trained.

    Raises `UserError` as `load` does.
    """
    file = Path(path)
    file = file / ENSEMBLE if (file / ENSEMBLE).is_file() else file
    if file.is_file() and file.suffix == ".safetensors" and _of_this_project(file):
        ensemble = Ensemble.open(file)
        return {f"seed {seed}": ensemble.dictionary(position) for position, seed in enumerate(ensemble.seeds)}
    return {"": load(path)}


def save(sae: SAE, path: Path | str, format: str = "saelens", metadata: dict | None = None) -> None:
    """Write an SAE to the folder `path` so that SAELens, or sparsify, loads it, with `metadata` (JSON values) in its configuration.

    SAELens takes every variant (batchtopk and matryoshka as jumprelu with one threshold, as it saves them itself); sparsify takes
    topk only. Raises `UserError` for other formats and variants.
    """
    if format not in FORMATS:
        raise UserError(f"format: {format} cannot be written; use {' or '.join(FORMATS)}")
    if sae.variant is None:
        raise UserError("SAE: it has no encoder, and cannot be written as one; give an SAE that encodes")
    if sae.removed is not None:
        raise UserError("SAE: features were removed from it, which no file can say; write the whole SAE")
    path = Path(path)
    d_sae, d_in = sae.W_dec.shape
    if format == "sparsify":
        if sae.variant != "topk":
            raise UserError(f"format: sparsify has topk only, and this SAE is {sae.variant}; use format saelens")
        names = {"W_enc_rows": "encoder.weight", "b_enc": "encoder.bias"}
        config = {
            "activation": "topk",
            "num_latents": d_sae,
            "expansion_factor": max(1, d_sae // d_in),
            "k": sae.k,
            "metadata": metadata or {},
        }
        config |= {"normalize_decoder": True, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": d_in}
        state = {names.get(name, name): tensor for name, tensor in sae.parameters._asdict().items()}
        _write(path, sparsify.WEIGHTS, state, config)
        return
    config = variant(sae.variant)(sae.k or 0).saelens()
    config |= {"d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu"}
    config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
    config["metadata"] = {"sae_lens_version": SAELENS_FORMAT} | (metadata or {})
    _write(path, saelens.WEIGHTS, sae.parameters.exported(), config)


def _write(folder: Path, name: str, state: dict[str, Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cfg.json", config)
    save_tensors(folder / name, state, {})


def _of_this_project(file: Path) -> bool:
    """Whether a file holds an ensemble."""
    try:
        return isinstance(read_metadata(file).get("seeds"), list)
    except Exception:  # whatever it is, `load` says what is wrong with it
        return False


def _configured(path: Path) -> bool:
    return any((path.parent / config).is_file() for config in CONFIGS.get(path.name, ()))


def _from_folder(folder: Path) -> Loaded:
    """Of a library that is known by the names of its files; of another the directions, if there is one file of weights."""
    known = next((name for name in READERS if (folder / name).is_file()), None)
    if known is not None:
        return READERS[known](folder)
    if (folder / ENSEMBLE).is_file():
        raise UserError(
            f"{folder}: it holds all SAEs of an ensemble; give it to a command that takes several, or save one as a file"
        )
    dangling = next((name for name in READERS if (folder / name).is_symlink()), None)
    if dangling is not None:
        raise UserError(f"{folder / dangling}: a link to a file that is not there; get the file again")
    files = sorted(file for file in folder.iterdir() if file.name.endswith(INDEX)) or sorted(
        file for file in folder.iterdir() if file.suffix in WEIGHTS and file.is_file()
    )
    if len(files) == 1:
        about = About(folder, encoder=f"{files[0].name} is of no library that is known here, so its encoder is not taken")
        return directions_only(Weights.read(files[0]).directions(), about)
    raise UserError(f"{folder}: no SAE in this folder; it should hold one of {', '.join(READERS)}{_below(folder)}")


def _missing(path: Path) -> str:
    """What to say of a path at which there is nothing."""
    if path.is_symlink():
        return "a link to a file that is not there; get the file again"
    if ":/" in str(path)[:8]:  # a Path has one slash of an address
        return "SAEs are read from this machine; download it, and give its folder"
    if any(sign in str(path) for sign in "*?["):
        return "nothing here matches this pattern; check the folder"
    if "," in str(path) and all(Path(part).exists() for part in str(path).split(",") if part):
        return "no such file or folder; separate paths by blanks, not commas"
    return "no such file or folder; check the path"


def _below(folder: Path) -> str:
    """Where SAEs lie below a folder, as a hint."""
    found = sorted({file.parent for name in READERS for file in folder.rglob(name)})
    if not found:
        return ""
    if len(found) == 1:
        return f"; there is one in {found[0]}"
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"; there are {len(found)} below it: give them by their paths, such as {', '.join(map(str, found[:SHOWN]))}{more}"
