"""torchao's int4 weight-only in groups of a row.

The library packs int4 on CUDA only; what runs on any device (`IntxWeightOnlyConfig`) keeps a code in a byte, which the
memory columns show.
"""

from harness.libraries import GROUP
from harness.torchao_layers import torchao_method

METHOD = torchao_method(
    "torchao-int4",
    "torchao int4 weight-only in groups, codes kept in bytes",
    4,
    "IntxWeightOnlyConfig",
    {"group": GROUP},
)
