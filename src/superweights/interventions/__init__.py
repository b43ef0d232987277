"""What is done to a model: edits of weights and of activations, written once for every place where weights live."""
