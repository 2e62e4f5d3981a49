"""What a run leaves for people: the run directory, reports, console output, figures and TensorBoard.

- `record`: the run directory, with its configuration, versions, logs and summary.
- `run_files`: readers of its files, which may be damaged or a stranger's.
- `environment`: versions, devices and the revision of the source.
- `report`: `report.html` of one run, and the comparison of several.
- `progress`: the progress bar.
- `picture`: figures of metrics and of models.
- `graph`: a model as a graph, and the outputs of its layers.
- `graph_layout`: the positions of boxes and edges in a drawing of a graph.
- `tensorboard`: event files for TensorBoard.
- `embeddings`: vectors for TensorBoard's Embedding Projector.
- `profiling`: profiler traces of single steps.
"""
