"""What the demonstration and `spartan train` share: data, models, checkpoints, interruption."""
