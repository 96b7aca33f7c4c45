"""What a user writes: options and what contradicts them."""
