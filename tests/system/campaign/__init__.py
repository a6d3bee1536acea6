"""A campaign: faults in a seeded order against a whole system under load; answers are held against the quiet one's."""
