"""From token ids to loss and gradients: packing, attention, head, objective, and the model around them."""
