"""Keras' own `fit`, `evaluate` and `predict`, run by compiled programs of this library.

- `fit`: `fit`, `evaluate`, `predict`, `train_on_batch`, `test_on_batch`, `predict_on_batch` of a Keras model.
- `programs`: the functions that Keras' loops call in place of its own, and the handling of Ctrl-C.
- `callbacks`: user callbacks, the progress bar, and logs that stay on the device until read.
- `from_keras`: a compiled model's own `train_step`, `test_step` and `predict_step` as a `Learner`.
"""
