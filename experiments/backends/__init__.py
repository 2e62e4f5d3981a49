"""One training step on three backends of Keras, each a page in its backend's own manner: `just backends` compares them."""
