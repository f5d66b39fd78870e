"""What a user may set: the settings, recipes that set them, and names from elsewhere."""
