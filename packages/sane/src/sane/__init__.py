"""Sequential autoencoder of neural network weights: embed, analyse and sample models."""
