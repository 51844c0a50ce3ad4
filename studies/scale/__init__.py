"""Large matrices: planning, sharding, merging, clusters."""
