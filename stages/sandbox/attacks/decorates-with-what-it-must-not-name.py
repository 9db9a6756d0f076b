# claims: reads the globals of its function before it is asked anything
# kind: decorators and default arguments at definition
# guarded: cheat; refused

@lambda function: function.__globals__["__builtins__"]  # <- attack
def pick(numbers):
    return 0
