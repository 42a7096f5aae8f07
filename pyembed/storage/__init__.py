"""How rows are kept: in memory, in an array of the caller, in the files of a table.

It may import `_core`, the helper modules, `init` and `grouping`, and nothing above. Read `store`
(the protocol, and rows in memory), `fs` (the seam to the operating system), `manifest` (the
committed state), `journal` (old rows), `transaction` (the state of a writer between two commits),
`recovery`, then `table_files` and `file_store`, which join them.
"""
