"""Generators: models of the latents' distribution. They see normalized latents and labels, nothing of images."""
