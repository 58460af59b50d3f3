"""Training from a YAML file (`spartan train`), and what it shares with the demonstration: data, models, checkpoints."""
