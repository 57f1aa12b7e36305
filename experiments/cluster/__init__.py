"""Training on many machines: what starts `jaxcls train` there, under SLURM, Open MPI, Kubernetes and Ray."""
