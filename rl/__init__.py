"""Fledge's core: the currency, the mathematics, the learner, the loop."""
