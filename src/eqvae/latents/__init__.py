"""Latents on disk: what an autoencoder makes of images, written once and read many times."""
