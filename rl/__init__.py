"""Fledge's core: the data types, the mathematics, the learner and the loop."""
