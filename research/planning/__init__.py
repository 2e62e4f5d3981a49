"""Training steps compiled for TPUs that are not attached: memory, FLOPs, collectives and a lower bound on the step time."""
