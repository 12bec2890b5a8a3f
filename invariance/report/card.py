"""The model card beside a checkpoint: what was done to it, what was lost, what it costs, whose it was."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from . import evaluate_words, quantize_words, words
from .grid import Grid

Report = Mapping[str, Any]


def card(report: Report) -> str:
    """The README.md of a checkpoint's folder, as model hubs read it: metadata, then Markdown."""
    name = report["model"]["name"]
    parts = [
        f"---\n{_yaml(_metadata(report))}---",
        f"# {name}, sliced",
        " ".join([words.summary(report), *quantize_words.summary(report)]),
        "## Load",
        words.checkpoint(report) + quantize_words.checkpoint(report),
        f"```python\n{loading(report['model'])}\n```",
        "## What it costs",
        _costs(report).markdown(),
        *(_section(g) for g in evaluate_words.members(report)),
        "## What it is worth",
        *(_evaluation(report) or ["Nothing was measured."]),
        *_samples(report),
        "## Exactness",
        words.exactness(report),
        "## Recipe",
        f"{_again(report)} makes it again, with invariance {report['version']}, from:",
        f"```yaml\n{_yaml(report['recipe'])}```",
        "## Licence",
        _licence(report),
    ]
    return "\n\n".join(parts) + "\n"


def recovered(document: Report, source: Mapping[str, Any], sliced: Report | None = None) -> str:
    """The README.md of a checkpoint that was trained on: metadata, then Markdown. ``document`` is its recover.json,
    ``source`` the ``name``, ``origin`` and ``licence`` of what its weights come from, ``sliced`` the report of the run that
    made the model which was trained, where that is known."""
    trained = document["recover"]
    model = {**source, "why_not_stock": None} | document["exported"]
    stages = (
        f", after stages one by one on {words.count(n)} tokens"
        if (n := trained["local_tokens"])
        else ""
    )
    said = (
        f"{document['model']}, trained on {words.count(trained['tokens'])} tokens{stages} ({trained['weights']}, "
        f"{words.count(trained['trained_parameters'])} parameters, {trained['steps']} steps); shapes and size are as they were: "
        f"{model['parameters']:,} stored parameters."
    )
    parts = [
        f"---\n{_yaml(_metadata({'model': model}))}---",
        f"# {_title(document['model'])}, recovered",
        said,
        "## Load",
        words.checkpoint({"model": model}),
        f"```python\n{loading(model)}\n```",
        *([] if sliced is None else ["## What it costs", _costs(sliced).markdown()]),
        "## What it is worth",
        _section(gain(trained["held_out"], trained)),
        "## Training",
        f"`invariance recover` with invariance {document['version']}"
        + (f", towards {document['teacher']}" if document["teacher"] else "")
        + ", and these options:",
        f"```yaml\n{_yaml(document['options'])}```",
        *([] if sliced is None else _slice(sliced)),
        "## Licence",
        _licence({"model": model}),
    ]
    return "\n\n".join(parts) + "\n"


def _slice(sliced: Report) -> list[str]:
    """How it was sliced, which training has left as it was."""
    return [
        "## Exactness, before it was cut",
        words.exactness(sliced),
        "## Recipe of the slice",
        f"```yaml\n{_yaml(sliced['recipe'])}```",
    ]


def member(
    document: Report,
    source: Mapping[str, Any],
    sliced: Report | None = None,
    gained: Grid | None = None,
) -> str:
    """The README.md of a member of a nested family that no report of its own tells of. ``document`` is its extract.json,
    ``source`` as in ``recovered``, ``sliced`` the report of the run that made the family, of this member, where it was
    trained since, and ``gained`` what that has brought."""
    model = {**source, **document, "stock": not document["why_not_stock"], "name": source["name"]}
    parts = [
        f"---\n{_yaml(_metadata({'model': model}))}---",
        f"# {_title(document['family'])}, member {document['share']:g}",
        f"The member of share {document['share']:g} of the nested family {document['family']}, cut out by `invariance extract` "
        f"with invariance {document['version']}: {document['parameters']:,} parameters.",
        "## Load",
        words.checkpoint({"model": model}),
        f"```python\n{loading(model)}\n```",
        *([] if sliced is None else ["## What it costs", _costs(sliced).markdown()]),
        *([] if gained is None else ["## What it is worth", _section(gained)]),
        *([] if sliced is None else _slice(sliced)),
        "## Licence",
        _licence({"model": model}),
    ]
    return "\n\n".join(parts) + "\n"


def gain(held: Mapping[str, float], trained: Report) -> Grid:
    """Perplexities ``before`` and ``after`` recovery; ``trained`` is the section ``recover`` of a recover.json."""
    caption = f"Perplexity on {trained['held_out']['tokens']:,} held-out tokens of the training text; {words.best(trained)}."
    rows = [
        [name, words.plain(held[when])]
        for name, when in (("before", "before"), ("recovered", "after"))
    ]
    return Grid(caption, ["", "perplexity"], rows)


def _title(model: str) -> str:
    """What a checkpoint is called: as its folder, or that of the run where it lies in one as ``model``."""
    path = Path(os.path.abspath(model))
    return path.parent.name if path.name == "model" else path.name


FILES = {
    "model": "the checkpoint (safetensors), its config, tokenizer and model card",
    "report.html": "everything measured, to read in a browser",
    "report.json": "the same, to read by a program",
    "spectra.json": "the energy of every direction of every basis",
    "basis.safetensors": "the basis of the residual stream, which `invariance recover` needs to compare streams",
    "recover": "the curves of recovery",
    "recipe.yaml": "the recipe in full",
}


def readme(report: Report, folder: Path) -> str:
    """The README.md of a run's folder: which of the files that are there holds what."""
    found = [(folder / name, holds) for name, holds in FILES.items() if (folder / name).exists()]
    rows = "\n".join(f"| `{path.name}{'/' * path.is_dir()}` | {holds} |" for path, holds in found)
    return f"""# {report["model"]["name"]}, sliced

How to load it, what it costs and what it is worth: [model/README.md](model/README.md).

{_again(report)} makes this folder again.

| file | what it holds |
|---|---|
{rows}
"""


def loading(model: Mapping[str, Any]) -> str:
    """The lines of Python that load the checkpoint; ``model`` is what a report says of it."""
    first = "" if model["stock"] else "import invariance  # registers the model type\n"
    return f'{first}from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("model")'


def _again(report: Report) -> str:
    return ", then ".join(f"`{command}`" for command in words.commands(report))


def _metadata(report: Report) -> dict[str, Any]:
    found = {
        "license": report["model"].get("licence"),
        "base_model": report["model"].get("origin"),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["invariance", "compression"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _costs(report: Report) -> Grid:
    found = (
        *words.parameters(report),
        *words.costs(report),
        words.speed(report),
        *quantize_words.sizes(report),
    )
    rows = [row.cells for row in found]
    return Grid("", ["", "dense", "sliced", "ratio"], rows)


def _evaluation(report: Report) -> list[str]:
    return [_section(g) for g in evaluate_words.grids(report)]


def _section(grid: Grid) -> str:
    return f"{grid.caption}\n\n{grid.markdown()}"


def _samples(report: Report) -> list[str]:
    if not report["samples"]:
        return []
    sides = [side for side in evaluate_words.SIDES if side in report["samples"][0]]
    rows = [
        [found["prompt"], *(found[side] or words.NONE for side in sides)]
        for found in report["samples"]
    ]
    return [Grid("", ["prompt", *(evaluate_words.SIDES[side] for side in sides)], rows).markdown()]


def _licence(report: Report) -> str:
    name, licence = report["model"]["name"], report["model"].get("licence")
    if licence is None:
        return f"Where {name} was read from, no licence is stated. Ask its source before you pass this checkpoint on."
    return f"{name} is under the licence `{licence}`, which holds for this checkpoint too: it is made from its weights."


def _yaml(value: Mapping[str, Any]) -> str:
    yaml, stream = YAML(typ="safe", pure=True), io.StringIO()
    yaml.default_flow_style, yaml.width = False, 4096
    yaml.representer.sort_base_mapping_type_on_output = False
    yaml.dump(value, stream)
    return stream.getvalue()
