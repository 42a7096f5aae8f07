"""Words: the vocabulary that gives each token its row.

It may import `storage` and what is below.
"""
