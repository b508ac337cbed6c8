"""Run a command that may not write files beyond a size, or (``-``) not where the permissions forbid it, even as root.

Usage: restricted.py BYTES|- COMMAND...
"""

import ctypes
import os
import resource
import sys

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1

limit, *command = sys.argv[1:]
if limit != "-":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
elif os.geteuid() == 0:  # after the exec, root is bound by permissions like everyone
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "cannot drop CAP_DAC_OVERRIDE")
os.execvp(command[0], command)
