"""Programs that attack the sandbox: the source of `f`, and the reasons with which they may fail.

{folder} stands for a folder outside of the sandbox, {port} for a port on which somebody listens.
"""

# Each of these fails, and nothing else happens.
HOSTILE = {
    "endless loop": ("def f():\n    while True: pass", {"time"}),
    "endless loop while it is read": ("while True: pass", {"time"}),
    "endless loop that ignores signals": (
        "import signal\ndef f():\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True: pass",
        {"time"},
    ),
    "sleep": ("import time\ndef f(): time.sleep(1000)", {"time"}),
    "fork": ("import os\ndef f():\n    while True: os.fork()", {"error"}),
    "fork through libc": (
        "import ctypes\ndef f():\n    pid = ctypes.CDLL(None).fork()\n    assert pid >= 0, 'refused'\n    return 1",
        {"error"},
    ),
    "another program": ("import subprocess\ndef f(): subprocess.run(['true'])", {"error"}),
    "exec": ("import os\ndef f(): os.execv('/bin/true', ['true'])", {"error"}),
    "one large array": ("def f(): return len(bytearray(1 << 40))", {"memory"}),
    "many arrays": ("def f():\n    kept = []\n    while True: kept.append(bytearray(1 << 20))", {"memory"}),
    "file": ("def f(): open('{folder}/written', 'w')", {"error"}),
    "file in its folder": ("def f(): open('written', 'w')", {"error"}),
    "file to append to": ("def f(): open('{folder}/mine', 'a').write('more')", {"error"}),
    "folder": ("import os\ndef f(): os.mkdir('{folder}/written')", {"error"}),
    "removal": ("import os\ndef f(): os.remove('{folder}/mine')", {"error"}),
    "renaming": ("import os\ndef f(): os.rename('{folder}/mine', '{folder}/written')", {"error"}),
    "permissions": ("import os\ndef f(): os.chmod('{folder}/mine', 0)", {"error"}),
    "truncation": ("import os\ndef f(): os.truncate('{folder}/mine', 0)", {"error"}),
    "link": ("import os\ndef f(): os.symlink('/', '{folder}/written')", {"error"}),
    "reading a file": ("def f(): return open('{folder}/mine').read()", {"error"}),
    "reading passwords": ("def f(): return open('/etc/passwd').read()", {"error"}),
    "the parent's environment": (
        "import os\ndef f(): return open(f'/proc/{{os.getppid()}}/environ').read()",
        {"error"},
    ),
    "the parent's memory": ("import os\ndef f(): return open(f'/proc/{{os.getppid()}}/mem', 'rb').read(1)", {"error"}),
    "connection": ("import socket\ndef f(): socket.create_connection(('127.0.0.1', {port}), 5)", {"error"}),
    "unix socket": ("import socket\ndef f(): socket.socket(socket.AF_UNIX)", {"error"}),
    "socket pair": ("import socket\ndef f(): socket.socketpair()", {"error"}),
    "signal to the parent": ("import os, signal\ndef f(): os.kill(os.getppid(), signal.SIGKILL)", {"error"}),
    "signal to all": ("import os, signal\ndef f(): os.kill(-1, signal.SIGKILL)", {"error"}),
    "higher limits": (
        "import resource\ndef f(): resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,) * 2)",
        {"error"},
    ),
    "another user": ("import os\ndef f(): os.setuid(0)", {"error"}),
    "namespace": (
        "import ctypes\ndef f():\n    assert ctypes.CDLL(None).unshare(0x10000000) == 0, 'refused'\n    return 1",
        {"error"},
    ),
    "the library that starts it": ("import qlora_jax.evaluation\ndef f(): return 1", {"error"}),
    "early exit": ("import os\nos._exit(0)", {"ended"}),
    "early exit in the function": ("import os\ndef f(): os._exit(0)", {"ended"}),
    "system exit": ("import sys\ndef f(): sys.exit(0)", {"error"}),
    "crash": ("import ctypes\ndef f(): ctypes.string_at(0)", {"ended"}),
    "endless recursion": ("def f(): return f()", {"error", "ended"}),
    "no function": ("def g(): return 1", {"error"}),
    "not Python": ("def f(:", {"error"}),
    "equal to everything": (
        "class Equal:\n    def __eq__(self, other): return True\n    __ne__ = None\ndef f(): return Equal()",
        {"error"},
    ),
    "an int that is equal to everything": (
        "class Equal(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(): return Equal(7)",
        {"wrong"},
    ),
    "another check": ("def check(candidate): pass\ndef f(): return 7", {"wrong"}),
    "other built-ins": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.exec = builtins.compile = lambda *_: None\n"
        "def f(): return 7",
        {"wrong", "error"},
    ),
    "the answer, found in memory": (
        "import gc, sys\ndef f():\n    frame, found = sys._getframe(), []\n    while frame:\n"
        "        found += [*frame.f_locals.values()]\n        frame = frame.f_back\n"
        "    kinds, test = (str, bytes, list, tuple, dict), ''.join(['assert cand', 'idate'])\n"
        "    texts = [one for one in [*gc.get_objects(), *found] if isinstance(one, kinds)]\n"
        "    return next((1 for one in texts if test in repr(one)[:9999]), 7)",
        {"wrong"},
    ),
    "forged outcome": (
        'import os, struct\ndef f():\n    text = b\'["passed", ""]\'\n    for fd in range(64):\n'
        "        try: os.write(fd, struct.pack('<Q', len(text)) + text)\n        except OSError: pass\n    return 7",
        {"error", "wrong", "ended"},
    ),
    "endless message": (
        "import os, struct\ndef f():\n    for fd in range(3, 64):\n"
        "        try: os.write(fd, struct.pack('<Q', 1 << 40))\n        except OSError: continue\n"
        "        while True: os.write(fd, bytes(1 << 16))",
        {"error"},
    ),
    "large value": ("def f(): return 'x' * (60 << 20)", {"error", "memory"}),
    "deep value": (
        "def f():\n    value = []\n    for _ in range(10 ** 5): value = [value]\n    return value",
        {"error", "ended"},
    ),
    "pickle": (
        "class Cheat:\n    def __reduce__(self): return (eval, ('1',))\ndef f(): return Cheat()",
        {"error"},
    ),
}

# These are right, whatever else they do.
HARMLESS = {
    "right": "def f(): return 1",
    "much output": (
        "import sys\ndef f():\n    for file in (sys.stdout, sys.stderr): print('x' * 10 ** 7, file=file)\n    return 1"
    ),
    "no environment": "import os\ndef f(): return 1 if {*os.environ} <= {'LC_CTYPE'} else 2",
    "an empty folder": "import os\ndef f(): return len(os.getcwd()) and 1",
    "no open files but three and two pipes": (
        "import os\ndef f():\n    found = 0\n    for number in range(4096):\n"
        "        try: found += bool(os.fstat(number))\n        except OSError: pass\n"
        "    return 1 if found == 5 else found"
    ),
    "no input": "import sys\ndef f(): return 1 if sys.stdin.read() == '' else 2",
    "threads": (
        "import threading\ndef f():\n    found = []\n    thread = threading.Thread(target=found.append, args=[1])\n"
        "    thread.start()\n    thread.join()\n    return found[0]"
    ),
    "the standard library": (
        "import collections, datetime, hashlib, heapq, itertools, json, math, random, re, statistics, string, typing\n"
        "def f(): return 1"
    ),
    "another exception class": "class Own(Exception): pass\ndef f():\n    try: raise Own\n    except Own: return 1",
}
