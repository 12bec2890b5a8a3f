"""Contract tests for packages of one's own: call them in a test, with pytest or without; they raise AssertionError."""

from .methods import check_method
from .models import check_model
from .scenes import scene

__all__ = ["check_method", "check_model", "scene"]
