"""Cases of the layers with sparse activations, one file each."""
