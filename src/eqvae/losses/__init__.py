"""What an autoencoder is trained for: reconstruction, adversarial, codebook."""
