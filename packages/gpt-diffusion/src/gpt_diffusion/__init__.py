"""A diffusion transformer over neural network checkpoints: prompt a loss, get weights."""
