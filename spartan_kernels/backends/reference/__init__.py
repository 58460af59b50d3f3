"""The equations in plain PyTorch: any device, any floating dtype; in float64 the oracle."""
