# claims: reads otherwise than it is shown, by bidirectional controls
# kind: unicode and null bytes
# put @RLO@: "\u202e"
# guarded: syntax_error; refused

x = 1 @RLO@ + 2  # <- attack
