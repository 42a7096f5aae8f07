"""How rows are kept: in memory, in a file, in an array of the caller.

It may import `_core`, the helper modules, `init` and `grouping`, and nothing above. Read `manifest`
(what a commit is), `journal` (old rows), `transaction` (what a writer keeps between two commits),
`recovery`, then `store`, which joins them.
"""
