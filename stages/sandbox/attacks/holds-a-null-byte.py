# claims: ends where the check reads, goes on where the compiler reads
# kind: unicode and null bytes
# put @NULL@: "\u0000"
# guarded: syntax_error; detail null

x = "@NULL@"
import os
