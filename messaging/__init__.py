"""What crosses the wire between edge and hub: messages, framing, keys and errors. No torch."""
