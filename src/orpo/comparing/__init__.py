"""Methods side by side on the same base, data, split and budget: what each reaches, and what it costs."""
