"""Files of each version of the format, written once by the code of that time and read forever.

`v1/` holds tables, journals, deltas, an id map and vocabularies of version 1, and
`v1/expected.json` says what each of them contains. `make.py` is the script that wrote them.
"""
