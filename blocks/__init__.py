"""The model cut into Blocks A, B and C: what edge and hub share of torch code."""
