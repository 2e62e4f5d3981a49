"""The pure heart: state, metrics, objective, update, step, learner."""
