"""Which replica of which model version answers, and what happens when it does not."""
