"""Which tokens of which sequences go into the next step."""
