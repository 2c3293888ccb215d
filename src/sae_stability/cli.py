"""The command line: parses, calls, prints. A user's mistake ends in one line on standard error and exit status 2."""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sae_stability.config import UserError, load_study

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

USAGE_ERROR = typer.BadParameter.__base__.__base__  # ClickException: typer bundles its own click in newer releases

STUDY = Annotated[str, typer.Argument(help="A name in studies/, or the path of a .yaml file.")]
SET = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the study; dots reach inside. Repeatable."),
]
NAME = Annotated[str | None, typer.Option(help="Call the study so: its results go to results/NAME/.")]


@app.callback()
def about() -> None:
    """Which features of a sparse autoencoder come back under another seed.

    Start with: sae-stability run quick
    """


@app.command()
def run(
    study: STUDY,
    overrides: SET = None,
    name: NAME = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be computed, and compute nothing.")] = False,
) -> None:
    """Compute what is missing of a study, execute its chapters and build its book.

    An interrupted run goes on where it stopped: call it again. Examples:

      sae-stability run embedded --set seeds=4 --name four-seeds

      sae-stability run embedded --set model=PATH --set hook_name=blocks.1.hook_resid_post --name other
    """
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import book, stages
    from sae_stability.store import locked

    if dry_run:
        for stage in stages.plan(chosen):
            print("done   " if stages.Store(chosen).is_done(stage.name, stage.key) else "missing", stage.name)
        return
    with locked(stages.Store(chosen).folder / ".lock"):
        stages.compute(chosen)
        book.execute(chosen)
        with locked(book.SITE.parent / ".lock"):
            print(book.build(chosen))


@app.command()
def check(study: STUDY, overrides: SET = None, name: NAME = None) -> None:
    """Validate a study as a whole, its model, hook point and corpus included; compute nothing else."""
    chosen = load_study(study, overrides or (), name)
    _no_widgets()
    from sae_stability import stages

    stages.check(chosen)
    print(f"{chosen.name}: {len(chosen.cells)} cell(s), {len(chosen.seed_list)} seeds in the main one; nothing to mend")


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


def main() -> None:
    try:
        outcome = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except USAGE_ERROR as error:
        _fail(f"{error.format_message().rstrip('.')}; sae-stability --help lists what there is", 2)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail("the disk is full; what was computed is kept: free some space and call the same command again", 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; what was computed is kept, call the same command again to go on", 130)
    sys.exit(outcome if isinstance(outcome, int) else 0)


def _fail(message: str, status: int) -> None:
    print(f"sae-stability: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _no_widgets() -> None:
    """Before Transformers is imported: its progress bars for files would fill logs."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
