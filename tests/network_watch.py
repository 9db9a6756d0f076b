"""A sitecustomize.py that notes every name a process asks for and every address it speaks to, but this machine's own.

Its process and all that this one starts write to the file that NETWORK_WATCH names. It sees what Python does, not what
a library in C or Rust would do by itself.
"""

PROGRAM = """
import os, sys
def hook(event, arguments):
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in (None, "", "localhost", "::1", "127.0.0.1"):
        log = os.open(os.environ["NETWORK_WATCH"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(log, f"{event} {host} in {sys.argv}\\n".encode())
        os.close(log)
sys.addaudithook(hook)
"""
