"""One member of a nested family as a checkpoint of its own: what ``invariance extract`` does."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..compress.nested import chosen, extract, family
from ..core.errors import InputError
from ..core.files import beside, write_json, write_text
from ..core.outputs import Claim, claimed
from ..core.progress import Progress, quiet
from ..io.basis_file import NAME, Basis, read_basis
from ..io.clients import misread, save_tokenizer
from ..io.export import cast
from ..io.models import licence, load_config, load_model, load_tokenizer
from ..model.labels import label
from ..recipe.recipe import Recipe
from ..report.card import card, gain, member, readme
from ..report.document import Report, Trained
from ..report.figures import write as write_figures
from ..report.grid import Grid
from ..report.page import figures, page
from ..report.reading import checked, load, read_spectra
from .document import stored_dtype
from .folder import RECOVERED, SLICED
from .nested_report import of_member

DOCUMENT = "extract.json"


def run(
    folder: Path, share: float, output: Path, *, overwrite: bool = False, progress: Progress = quiet
) -> dict[str, Any]:
    """Write a member's checkpoint, and its report where the family has one. Returns what was made.

    Raises InputError, with the members that there are, for one that there is not.
    """
    with claimed(output, overwrite=overwrite, reads=[folder]) as claim:
        return _run(folder, share, claim, progress)


def _run(folder: Path, share: float, output: Claim, progress: Progress) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder. Name one that a recipe with `nested` was run into."
        )
    model = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    config = load_config(str(model))
    try:
        chosen(family(config, str(folder)), share)
    except InputError as e:
        raise InputError(f"--width {share:g}: {e}") from None
    told = _told(model.parent / "report.json")
    sliced = _told(model.parent / SLICED) if told is None else None
    gained = _gained(model.parent / RECOVERED, share) if sliced is not None else None
    tokenizer = load_tokenizer(str(model))
    loaded = load_model(str(model))
    for each in progress([share], "cut the member", 1):
        made, why = extract(loaded, each)
    cast(made, stored_dtype(config) or loaded.dtype)
    document = {
        "version": version("invariance"),
        "family": str(folder),
        "share": share,
        "output": str(output.folder),
        "exported_as": made.config.model_type,
        "why_not_stock": why or None,
        "misread": [] if why else misread(made.config),
        "parameters": made.num_parameters(),
    }
    with output.writing() as place:
        made.save_pretrained(place / "model")
        if tokenizer is not None:
            save_tokenizer(tokenizer, place / "model")
        _write_basis(place, str(model), loaded, share, stock=not why)
        write_json(place / DOCUMENT, document)
        mine = None if sliced is None else of_member(sliced, share, made, why)
        source = {"name": str(folder)} if mine is None else mine["model"]
        source = {**source, "licence": source.get("licence") or licence(str(model))}
        of = None if mine is None else checked(Report, mine, SLICED)
        write_text(place / "model" / "README.md", member(document, source, of, gained))
        if mine is not None:
            write_json(place / SLICED, mine)
        if told is not None:
            _write_report(
                place,
                of_member(told, share, made, why) | {"output": str(output.folder)},
                model.parent,
            )
    return document


def _write_basis(
    place: Path, model: str, loaded: PreTrainedModel, share: float, stock: bool
) -> None:
    """Where the member's stream lies in the dense model's: the first directions of the family's basis, if it has one."""
    if beside(model, NAME) is None:
        return
    now, widths = label(loaded), chosen(loaded.config.form.nested, share)
    whole = read_basis(model, now)
    encode = {point: E[:, : now.width(point, widths)] for point, E in whole.encode.items()}
    left = now.blocks(widths) if stock else sorted({e.block for e in now.edges})
    Basis(encode, whole.points, whole.folded, whole.depth).write(place, left)


def _told(path: Path) -> dict[str, Any] | None:
    """A family's report, where there is one. Raises InputError where it cannot be read."""
    if not path.is_file():
        return None
    otherwise = "Copy it again from where it was made, or move it away to extract without a report."
    found: dict[str, Any] = load(path, otherwise)
    return found if checked(Report, found, str(path), otherwise).nested else None


def _gained(path: Path, share: float) -> Grid | None:
    """What recovery brought a member, where it was trained with its family. Raises InputError where that cannot be read."""
    if not path.is_file():
        return None
    otherwise = "Copy it again from where it was made, or move it away to extract without it."
    found = load(path, otherwise)
    found = found.get("recover") if isinstance(found, dict) else None
    trained = checked(Trained, found, f"{path}: recover", otherwise)
    held = trained.members.get(repr(share))
    return None if held is None else gain(held, trained)


def _write_report(place: Path, report: dict[str, Any], family: Path) -> None:
    """All that a run's folder holds beside its checkpoint, of the member."""
    try:
        spectra = read_spectra(family)
    except InputError:  # curves to look at, which the checkpoint does without
        spectra = {}
    told = checked(Report, report, str(family / "report.json"))
    drawn = figures(told, spectra)
    write_json(place / "report.json", report)
    write_json(place / "spectra.json", spectra)
    write_text(place / "report.html", page(told, spectra, drawn))
    write_figures(place / "figures", drawn)
    write_text(place / "recipe.yaml", Recipe.from_dict(report["recipe"]).to_yaml())
    write_text(place / "model" / "README.md", card(told))
    write_text(place / "README.md", readme(told, place))
