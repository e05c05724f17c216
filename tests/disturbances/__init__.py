"""What is done to searches, by kind; importing this package registers all kinds in `INJECTIONS`."""

from disturbances import afterwards, clocks, disks, files, kinds_of_search, power, processes, workers
from disturbances.disturbed import ALONE, INJECTIONS, QUICK, Disturbed

__all__ = [
    "ALONE",
    "INJECTIONS",
    "QUICK",
    "Disturbed",
    "afterwards",
    "clocks",
    "disks",
    "files",
    "kinds_of_search",
    "power",
    "processes",
    "workers",
]
