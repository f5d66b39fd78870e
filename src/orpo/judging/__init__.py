"""Whose answers are better, by a reward model, by a model that judges, or by AlpacaEval's verdicts."""
