"""What the fork server imports, once a session: everything that a group's process needs, before any is forked.

Importing makes a million objects that live as long as the process, and each pass of the garbage collector walks all of
them: it is off while they are made, and in the children they lie outside what it looks at.
"""

import gc

gc.disable()

from harness import bnb  # noqa: E402

bnb.preload()

from harness import child, runner  # noqa: E402, F401

gc.freeze()
gc.enable()
