"""Moved to `harness.core.contracts`; this name goes on for one release."""

import warnings

from harness.core.contracts import *  # noqa: F403

warnings.warn("harness.contracts is harness.core.contracts now", DeprecationWarning, stacklevel=2)
