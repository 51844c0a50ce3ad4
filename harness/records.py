"""Moved to `harness.core.records`; this name goes on for one release."""

import warnings

from harness.core.records import *  # noqa: F403

warnings.warn("harness.records is harness.core.records now", DeprecationWarning, stacklevel=2)
