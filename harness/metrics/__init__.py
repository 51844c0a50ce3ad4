"""One file a metric family; `measuring` is their workshop. Its docstring is the metric's specification."""
