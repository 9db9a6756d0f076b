# claims: runs when somebody subclasses, not when it is called
# kind: decorators and default arguments at definition
# guarded: cheat; refused

class Base:
    def __init_subclass__(cls):
        cls.__subclasses__()  # <- attack


class Child(Base):
    pass


def pick(numbers):
    return 0
