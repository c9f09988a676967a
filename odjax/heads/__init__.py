"""Heads: fixed classifiers, pooling of tokens, and what they read from the features."""
