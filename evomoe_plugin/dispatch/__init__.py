"""Expert parallelism: which ranks hold which experts, and the all-to-all between them."""
