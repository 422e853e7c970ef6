"""What an accelerator would need, compiled without one: `__main__` runs it.

programs.py makes the programs that users run there, costs.py counts what they cost, tables.py
prints the rows of a record; folding.py asks whether BatchNorm is worth folding.
"""
