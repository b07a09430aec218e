"""Largest values of arguments, the same in Python and on the command line."""

# Largest seed that scikit-learn accepts.
MOST_RANDOM_STATE = 2**32 - 1
# Draws of a spot: more would not describe its distribution better.
MOST_SAMPLES = 10_000
# Total count of a spot.
MOST_DEPTH = 1e9
