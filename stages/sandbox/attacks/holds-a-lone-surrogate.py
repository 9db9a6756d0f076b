# claims: breaks whoever encodes the program
# kind: unicode and null bytes
# put @HALF@: "\ud800"
# guarded: syntax_error; detail surrogate

x = "@HALF@"
