"""The trainer: recipes, data, parallelism, checkpoints. It imports the model; nothing in the model imports it."""
