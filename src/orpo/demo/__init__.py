"""`orpo demo`: shipped model and pairs, an experiment with them (study.py), and what is shown (screen.py)."""
