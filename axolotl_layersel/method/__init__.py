"""The method: rows to latent states to gains to a cut."""
