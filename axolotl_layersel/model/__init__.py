"""Find and read a model: decoder stack, latent states, parameter names."""
