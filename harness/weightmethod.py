"""Moved to `harness.methods.quantizing.weight_method`; this name goes on for one release."""

import warnings

from harness.methods.quantizing.weight_method import *  # noqa: F403

warnings.warn("harness.weightmethod is harness.methods.quantizing.weight_method now", DeprecationWarning, stacklevel=2)
