"""Words: the vocabulary that gives each token its row.

The room may import `storage` and what is below it.
"""
