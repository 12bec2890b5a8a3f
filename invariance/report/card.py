"""The model card beside a checkpoint: what was done to it, what was lost, what it costs, whose it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import evaluations, pages, sentences
from .document import Held, Model, Report, Trained
from .grid import Grid
from .page import COLUMNS, yaml_text
from .reading import checked
from .units import count, plain

FILES = {
    "model": "the checkpoint (safetensors), its config, tokenizer and model card",
    "report.html": "everything measured, to read in a browser",
    "report.json": "the same, to read by a program",
    "figures": "what the report draws, as SVG and PDF files",
    "spectra.json": "the energy of every direction of every basis",
    "basis.safetensors": "the basis of the residual stream, which invariance recover needs to compare streams",
    "recover": "the curves of recovery",
    "recipe.yaml": "the recipe in full",
}


def card(report: Report) -> str:
    """The README.md of a checkpoint's folder, as model hubs read it: metadata, then Markdown."""
    return _card(
        report.model,
        title=f"{report.model.name}, sliced",
        lead=sentences.summary(report),
        how=sentences.checkpoint(report.model, report),
        costs=_costs(report),
        members=evaluations.members(report),
        worth=evaluations.grids(report),
        samples=evaluations.samples(report),
        exactness=sentences.exactness(report),
        commands=sentences.commands(report),
        recipe=yaml_text(report.recipe),
        version=report.version,
    )


def recovered(
    document: Mapping[str, Any], source: Mapping[str, Any], sliced: Report | None = None
) -> str:
    """The card of a checkpoint that was trained on. ``document`` is its recover.json, ``source`` the ``name``, ``origin``
    and ``licence`` of what its weights come from, ``sliced`` the report of the run that made the model which was
    trained, where that is known."""
    trained = checked(Trained, document["recover"], "recover.json: recover")
    made = {**source, "why_not_stock": None, **document["exported"]}
    local = trained.local_tokens
    stages = f", after stages one by one on {count(local)} tokens" if local else ""
    said = (
        f"{document['model']}, trained on {count(trained.tokens)} tokens{stages} ({trained.weights}, "
        f"{count(trained.trained_parameters)} parameters, {trained.steps} steps); shapes and size are as they were: "
        f"{made['parameters']:,} stored parameters."
    )
    return _card(
        checked(Model, made, str(source["name"])),
        title=f"{_title(document['model'])}, recovered",
        lead=said,
        worth=[gain(trained.held_out, trained)],
        teacher=document["teacher"],
        options=yaml_text(document["options"]),
        version=document["version"],
        **_slice(sliced),
    )


def member(
    document: Mapping[str, Any],
    source: Mapping[str, Any],
    sliced: Report | None = None,
    gained: Grid | None = None,
) -> str:
    """The card of a member of a nested family that no report of its own tells of. ``document`` is its extract.json,
    ``source`` as in ``recovered``, ``sliced`` the report of the run that made the family, of this member, where it was
    trained since, and ``gained`` what that has brought."""
    made = {**source, **document, "stock": not document["why_not_stock"], "name": source["name"]}
    share, family = f"{document['share']:g}", document["family"]
    said = (
        f"The member of share {share} of the nested family {family}, cut out by invariance extract with invariance "
        f"{document['version']}: {document['parameters']:,} parameters."
    )
    return _card(
        checked(Model, made, str(source["name"])),
        title=f"{_title(family)}, member {share}",
        lead=said,
        worth=None if gained is None else [gained],
        **_slice(sliced),
    )


def _slice(sliced: Report | None) -> dict[str, Any]:
    """How it was sliced, which training has left as it was."""
    if sliced is None:
        return {}
    return {
        "costs": _costs(sliced),
        "exactness": sentences.exactness(sliced),
        "recipe": yaml_text(sliced.recipe),
    }


def _card(model: Model, **parts: Any) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=model.licence,  # type: ignore[arg-type]
        base_model=model.origin,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["invariance", "compression"],
    )
    nothing: dict[str, Any] = {
        "members": [],
        "samples": [],
        "commands": [],
        "exactness": "",
        "recipe": "",
    }
    nothing |= {"options": None, "teacher": None, "version": "", "costs": Grid("", (), ())}
    how = sentences.checkpoint(model)
    values = nothing | {"model": model, "how": how, "loading": loading(model.stock)} | parts
    return pages.card("card", metadata=pages.raw(data.to_yaml()), **values)


def gain(held: Held, trained: Trained) -> Grid:
    """Perplexities before and after recovery, of the whole or of a member."""
    tokens = trained.held_out.tokens
    caption = (
        f"Perplexity on {tokens:,} held-out tokens of the training text; {sentences.best(trained)}."
    )
    rows = [["before", plain(held.before)], ["recovered", plain(held.after)]]
    return Grid(caption, ["", "perplexity"], rows)


def _title(model: str) -> str:
    """What a checkpoint is called: as its folder, or that of the run where it lies in one as ``model``."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "model" else path.name


def readme(report: Report, folder: Path) -> str:
    """The README.md of a run's folder: which of the files that are there holds what."""
    found = [(folder / name, holds) for name, holds in FILES.items() if (folder / name).exists()]
    files = [(f"{path.name}{'/' * path.is_dir()}", holds) for path, holds in found]
    commands = sentences.commands(report)
    return pages.card("folder", name=report.model.name, files=files, commands=commands)


def loading(stock: bool) -> str:
    """The lines of Python that load a checkpoint, plain transformers' own or one of ours."""
    first = "" if stock else "import invariance  # registers the model type\n"
    return f'{first}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("model")'


def _costs(report: Report) -> Grid:
    return Grid("", COLUMNS, [row.cells for row in report.costs()])
