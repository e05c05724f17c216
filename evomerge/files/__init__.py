"""Read files within size limits; write files and folders so that a reader never sees a part of them.

- `read.py`: a file's content, as text, YAML, JSON or a checked class
- `write.py`: one file, whole or not at all; additions to a file; locks
- `new_folder.py`: a whole folder or none

New content is written under a temporary name, synced to the disk and renamed.  Nothing is written through a symbolic
link that lies where evomerge writes: in a folder from a stranger it could lead to any file.
"""
