"""Frees what results hold of earlier versions of a study: entries that no plan names any more."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from sae_stability import places
from sae_stability.errors import UserError
from sae_stability.files import below
from sae_stability.loading import read_study
from sae_stability.pipeline import Plan
from sae_stability.store import SCRATCH, Store, owned, size
from sae_stability.study import Study


def clean(study: Study, dry_run: bool = False) -> Iterator[str]:
    """Free the entries of `study`, and those that studies share, which no plan names; yield what is freed, in lines.

    The plans are those of `study` and of every other study with results here. Raises `UserError`, before anything is freed, where
    one of these can't be planned, such as for a text on a disk that is away: what it needs would count as needed by nobody.
    """
    named = _named(study)
    for written in sorted(places.results().glob("*/study.json")):
        if written.parent.name != study.name:
            try:
                named |= _named(read_study(written))
            except UserError as error:
                raise UserError(f"{written}: {error}; nothing is freed until that is mended, or this file removed") from None
    shared = places.results() / "_shared"
    stale = [entry for entry in (*owned(Store(study).folder), *owned(shared)) if entry not in named]
    chapters = Store(study).folder / "chapters"
    stale = [entry for entry in stale if entry.parent != chapters]  # the book decides what of them is up to date
    for entry in stale:
        yield f"{size([entry]) / 1e6:>10,.1f} MB  {entry.relative_to(places.results())}"
    yield f"{size(stale) / 1e6:>10,.1f} MB  in all{', would be freed' if dry_run else ', freed'}"
    if not dry_run:
        for entry in stale:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _named(study: Study) -> set[Path]:
    plan = Plan(study)
    entries = {plan.store.path(entry) for stage in plan.stages for entry in stage.entries}
    marks = {path.with_suffix(".provenance.json") for path in entries if path.suffix}
    unfinished = (plan.store.path(stage.group) for stage in plan.stages if not plan.is_done(stage))
    return entries | marks | {scratch for group in unfinished for scratch in below(group, SCRATCH)}
