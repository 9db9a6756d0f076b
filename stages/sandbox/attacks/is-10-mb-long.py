# claims: has a 10 MB program shipped to every sandbox
# kind: 10 MB programs
# put @LONG@: "x" * 10485760
# guarded: output_limit; detail 10\d{6} bytes

# @LONG@
def pick(numbers):
    return numbers.index(max(numbers))
