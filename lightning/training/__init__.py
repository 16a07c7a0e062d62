"""Training: algorithms, adapters, and the trainer that runs them."""
