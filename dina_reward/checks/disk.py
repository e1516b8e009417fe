"""What a disk that is full, read-only or not ours says, in one line instead of a traceback."""

from __future__ import annotations

import errno
import os
import re


_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


def disk_fault(error: BaseException) -> str | None:
    """A line about an error that the disk is the reason of; ``None`` for any other error.

    Libraries that write by themselves, such as safetensors, put the system's number into the text of their own errors.
    """
    number, path = getattr(error, "errno", None), getattr(error, "filename", None)
    found = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and found is not None:
        number = int(found[1])
    if number not in _FAULTS:
        return None
    where = "" if path is None else f"{path}: "
    return f"{where}{os.strerror(number)}. What was complete before is whole; run the command again once it can write there"
