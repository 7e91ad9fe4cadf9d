"""What fits on a card: the sizes of a model, what training it takes, and which settings to choose.

Modules are imported one by one: that of the inspection of checkpoints uses some, and stands beside them.
"""
