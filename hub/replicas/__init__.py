"""Several replicas of Blocks B, one for each group of edges, trained side by side and averaged when a round closes."""
