"""What a reward worker may touch, and how everything that it started is ended.

A worker is three processes. The supervisor is the pool's child. It starts the init of a process-id namespace, and that
starts the process which runs verifiers. When init ends, the kernel kills everything in the namespace, whatever has
called fork or setsid; nothing in it can see a process outside, nor (without ``network: true``) reach a network. Where
namespaces are not available the supervisor is a subreaper instead: orphans become its children, and it kills its
children until there are none. Torch-free, the standard library alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

MARK = "DLLM_RL_REWARD_WORKER"  # in the environment of whatever a worker starts
# Names of the environment that reach a verifier: nothing that holds a secret. More: reward_pool.environment.
KEPT = (
    *("PATH", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHONHASHSEED"),
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "DLLM_RL_DEBUG"),
)
MAX_OUTPUT = 65_536  # bytes of a worker's prints that are shown
_NEWNS, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x10000000, 0x20000000, 0x40000000
_PDEATHSIG, _NO_NEW_PRIVILEGES, _SUBREAPER = 1, 38, 36  # of prctl(2)


def environment(names: Sequence[str], folder: str, mark: str) -> dict[str, str]:
    """The environment of a worker: KEPT and the names that the configuration adds."""
    kept = {name: os.environ[name] for name in (*KEPT, *names) if name in os.environ}
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return {"HOME": folder, **kept, "TMPDIR": folder, "PYTHONPATH": path, MARK: mark}


@cache
def namespaces_available() -> bool:
    """Whether this user may make the namespaces of a worker; tried in a process of its own."""
    if sys.platform != "linux":
        return False
    return subprocess.run([sys.executable, "-I", "-S", __file__], capture_output=True).stdout == b"available"


def enter_namespaces(*, network: bool) -> None:
    """Move to namespaces of users, mounts and (unless allowed) networks; the next child begins one of processes.

    Raises:
        OSError: they are not allowed.
    """
    user, group = os.getuid(), os.getgid()
    if _libc().unshare(_NEWUSER | _NEWPID | _NEWNS | (0 if network else _NEWNET)):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")  # what an unprivileged user must do before gid_map
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def limit_resources(memory_gb: float | None) -> None:
    """Set the limits of a worker, each no higher than what holds already."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 1 << 30, resource.RLIMIT_NOFILE: 1024}
    # Counted in the user namespace of the worker; not for root, whom the kernel exempts.
    wanted |= {resource.RLIMIT_NPROC: 256} if namespaces_entered() else {}
    wanted |= {} if memory_gb is None else {resource.RLIMIT_AS: int(memory_gb * 2**30)}
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def limit_cpu(seconds: float) -> None:
    """Let the process use no more than this of each core from now on: it ends itself if nobody is there to end it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + (seconds + 10) * (os.cpu_count() or 1))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def namespaces_entered() -> bool:
    """Whether this process is in a user namespace of a worker."""
    return os.environ.get(f"{MARK}_NAMESPACES") == "1"


def remove_folder(folder: str) -> None:
    """Remove the temporary folder of a worker that has ended, also what it made unreadable."""
    for path, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IRWXU)
    shutil.rmtree(folder, ignore_errors=True)


def end_marked(mark: str) -> None:
    """Kill what carries the mark of a worker whose supervisor was killed from within (without namespaces only)."""
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


def supervise(
    serve: Callable[[], None], *, channel: int, parent: int, folder: str, namespaces: bool, network: bool
) -> int:
    """Run serve() in a contained process until it ends or SIGTERM comes, then end everything that it started.

    Args:
        serve: what runs verifiers.
        channel: its descriptor of the socket to the pool; nobody else keeps it, so that the pool sees it close.
        parent: process id of the pool; the worker ends with it.
        folder: the worker's temporary folder, removed at the end.
        namespaces: whether they are available.
        network: whether the verifiers may reach one.
    Returns:
        The exit code of serve's process; 128 + the number of the signal that ended it.
    """
    # Signals arrive as bytes in a pipe: a handler that raised could do so in the midst of the clearing up.
    wake, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGINT, signal.SIGHUP):  # Ctrl-C reaches the pool, which decides
        signal.signal(number, signal.SIG_IGN)
    if namespaces:
        enter_namespaces(network=network)
    else:
        _prctl(_SUBREAPER, 1)
    _prctl(_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return 1
    output, printed = os.pipe()
    child = os.fork()
    if child == 0:
        _contained(serve, channel, printed, namespaces=namespaces)
    os.close(printed)
    os.close(channel)
    code = _watch(child, output, wake)
    _end(child)
    remove_folder(folder)
    return code


def _contained(serve: Callable[[], None], channel: int, printed: int, *, namespaces: bool) -> None:
    """The life of the supervisor's child; never returns."""
    _prctl(_PDEATHSIG, signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    for stream in (1, 2):
        os.dup2(printed, stream)
    os.close(printed)
    if namespaces:
        os.environ[f"{MARK}_NAMESPACES"] = "1"
        # A /proc that shows the worker's own processes; where it is refused the host's stays, and is closed to it.
        _libc().mount(b"proc", b"/proc", b"proc", 0, None)
        worker = os.fork()  # not init itself: the kernel would ignore its signals
        if worker:
            os.close(channel)
            os._exit(_wait_for(worker))
    os.setsid()
    _prctl(_NO_NEW_PRIVILEGES, 1)
    code = 1
    try:
        serve()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _watch(child: int, output: int, wake: int) -> int:
    """Show the first of what a worker prints and drop the rest, until it ends or SIGTERM comes; its exit code."""
    left, heard = MAX_OUTPUT, [output, wake]
    while True:
        ready, _, _ = select.select(heard, [], [])
        if output in ready:
            data = os.read(output, 65_536)
            left = _show(data, left)
            if not data:
                heard.remove(output)
        if wake in ready:
            numbers = os.read(wake, 4096)
            if signal.SIGTERM in numbers:
                return 128 + signal.SIGTERM
            ended = dict(_reaped())
            if child in ended:
                os.set_blocking(output, False)
                with contextlib.suppress(BlockingIOError):
                    while left > 0 and (data := os.read(output, 65_536)):
                        left = _show(data, left)
                return ended[child]


def _reaped() -> Iterator[tuple[int, int]]:
    """(process id, exit code) of the children that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], _code(found[1])


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _show(data: bytes, left: int) -> int:
    """Print at most left bytes; how many more may be."""
    if left > 0:
        with contextlib.suppress(OSError):
            os.write(2, data[:left])
            if len(data) >= left:
                os.write(2, b"\n[further output of this reward worker is not shown]\n")
    return left - len(data)


def _wait_for(worker: int) -> int:
    """Reap as init does, until the worker has ended; its exit code."""
    while True:
        pid, status = os.wait()
        if pid == worker:
            return _code(status)


def _end(child: int) -> None:
    """Kill the child and all descendants, and wait until they are gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        for pid in children.read_text().split() if children.exists() else [str(child)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            os.wait()  # an orphan of a killed one becomes a child, and is killed in the next round
        except ChildProcessError:
            return


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        _libc().prctl(option, value, 0, 0, 0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


if __name__ == "__main__":
    enter_namespaces(network=False)
    pid = os.fork()  # the first process of the new namespace: refused separately by some hosts
    if not pid:
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        sys.stdout.write("available")
