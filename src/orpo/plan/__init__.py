"""What a run needs before it runs: memory, work, hours and cost on machines that need not be there."""
