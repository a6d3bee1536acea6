"""Writing and running code for the CPU at hand. Imports torch and llvmlite: for the two model services only."""
