"""Tools that tests of several rooms share; none of them is a test."""
