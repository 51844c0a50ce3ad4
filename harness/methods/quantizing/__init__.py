"""The workshop of the methods: how weights become codes, and how codes are multiplied."""
