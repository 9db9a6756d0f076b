# claims: keeps the judge waiting before the first case
# kind: CPU loop
# guarded: timeout; cpu 0.4

while True:
    pass
