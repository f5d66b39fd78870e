"""Data before training: inspect it, clean and split it, choose from it, complete it."""
