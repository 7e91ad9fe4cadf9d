"""What fits on a card: the sizes of a model, the memory that training takes, and which settings to choose.

Import the modules individually: checkpoint inspection, which is outside of this package, uses some of them.
"""
