"""`orpo demo`: shipped model and pairs, an experiment with them (study.py), and its telling (screen.py)."""
