"""What the command line calls: build, convert, export, verify and info, each a function first.

It may import `table`, `formats` and `words`. Every module stands alone; read them in any order.
"""
