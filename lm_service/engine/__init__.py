"""The engine Protocol and the engines behind it."""
