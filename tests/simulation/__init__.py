"""A daemon, or three, in a world that is made from a seed: time, PostgreSQL, the network and the faults of all of them."""
