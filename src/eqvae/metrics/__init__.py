"""Measures of an autoencoder: equivariance errors, reconstruction, latent statistics."""
