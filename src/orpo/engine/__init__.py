"""From token ids to loss and gradients: rows, attention, head, objective, and the model around them."""
