"""Other methods and signals on the same rows."""
