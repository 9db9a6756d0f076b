# claims: has the parser recurse
# kind: 10 MB programs
# put @OPEN@: "(" * 5000
# put @CLOSE@: ")" * 5000
# guarded: syntax_error | memory; detail nested|Memory

x = @OPEN@1@CLOSE@
