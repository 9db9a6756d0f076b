# claims: ends the process before the first case, so that nothing is judged
# kind: os._exit
# guarded: foreign_import; refused
# unguarded: crash; detail exited with status 0

import os  # <- attack

os._exit(0)
