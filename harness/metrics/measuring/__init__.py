"""The workshop of the metrics: the engine, clocks, devices, the census, what a card must hold."""
