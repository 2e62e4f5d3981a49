"""`research.from_keras`: every Keras variable behind the state can be read from it and written back."""

import jax
import numpy as np
import pytest
from fit_models import linear_data, small_model

import research
from research.keras_fit.from_keras import model_metrics

pytestmark = pytest.mark.promotes


@pytest.mark.slow
def test_state_mapping_pairs_every_variable_of_the_model_with_its_value_in_the_state() -> None:
    model = small_model()
    learner = research.from_keras(model)
    state, _ = jax.jit(learner.train)(learner.init(), research.Batch(*linear_data(8)))
    variables = [*model.trainable_variables, *model.non_trainable_variables, *model.metrics_variables]
    arrays = [*state.trainable, *state.non_trainable]
    arrays += [array for name in model_metrics(model) for array in state.metrics[name]]  # JAX sorts the names
    pairs = learner.state_mapping(state)
    assert [id(variable) for variable, _ in pairs] == [id(variable) for variable in variables]
    assert [id(array) for _, array in pairs] == [id(array) for array in arrays]
    research.write_back(state, learner)
    for variable, array in zip(variables, arrays, strict=True):
        np.testing.assert_array_equal(variable.value, array)
