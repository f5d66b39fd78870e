"""What a model prefers and what it answers: scores of held-out pairs, statistics, generation."""
