"""Verifiers that attack their worker, the pool and the host; a case is (code, statuses).

The code runs in a worker; ``value`` is what the reward returns. Statuses are those that may come of it.
"""

from __future__ import annotations

PRELUDE = '''
import asyncio, ctypes, gc, json, os, pickle, resource, signal, socket, stat, struct, subprocess, sys, threading, time

def channel():
    """The descriptor of the socket to the pool."""
    return next(fd for fd in range(3, 64) if is_socket(fd))

def is_socket(fd):
    try:
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    except OSError:
        return False

def nonce():
    frame = sys._getframe()
    while not isinstance(frame.f_locals.get("nonce"), str):
        frame = frame.f_back
    return frame.f_locals["nonce"]

def frame(message):
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return struct.pack(">I", len(body)) + body

def send(message):
    os.write(channel(), frame(message))
    forever()

def forge(results):
    send({"nonce": nonce(), "call": 0, "results": results})

class Payload:
    def __reduce__(self):
        return os.system, ("echo owned > OWNED",)

def forever():
    while True:
        time.sleep(1)

class Floats(float):
    def __float__(self):
        raise RuntimeError("no float")

class Hangs(float):
    def __float__(self):
        forever()

class BadRepr:
    def __repr__(self):
        raise RuntimeError("no repr")

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")
'''
FAIL, HANG, ANY, OK = ("error",), ("timeout",), ("ok", "error", "timeout"), ("ok",)

SENDS = {
    "pickle": "send(pickle.dumps(Payload()))",
    "raw pickle": "os.write(channel(), pickle.dumps(Payload())); forever()",
    "not JSON": "send(b'}{')",
    "not UTF-8": "send(b'\\xff\\xfe')",
    "deep JSON": "send(b'[' * 100_000)",
    "long integer": "send(b'9' * 10_000)",
    "giant length": "os.write(channel(), b'\\xff\\xff\\xff\\xff'); forever()",
    "giant frame": "send(b' ' * 2_000_000)",
    "empty frame": "send(b'')",
    "wrong nonce": "send({'nonce': 'x', 'call': 0, 'results': [['ok', 9.0, '']]})",
    "wrong call": "send({'nonce': nonce(), 'call': 99, 'results': [['ok', 9.0, '']]})",
    "many rows": "forge([['ok', 9.0, '']] * 50)",
    "forged status": "forge([['root', 9.0, '']])",
    "forged NaN": "forge([['ok', float('nan'), '']])",
    "forged 1e39": "forge([['ok', 1e39, '']])",
    "forged mapping": "forge({'a': 1})",
    "forged text": "forge([['ok', '9', '']])",
    "list": "send([1, 2])",
}
HALVES = {
    "half a frame": "os.write(channel(), frame({'nonce': nonce()})[:9]); forever()",
    "half a length": "os.write(channel(), b'\\x00\\x00'); forever()",
    "SIGSTOP in mid-message": "os.write(channel(), b'\\x00\\x00\\x00\\x09{'); os.kill(os.getpid(), signal.SIGSTOP)",
    "loop": "while True: pass",
    "C code that holds the GIL": "7 ** (10 ** 9)",
    "signals ignored": "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 3, 13, 14, 15)]; forever()",
    "signals blocked": "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64)); forever()",
    "generator that hangs": "values = (forever() for _ in range(1))",
    "float that hangs": "value = Hangs(1)",
    "thread that is waited for": "t = threading.Thread(target=forever); t.start(); t.join()",
    "regular expression": "import re; re.match('(a+)+$', 'a' * 40 + 'b')",
    "stop init": "os.kill(os.getppid(), signal.SIGSTOP); forever()",
}
RETURNS = {
    "NaN": "value = float('nan')",
    "infinity": "value = float('-inf')",
    "1e39": "value = 1e39",
    "huge integer": "value = 10 ** 5000",
    "text": "value = '1.0'",
    "object": "value = BadRepr()",
    "float that raises": "value = Floats(1)",
    "endless list": "import itertools; values = itertools.repeat(1.0)",
    "no list": "values = None",
    "recursion": "def f(): f()\nf()",
    "exception without text": "raise Unprintable",
    "exit": "sys.exit(0)",
    "memory": "x = bytearray(1 << 40)",
}
DIES = {
    "os._exit": "os._exit(0)",
    "abort": "os.abort()",
    "segmentation fault": "ctypes.string_at(0)",
    "descriptors closed": "os.closerange(3, 64); forever()",
    "socket shut down": "socket.socket(fileno=channel()).shutdown(2); forever()",
}
STRAYS = {
    "forged verdict": "os.write(channel(), frame({'nonce': nonce(), 'call': 0, 'results': [['ok', 9.0, '']]}))",
    "fork": "if os.fork() == 0: forever()",
    "setsid": "if os.fork() == 0: os.setsid(); forever()",
    "double fork": "if os.fork() == 0:\n  if os.fork() == 0: os.setsid(); forever()\n  os._exit(0)",
    "a hundred forks": "for _ in range(100):\n  if os.fork() == 0: forever()",
    "orphan without environment": "subprocess.Popen(['sleep', '600'], env={}, start_new_session=True)",
    "kill the parent": "os.kill(os.getppid(), signal.SIGKILL)",
    "kill everything": "signal.signal(15, signal.SIG_IGN); os.kill(-1, 15) if os.getpid() < 20 else None",
    "output flood": "[os.write(fd, b'noise ' * 100_000) for fd in (1, 2) for _ in range(20)]",
    "disk": "open(os.environ['TMPDIR'] + '/f', 'wb').write(b'x' * 50_000_000)",
    "json replaced": "json.dumps = json.loads = None",
    "os.write replaced": "os.write = socket.socket.sendall = None",
    "modules removed": "sys.modules.clear()",
    "change of directory": "os.chdir('/')",
    "alarm left": "signal.setitimer(signal.ITIMER_REAL, 0.05)",
    "limits raised": "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))",
    "ptrace": "value = float(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0))",
}
CASES = {
    **{f"sends: {name}": (code, FAIL) for name, code in SENDS.items()},
    **{f"hangs: {name}": (code, HANG) for name, code in HALVES.items()},
    **{f"returns: {name}": (code, FAIL) for name, code in RETURNS.items()},
    **{f"dies: {name}": (code, FAIL) for name, code in DIES.items()},
    **{f"leaves: {name}": (code, ANY) for name, code in STRAYS.items()},
}
REWARD = '''
class Hostile:
    """Runs the completion."""

    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config):
        pass

    def __call__(self, prompts, completions, **columns):
        names = dict(globals(), value=1.0)
        exec(completions[0], names)
        return names["values"] if "values" in names else [names["value"]]
'''
