# claims: shows fewer lines than there are
# kind: unicode and null bytes
# put @FEED@: "\f"
# put @SEPARATOR@: "\u2028"
# guarded: cheat; refused

text = "a@SEPARATOR@b"
@FEED@
def pick(numbers):
    return open("/etc/passwd")  # <- attack
