"""The measured cases, to run from any repository: `pytest --pyargs harness.cases`."""
