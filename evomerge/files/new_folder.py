"""Write a folder that appears under its name only when it is complete."""

import errno
import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evomerge.errors import EvomergeError
from evomerge.files.write import appending, disk_errors, sync
from evomerge.system import POSIX, lock

UNFINISHED = ".unfinished"  # is in every temporary folder, locked by the process that fills it


def refuse_full(path: Path) -> None:
    """EvomergeError if `path` is a file, a folder that is not empty, or the working folder."""
    with disk_errors(path):
        if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
            raise EvomergeError(f"{path}: exists already and is not an empty folder; choose another name")
        if path.exists() and path.samefile(Path.cwd()):
            raise EvomergeError(f"{path}: is the working folder; name a new folder, for instance {path / 'merged'}")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Within the context, fill a folder that appears under its name only when it is complete.

    Yields a temporary folder beside `path`.  Without an error it is synced and renamed to `path`, else it is removed.
    What killed processes left there is removed first.  `path` must be absent or an empty folder.
    """
    refuse_full(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
            remove_unfinished(folder)
        try:
            aside.mkdir()
        except FileExistsError as error:
            raise EvomergeError(f"{path}: this process is writing there already; choose another name") from error
        try:
            with appending(aside / UNFINISHED) as mark:
                lock(mark)
                yield aside
                for file in sorted(aside.rglob("*")):
                    sync(file)
                sync(aside)
                if not POSIX:
                    mark.close()  # Windows renames no folder with an open file
                rename_folder(aside, path)
                (path / UNFINISHED).unlink()  # not before: what a process killed meanwhile leaves could not be told
            sync(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove a temporary folder of `new_folder` whose process is gone, and no other folder."""
    if not (folder / UNFINISHED).is_file() or folder.is_symlink():
        return
    with appending(folder / UNFINISHED) as mark, suppress(OSError):
        lock(mark, wait=False)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != UNFINISHED:
                path.unlink(missing_ok=True)
        if not POSIX:
            mark.close()  # Windows removes no open file
        shutil.rmtree(folder, ignore_errors=True)  # the mark last, for this process may be killed too


def rename_folder(aside: Path, path: Path) -> None:
    """Give a folder its name, which may be that of an empty folder.  EvomergeError if another process took it."""
    try:
        if not POSIX and path.exists():
            path.rmdir()  # Windows renames nothing to a name that is taken
        aside.rename(path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise EvomergeError(f"{path}: another process has written there meanwhile; choose another name") from error
        raise
