"""Ray: the only package that imports it. Functions here wire; what is done stands in the modules they call."""
