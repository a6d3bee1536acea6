"""Files and batches: kept in one SQLite database, worked through in the background. Knows nothing of HTTP."""
