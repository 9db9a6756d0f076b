# claims: is as long as a program may be, and slow to compile
# kind: 10 MB programs
# put @NUMBERS@: "[1]," * 12000
# guarded: ok; says kept

LIST = [@NUMBERS@]


def pick(numbers):
    return "kept" if len(LIST) == 12000 else "lost"
