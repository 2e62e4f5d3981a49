"""One training step on three backends of Keras, each written in the idiom of its backend; `just backends` compares them."""
