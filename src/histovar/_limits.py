"""Largest values of arguments, the same in Python and on the command line."""

# scikit-learn takes no larger seeds.
MOST_RANDOM_STATE = 2**32 - 1
# Draws of a spot: more tell no more of a distribution.
MOST_SAMPLES = 10_000
# Total count of a spot.
MOST_DEPTH = 1e9
