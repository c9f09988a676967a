"""What every family builds on: paths, trees, keys, edits, optimizer state, statistics, exact selection."""
