"""Starting a run on several processes: here, under Slurm's `srun`, or as a job for a cluster."""
