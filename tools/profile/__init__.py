"""Where the time of one decoded token and of one training step goes: on the edge, on the link, on the hub."""
