"""A reproducibility harness for LLM quantization: methods x metrics x models, as pytest cases.

What this module names is the public API; docs/api.md shows it at work. Each name is imported when it is first asked
for, so that `import harness` loads neither torch nor numpy. Whatever is not named here is private and may move.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.core.contracts import Arguments as Arguments
    from harness.core.contracts import Checkpoint as Checkpoint
    from harness.core.contracts import Member as Member
    from harness.core.contracts import Method as Method
    from harness.core.contracts import Metric as Metric
    from harness.core.contracts import Parameter as Parameter
    from harness.core.contracts import QuantizedWeight as QuantizedWeight
    from harness.core.contracts import Subject as Subject
    from harness.core.contracts import TokenPlan as TokenPlan
    from harness.core.contracts import Window as Window
    from harness.core.errors import HarnessError as HarnessError
    from harness.core.options import Options as Options
    from harness.core.records import Case as Case
    from harness.core.records import Figure as Figure
    from harness.core.records import Row as Row
    from harness.core.records import Verdict as Verdict
    from harness.methods.quantizing.weight_method import layer_method as layer_method
    from harness.methods.quantizing.weight_method import reference_method as reference_method
    from harness.methods.quantizing.weight_method import weight_method as weight_method
    from harness.report.document import compare as compare
    from harness.report.document import read_report as read_report
    from harness.report.document import render as render
    from harness.run.measure import measure as measure
    from harness.run.measure import plan as plan

__version__ = "0.2.0"

_HOMES = {  # module: its public names
    "harness.run.measure": "measure plan",
    "harness.core.options": "Options",
    "harness.report.document": "read_report compare render",
    "harness.core.records": "Case Row Figure Verdict",
    "harness.core.contracts": "Method Parameter Arguments Checkpoint QuantizedWeight Metric Member Subject Window "
    "TokenPlan",
    "harness.methods.quantizing.weight_method": "weight_method reference_method layer_method",
    "harness.core.errors": "HarnessError",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'harness' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
