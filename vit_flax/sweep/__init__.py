"""Sweeps: declare points, run them alone, in processes or as one program, and compare what they found."""
