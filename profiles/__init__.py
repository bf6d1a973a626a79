"""Hardware profiles, the probe of this machine, and the planner that turns both into a partition."""
