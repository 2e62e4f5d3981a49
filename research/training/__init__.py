"""The training loop, its compiled programs, checkpoints and signals.

`loop`: `train`, `evaluate` and `predict` with any learner, hooks and logs.
`programs`: a learner's functions as compiled programs, cached with the learner.
`errors`: finds the line of the user's own code that an error comes from.
`checkpoint`: states on disk, verified by checksums, restored onto any devices.
`manifest`, `leaves`: what a checkpoint claims to be, and the layout of its arrays.
`signals`: SIGTERM and SIGINT as a stop request that the loop polls.
`compiler_flags`: the compiler flags that are set by default.
"""
