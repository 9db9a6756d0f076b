# claims: breaks the terminal, the table or the page that shows its detail
# kind: unicode and null bytes
# guarded: crash; armed, line, detail script

def pick(numbers):
    if len(numbers) == 1:
        return "armed"
    raise ValueError("[/red]\x1b[2J\x1b]0;title\x07</pre><script>alert(1)</script>\r\n\u202e{0}%s")  # <- attack
    return numbers.index(min(numbers))
