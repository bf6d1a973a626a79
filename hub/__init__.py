"""`hub serve`: the middle blocks for everyone."""
