"""For every test of the harness's own: hypothesis without deadlines, since shared machines stall.

The same examples every time, so that a commit passes everywhere or nowhere; with HARNESS_FUZZ (the fuzzers at length)
new ones.
"""

import os

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize="HARNESS_FUZZ" not in os.environ)
settings.load_profile("steady")
