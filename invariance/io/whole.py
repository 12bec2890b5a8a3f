"""Whether a model in memory can be worked on: model/entry.py says."""

from ..model.entry import check_model as check_whole

__all__ = ["check_whole"]
