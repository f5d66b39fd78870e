"""`orpo demo`: shipped model and pairs, an experiment with them (study.py), and how it is told (screen.py)."""
