"""Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass."""
