"""One module for each package that it needs: `transformers`, `lightning`, `accelerate`, `peft`."""
