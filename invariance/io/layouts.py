"""Layouts of model types that are not declared: derived from the config alone, and kept between runs."""

from __future__ import annotations

from transformers import PretrainedConfig

from ..core.cache import cache_dir
from ..core.errors import InputError
from ..model.described.cache import kept
from ..model.described.description import Description
from ..model.described.real import layout_text
from ..model.described.weightless import on_meta
from .hub import line, progress, quiet
from .narrowed import NarrowedConfig


def derived_layout(config: PretrainedConfig) -> Description:
    """The layout that is derived of a config. Raises InputError with what speaks against it."""
    if isinstance(config, NarrowedConfig):
        raise InputError(
            f"{config._name_or_path or 'the model'}: it is cut already, in a form that no stock config holds, of which no layout "
            "is derived. Give the model that it was cut from."
        )
    try:
        with quiet(), progress(f"Deriving the layout of '{config.model_type}'"):
            return kept(cache_dir("layouts"), config, on_meta(config), lambda: layout_text(config))
    except InputError as e:
        raise InputError(f"model type '{config.model_type}': {e}") from None
    except MemoryError:
        raise
    except Exception as e:  # a family's own code fails in its own way
        raise InputError(
            f"model type '{config.model_type}': no layout can be derived of it, since its causal model of this config does not "
            f"run on a few tokens ({type(e).__name__}: {line(e, 200)}). Repair the config."
        ) from e
