"""NormalFloat4 by bitsandbytes (Dettmers et al. 2023, arXiv:2305.14314, section 3) in blocks of 64, absmax in fp32.

The 16 levels are quantiles of N(0, 1) scaled to [-1, 1], zero among them. Of compute dtypes see `bnb_fp4`.
"""

from __future__ import annotations

from harness import bnb

METHOD = bnb.method("bnb-nf4", "bitsandbytes NF4 in blocks of 64", bnb.Format("nf4"))
