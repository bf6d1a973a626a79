"""What the hub keeps on disk: keys, tokens and epochs in SQLite, checkpoints and adapters as safetensors."""
