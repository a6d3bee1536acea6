"""The vision service: encodes images with the vision tower alone."""
