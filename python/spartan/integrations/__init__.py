"""One module for each trainer, which needs that trainer's package: `transformers`, `lightning`, `accelerate`."""
