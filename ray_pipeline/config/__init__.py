"""The YAML file of a run: blocks that every workflow shares, loading with overrides, and messages that name the key."""
