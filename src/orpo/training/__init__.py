"""The trainer, and what keeps a run measured, resumable and documented."""
