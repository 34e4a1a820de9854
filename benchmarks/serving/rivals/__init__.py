"""The sides of the comparison, a module each."""
