"""The sweep that has to find each mutant: the one that is made for the rule that it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.crash import cells, cuts, exports, ext4
from tests.crash.cells import DEATHS, Counts, How
from tests.crash.program import Plan


def plans(durability: str, first: int, count: int, stubborn: bool = False) -> list[Plan]:
    """Return programs of consecutive seeds, of both optimizers and two widths."""
    return [
        Plan(
            seed=seed,
            dim=(4, 16)[seed // 2 % 2],
            optimizer=("adagrad", "adam")[seed % 2],
            durability=durability,
            stubborn=stubborn,
        )
        for seed in range(first, first + count)
    ]


def _kills(how: How) -> Counts:
    return cells.faults(how, plans("process", 0, 4), DEATHS)


def _refused(how: How) -> Counts:
    actions = ["ENOSPC", "ENOSPC then kill"]
    return cells.faults(how, plans("process", 0, 4, stubborn=True), actions)


def _recoveries(how: How) -> Counts:
    return cells.recovery_points(how, plans("process", 0, 4), DEATHS)


def _cuts(how: How) -> Counts:
    return cuts.power_cuts(how, plans("power", 2, 4))


def _cuts_in_recovery(how: How) -> Counts:
    return cuts.power_cuts_in_recovery(how, plans("power", 0, 4))


def _cuts_of_process(how: How) -> Counts:
    return cuts.power_cuts(how, plans("process", 0, 4))


def _failed_syncs(how: How) -> Counts:
    return cuts.failed_syncs(how, plans("process", 3, 4, stubborn=True))


def _exports(how: How) -> Counts:
    return exports.killed_exports(how, plans("process", 0, 2))


HUNTS: dict[str, Callable[[How], Counts]] = {
    "rows change before they are recorded": _kills,
    "marked before recorded": _refused,
    "journal not synced": _cuts,
    "marked ahead before synced": _cuts,
    "marked ahead over a commit": _cuts,
    "manifest before the rows": _cuts,
    "rows not synced": _cuts,
    "salt kept": _kills,
    "marks kept over a commit": _kills,
    "dirty rows hear of no commit": _kills,
    "dirty after the first change": _kills,
    "undo not synced": _cuts_in_recovery,
    "undo of the first frame only": _kills,
    "clean before the rows are back": _recoveries,
    "sums not compared": _cuts,
    "boot not compared": _cuts_of_process,
    "manifest written in place": _kills,
    "manifest not synced": _cuts,
    "folder not synced": _cuts,
    "failed sync forgotten": _failed_syncs,
    "log of the transaction before": _kills,
    "gap in the log ignored": _cuts_of_process,
    "copy appears in parts": _exports,
}


def _ext4_cuts(how: How) -> Counts:
    return ext4.cuts(how, plans("power", 0, 4))


def _ext4_cuts_of_process(how: How) -> Counts:
    return ext4.cuts(how, plans("process", 0, 4))


def _ext4_recoveries(how: How) -> Counts:
    return ext4.cuts_in_recovery(how, plans("power", 0, 4), 60)


def _ext4_failed_writes(how: How) -> Counts:
    return ext4.failed_writes(how, plans("power", 3, 4, stubborn=True))


def _ext4_shutdowns(how: How) -> Counts:
    return ext4.shutdowns(how, plans("power", 0, 4), 0)


# Mutants that leave out or delay a sync have to be found on a real file system, too.
ON_EXT4: dict[str, Callable[[How], Counts]] = {
    "rows change before they are recorded": _ext4_shutdowns,
    "journal not synced": _ext4_cuts,
    "manifest before the rows": _ext4_cuts,
    "rows not synced": _ext4_shutdowns,
    "dirty after the first change": _ext4_cuts,
    "undo not synced": _ext4_recoveries,
    "sums not compared": _ext4_cuts,
    "boot not compared": _ext4_cuts_of_process,
    "manifest written in place": _ext4_cuts,
    "manifest not synced": _ext4_cuts,
    "folder not synced": _ext4_shutdowns,
    "failed sync forgotten": _ext4_failed_writes,
}
EXT4 = ", on ext4"  # suffix of the name of such a hunt


def names() -> list[str]:
    """Return the names of all hunts."""
    return [*HUNTS, *(name + EXT4 for name in ON_EXT4)]


def hunt(name: str, how: How) -> Counts:
    """Run the sweep on the mutant, until a state is bad."""
    mutant = name.removesuffix(EXT4)
    sweep = (HUNTS if name == mutant else ON_EXT4)[mutant]
    return sweep(replace(how, mutant=mutant, until_bad=True))
