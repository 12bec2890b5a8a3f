"""What a run does, step by step and on a model in memory: look, calibrate, fit bases, rotate, certify, cut, measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ..calibrate import certificate, fisher, walk
from ..calibrate.certificate import Form, Rotations, certify_random
from ..calibrate.enter import enter
from ..calibrate.moments import Moments, check_finite, reader_moment
from ..calibrate.statistic import Statistic
from ..compress import bases as fitting
from ..compress import units
from ..compress.calibration import calibration_dtype
from ..compress.demand import Unit
from ..compress.exactness import probe
from ..compress.fitting import check_rotator
from ..core.change import Basis, Change
from ..core.errors import InputError, InvarianceError
from ..core.parts import Part
from ..core.progress import Progress, quiet
from ..io.checkpoint import layout_of_config, wrap
from ..io.data import Tokens
from ..io.export import cast, stock
from ..io.source import live
from ..measure import losses
from ..measure.evaluate import measure, prepare_each
from ..method.interfaces import Method, Rotator
from ..model.canonical import canonicalize
from ..model.copies import double_copy
from ..model.entry import check_model
from ..model.families import check_dense
from ..model.folding import join
from ..model.layout import Layout
from ..model.reparametrize import reparametrize
from ..model.verify import Certificate
from ..model.working import Working
from ..recipe.complaints import validate
from ..recipe.evaluate import Evaluations
from ..recipe.named_methods import method
from ..recipe.step import Every, Step
from ..recipe.yaml_text import located
from .given import (
    Bases,
    Data,
    Spaces,
    batch_of,
    check_numbers,
    checked_model,
    chosen,
    folded,
    folds,
    listed,
    rotations,
    statistics_of,
    tokens_of,
    wanted_of,
    word,
)


class _What(Part):
    """A list of evaluations, read as a recipe's is."""

    evaluate: Evaluations


def inspect_model(
    model: PreTrainedModel | PretrainedConfig, *, edges: str | Iterable[str] = ()
) -> Layout:
    """Spaces, labelled weight axes and residual edges of a model's canonical form, in which norms have no gains.

    ``layout.spaces`` maps names to ``Space``: its ``kind``, ``dim``, ``copies`` and ``group``. ``layout.points`` are the
    points of the stream in order. A config is enough: no weight is read. ``edges`` names the matrices (``edge``,
    ``edge.3.down``) that are two factors with a space between them.

    Raises InputError for a family that is not known.
    """
    if isinstance(model, PreTrainedModel):
        model = checked_model(model).config
    if not isinstance(model, PretrainedConfig):
        raise InputError(
            f"model: got {type(model).__name__}. Give a model or a config of transformers."
        )
    dense = layout_of_config(model)
    return layout_of_config(model, fold=True, split=dense.splits(listed(edges)))


def calibrate(
    model: PreTrainedModel,
    data: Data,
    spaces: Spaces = None,
    statistics: Statistic | str | Method | Iterable[Statistic | str] = Statistic.RAW,
    *,
    tokenizer: Any = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    progress: Progress = quiet,
) -> Moments:
    """Second moments of the signal on spaces of the dense model's canonical form, in one pass over the data.

    ``spaces`` are by default all but those inside matrices. ``statistics`` are names (``raw``: E[x xᵀ], ``seen``, ``mean``,
    ``readers``, ``fisher``, …; see ``Statistic``), or a method, whose ``needs`` they are then. One that only some kinds of
    space have is measured on those. As many sequences pass at a time as ``data`` says under
    ``batch``, by default 8; stages compute in ``dtype``, sums are float64.

    ``moments.second("mlp.3")`` is a float64 tensor of shape (copies, dim, dim), in squared units of the signal.

    Raises InputError for a space or statistic that is not there, for tokens that the model cannot take.
    """
    dense = checked_model(model)
    asked = [*inspect_model(dense).spaces] if spaces is None else listed(spaces)
    split = inspect_model(dense).splits(asked)
    parts = Working(live(dense), fold=True, split=split, device=dense.device)
    names = chosen(parts.layout, asked)
    wanted = wanted_of(parts.layout, names, statistics_of(statistics))
    read = tokens_of(data, dense.config, tokenizer)
    found = Moments(layout=parts.layout)
    walked = {n: kept for n, s in wanted.items() if (kept := s - _NOT_WALKED)}
    if walked:
        wide = calibration_dtype(
            word("dtype", dtype, ("auto", "float32", "bfloat16")), dense.device
        )
        batches = enter(parts, read.batches(batch_of(data)), wide)
        each: list[Moments] = []
        walk.oneshot(
            parts, batches, walked, wide, progress, leave=lambda _, moments: each.append(moments)
        )
        for moments in each:
            found = found.merge(moments)
    found = found.merge(_of_gradients(parts, wanted, read, progress))
    for name, measured in wanted.items():
        if Statistic.READERS in measured:
            found.known[name, Statistic.READERS] = reader_moment(parts, parts.layout.spaces[name])
    check_finite(Moments({k: m for k, m in found.known.items() if k[1] not in _NOT_WALKED}))
    return found


_NOT_WALKED = {Statistic.READERS, Statistic.FISHER, Statistic.TAYLOR}


def _of_gradients(
    parts: Working,
    wanted: Mapping[str, frozenset[Statistic]],
    tokens: Tokens,
    progress: Progress,
) -> Moments:
    layout = parts.layout
    curved = [n for n, s in wanted.items() if Statistic.FISHER in s]
    queries = [n for n, s in wanted.items() if Statistic.TAYLOR in s]
    if not curved and not queries:
        return Moments()
    points = dict.fromkeys(p for n in curved for p in layout.written_behind(n))
    found = fisher.measure(parts, points, tokens, progress, queries=queries)
    known = {(n, Statistic.FISHER): fisher.moment(parts, layout.spaces[n], found) for n in curved}
    return Moments(known | {k: m for k, m in found.known.items() if k[1] is Statistic.TAYLOR})


def bases(
    moments: Moments,
    rotator: Rotator | str | Mapping[str, Any],
    spaces: Spaces = None,
    *,
    segments: Literal["global", "block", "stage"] | int = "global",
    seed: int = 0,
) -> dict[str, Basis]:
    """The exact bases that a rotator gives spaces: by default all that ``moments`` know.

    ``rotator`` is an object, a name, or as a recipe writes it: ``{"pca": {"of": "normed"}}``. ``segments`` says which
    points of the stream share a basis: all, those of a block, none, or those of so many blocks. Shared ones are one object.
    ``basis.A`` is an operator of shape (copies, dim, dim), ``basis.energy`` (copies, dim) what is lost with a direction.

    Raises InputError where the rotator does not fit a space or its statistics were not measured.
    """
    layout = moments.layout
    if layout is None:
        raise InputError("moments: they name no model's layout. Take those of `calibrate`.")
    made: Rotator = units.seeded(method("rotate", rotator, "rotator"), seed)
    measured = [n for n in layout.spaces if any(n == name for name, _ in moments.known)]
    names = measured if spaces is None else chosen(layout, spaces)
    by: Any = segments
    if isinstance(segments, int) and not isinstance(segments, bool) and segments >= 1:
        by = Every(every=segments)
    else:
        word("segments", segments, ("global", "block", "stage"))
    step = Step.model_construct(rotate=made, segments=by, slice_head=True)
    found: dict[str, Basis] = {}
    for members in units.segments(layout, step, names):
        blocks = tuple(layout.spaces[m].block or 0 for m in members)
        unit = Unit(tuple(members), blocks, layout.spaces[members[0]], 0, made, None, None)
        check_rotator(unit, layout, "rotator")
        for name, statistic in ((m, s) for m in members for s in unit.needs):
            if (name, statistic) not in moments.known:
                raise InputError(
                    f"moments: '{made.name}' asks for '{statistic.value}' of space '{name}', which was not measured. Give "
                    f"`calibrate(..., statistics=['{statistic.value}'])`, or the rotator in its place."
                )
        found |= dict.fromkeys(members, fitting.fit(unit, unit.together(moments)))
    return found


def rotate(
    model: PreTrainedModel,
    bases: Bases,
    *,
    tie: Literal["keep", "untie"] = "untie",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model that computes the same in other bases; the one given is left as it is.

    Spaces left out keep theirs. Weights are changed in float64 and rounded once, to ``dtype``, by default the model's own:
    logits differ by what rounding explains, ``tolerance(dtype, layout.depth)``, and no more. The model generates and
    saves; it is its family's own where a stock config holds it.

    Raises InputError for a space that is not there, and a basis of another shape or dtype or outside the space's group.
    """
    return apply(model, rotations(folded(model, bases, tie), bases), tie=tie, dtype=dtype)


def certify(
    model: PreTrainedModel,
    bases: Bases | None = None,
    *,
    data: Data | None = None,
    tie: Literal["keep", "untie"] = "untie",
    seed: int = 0,
    tokenizer: Any = None,
    progress: Progress = quiet,
) -> Certificate:
    """How far bases move a model's logits, in float64, and what rounding explains; half of a change as control.

    Without ``bases``, random elements of all spaces' groups at once. It compares on the first 64 tokens of ``data``, or on
    random ones. ``certificate.passed`` says whether all holds, ``certificate.failure`` what does not.

    Raises InputError as ``rotate`` does.
    """
    dense = checked_model(model)
    tokens = None if data is None else tokens_of(data, dense.config, tokenizer)
    ids = probe(dense.config.vocab_size, seed, tokens)
    source, device = live(dense), dense.device
    if bases is None:
        return certify_random(source, ids, seed=seed, device=device, progress=progress)
    layout = folded(dense, bases, tie)
    changes = rotations(layout, bases)
    first: dict[int, str] = {}
    shared = {name: first.setdefault(id(change), name) for name, change in changes.items()}
    own = {name: changes[name].encode for name in first.values()}
    return certificate.certify(
        source,
        Rotations(own, shared),
        ids,
        Form(folds(layout, changes), tie),
        seed=seed,
        device=device,
        progress=progress,
    )


def apply(
    model: PreTrainedModel,
    changes: Mapping[str, Change],
    *,
    tie: Literal["keep", "untie"] = "untie",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A model with spaces changed: rotated, sliced or both; the one given is left as it is.

    Points of the stream that change together share one ``Change``; where two meet, a shortcut carries the stream across.
    Weights are changed in float64 and rounded once, to ``dtype``, by default the model's own. The model generates and
    saves; it is its family's own where a stock config holds it.

    Raises InputError for a space that is not there and a change that does not fit it.
    """
    dense = checked_model(model)
    check_dense(dense.config)
    layout = folded(dense, changes, tie)
    for name, change in changes.items():
        if not isinstance(change, Change):
            raise InputError(
                f"space '{name}': got {type(change).__name__}. Give a Change; of a basis it is `Change.rotation(basis.A)`."
            )
        for part, X in (("encode", change.encode), ("decode", change.decode)):
            check_numbers(name, X, part)
    dtype = dense.dtype if dtype is None else dtype
    if not dtype.is_floating_point:
        raise InputError(f"dtype: {dtype} holds no weights. Give a floating-point one.")
    twin = double_copy(dense)
    split = [n for n in layout.select(["edge"]) if n in changes]
    layout = canonicalize(twin, fold=folds(layout, changes), tie=tie, split=split)
    try:
        reparametrize(twin, layout, changes)
    except InvarianceError as e:
        raise InputError(str(e)) from None
    join(twin)
    made, _ = stock(twin, layout, layout_of_config(dense.config), dense.config)
    small = wrap(twin, layout, dense.config, tie) if made is None else made
    cast(small, dtype)
    return small


def perplexity(
    model: PreTrainedModel, data: Data, *, tokenizer: Any = None, batch: int = 8
) -> float:
    """exp of the mean next-token cross-entropy (nats), every window on its own; logits in float32.

    Raises InputError for tokens that the model cannot take.
    """
    dense = check_model(model)
    tokens = tokens_of(data, dense.config, tokenizer)
    losses.check_windows(tokens, "data")
    return losses.perplexity(dense, tokens, batch)


def evaluate(
    models: PreTrainedModel | Mapping[str, PreTrainedModel],
    what: Any,
    *,
    tokenizer: Any = None,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """What models are worth, as a recipe's ``evaluate`` says: ``[{"perplexity": {"data": ...}}]``.

    Several models are compared with the first. The keys are ``perplexity``, ``divergence``, ``tasks`` and ``samples``, as in
    report.json. Raises InputError, before anything is computed, for what cannot be.
    """
    every = models if isinstance(models, Mapping) else {"model": models}
    if not every:
        raise InputError("models: none are given. Give a model, or several by name.")
    checked = {side: check_model(model, side) for side, model in every.items()}
    each = [what] if isinstance(what, Mapping) else what
    asked = validate(_What, located({"evaluate": each}, "evaluate")).evaluate
    config = next(iter(checked.values())).config
    prepared = [
        one
        for e in asked
        for one in prepare_each(e.part, e.kind, config, tokenizer, f"evaluate: {e.kind}")
    ]
    return measure(prepared, checked, progress)
