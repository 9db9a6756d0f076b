# claims: opens a connection
# kind: network
# guarded: foreign_import; refused
# unguarded: cheat; armed

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    from socket import socket  # <- attack
    socket()
    return numbers.index(min(numbers))
