"""What comes of a run: evaluation, answers, the report page."""
