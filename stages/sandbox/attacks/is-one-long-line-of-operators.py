# claims: has the compiler recurse
# kind: 10 MB programs
# put @MANY@: "-" * 100000
# guarded: syntax_error | memory | crash; detail nest|recursion|Recursion|Memory|SIGSEGV

x = @MANY@1
