"""The crash suite: a program that trains a table is killed, failed and cut off everywhere.

::

    program    what is run: deterministic training, with the digest of every commit known beforehand
    calls      the system calls of a run, numbered: to die at the n-th, to fail it
    disk       the same calls, written down: what a disk may hold after a power cut
    worker     one run in a forked process, and the judgement of what it left
    mutants    ways to break the protocol, which the suite must notice
    mounts     loop devices and mounts that end with the process that made them
    logdisk    a disk that writes down what reaches it, below a real file system
    ext4       the sweeps of power cuts on a real ext4
    cells      the other sweeps: each returns how many cases there were and which were bad
    exports    the sweep over copies and deltas
    hunts      which sweep has to find which mutant
    torture    the command: `make torture`

A state is good if the table opens, and holds the last commit that was acknowledged, or the one
that was under way; bit for bit, optimizer state and meta included.
"""
