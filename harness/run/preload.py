"""What the fork server imports, once a session: everything that a group's process needs, before any is forked.

Beside a card the server leaves bitsandbytes to its children: the import asks CUDA for it, and then no process forked
later can use one. Nothing else here may touch the driver, were it only to ask.

What importing makes lives as long as the process, and each pass of the garbage collector would walk all of it: the
collector is off meanwhile, and in the children leaves it alone.
"""

import gc
import os

gc.disable()
try:
    from harness.methods.quantizing import bnb, int8

    if "HARNESS_BESIDE_CARD" not in os.environ:
        bnb.preload()
    int8.preload()
    from harness.run import group, local  # noqa: F401
except Exception as error:  # the fork server goes on where an import fails, and its children tell why
    raise ImportError(f"{type(error).__name__}: {error}") from error
finally:
    gc.freeze()
    gc.enable()
