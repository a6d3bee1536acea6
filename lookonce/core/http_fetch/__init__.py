"""Fetching a client's URLs, for the whole project: `fetcher.Fetcher` is the only door."""
