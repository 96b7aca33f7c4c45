"""Train what the plan says, stop the backward pass at the cut, and prove it."""
