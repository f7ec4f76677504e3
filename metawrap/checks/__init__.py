"""What is asked before anything is changed: of the task batch, the model, the engine."""
