"""The crash suite: a program that trains a table is killed, failed and cut off everywhere.

::

    program    the program: deterministic training; the digest of every commit is known beforehand
    calls      layers over the file system of `pyembed.storage.fs`: number the calls, fail one, die
    disk       a layer that records the calls, and the states that a power cut may leave
    worker     one run in a forked process, and the judgement of its files
    mutants    ways to break the protocol, which the suite must notice
    mounts     loop devices and mounts that end with the process that made them
    logdisk    a disk below a real file system that records every write and flush
    ext4       the sweeps of power cuts on a real ext4
    cells      the other sweeps: each returns its number of cases and the bad ones
    cuts       the sweeps of power cuts on the model of a disk
    exports    the sweep over copies and deltas
    hunts      the sweep that has to find each mutant
    torture    the command: `make torture`

Whatever is injected is a layer, that is, a `FileSystem` on top of another one, and is installed
with `fs.using`.

A state is good if the table opens, and holds the last commit that was acknowledged or the one that
was under way: bit for bit, optimizer state and meta included.
"""
