"""The pure floor: no await, no clock, no dice, nothing but the standard library."""
