"""What fits on a card: the sizes of a model, estimates of the memory for training, and a search for settings.

Import the modules individually: `loading.inspection`, outside this package, uses some of them.
"""
