"""Groups as Ray tasks: `--engine ray`. Ray schedules, retries and outlives lost nodes; this package only asks.

A model under a method is one task, a generator whose rows come back as they are measured. The driver (pytest's process)
is the only writer. What the tasks need travels by Ray: a folder that the driver's cache built goes to a node that lacks
it, and the reference's losses are computed by one task whose result all groups of that model take as an argument.
Models and texts named by a path lie at that path on every node; those of the Hub come from each node's own cache.
"""
