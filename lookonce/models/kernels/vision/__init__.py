"""What the tower's blocks do between their matrix products, as compiled code for the CPU at hand."""
