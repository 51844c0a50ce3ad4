"""Files and names from strangers: whatever they hold, one line or a result, in bounded time and memory.

A short profile runs with the tests; `HARNESS_FUZZ=N` tries N times as many examples (`tox -e fuzz`).
"""
