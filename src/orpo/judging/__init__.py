"""Which of two models answers better, by a reward model, by a model that judges, or by AlpacaEval's verdicts."""
