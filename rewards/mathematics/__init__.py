"""How `math` decides whether two answers are equal, one concern a module. The reward itself is `rewards.math`."""
