"""A training: what it prepares, its steps and optimizer, what it saves, and how it goes on."""
