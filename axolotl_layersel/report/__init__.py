"""What a user sees: table, figure, page, model card, trackers, recipe."""
