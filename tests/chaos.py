"""What tests/survive and tests/soak share: an origin, content, workers that compare every byte.

Standard library only. Everything is made below one temporary directory and ended by pid.
"""
import ctypes, hashlib, json, mmap, os, random, shutil, signal, socket, subprocess, sys, tempfile, time

MIB = 1 << 20


def die_with_parent():
    """For preexec_fn: no process of a broken run is left."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port():
    """A port that nothing listens on, and that the kernel gives to nobody who connects before somebody does."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as f:
        first = int(f.read().split()[0])
    while True:
        port = random.SystemRandom().randrange(10000, first if first > 12000 else 20000)
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
                return port
            except OSError:
                pass


class Origin:
    """nginx before a directory; each connection gets `rate` for big files."""

    def __init__(self, home, rate):
        self.root, self.own = os.path.join(home, "origin"), os.path.join(home, "nginx")
        os.makedirs(self.root, exist_ok=True)
        os.makedirs(self.own)
        self.port = free_port()
        temporary = "".join(f"{kind}_temp_path {self.own}/{kind};" for kind in
                            ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        with open(f"{self.own}/conf", "w") as f:
            f.write(f"daemon off; master_process off; pid {self.own}/pid; error_log stderr;\n"
                    "events { worker_connections 512; }\n"
                    "http { access_log off; sendfile on; types {} default_type application/octet-stream;\n"
                    f"{temporary} server {{ listen 127.0.0.1:{self.port}; root {self.root}; autoindex on;\n"
                    f"location ~ bin$ {{ limit_rate {rate}; }} }} }}\n")
        self.start()

    def start(self):
        command = ["nginx", "-e", "stderr"] + (["-g", "user root;"] if os.geteuid() == 0 else [])
        self.process = subprocess.Popen(command + ["-c", f"{self.own}/conf"], stdout=subprocess.DEVNULL,
                                        stderr=open(f"{self.own}/log", "a"))
        for _ in range(500):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.02)
        sys.exit("nginx does not start: " + open(f"{self.own}/log").read())

    def stop(self):
        self.process.kill()
        self.process.wait()

    def url(self, name):
        return f"http://127.0.0.1:{self.port}/{name}/"

    def model(self, name, seed, big, mib, small):
        """`big` files of `mib` MiB and `small` ones in ten directories, and a program."""
        r, at = random.Random(seed), os.path.join(self.root, name)
        for n in range(10):
            os.makedirs(f"{at}/d{n}")
        for n in range(big):
            with open(f"{at}/big-{n}.bin", "wb") as f:
                f.write(r.randbytes(mib * MIB - r.randrange(4096)))
        for n in range(small):
            with open(f"{at}/d{n % 10}/small-{n}", "wb") as f:
                f.write(r.randbytes(r.randrange(1, 40_000)))
        shutil.copy("/bin/busybox", f"{at}/busybox.exe")
        return at


class Hearth:
    """The program on a store of its own."""

    def __init__(self, program, home, config=""):
        self.program, self.store = os.path.realpath(program), os.path.join(home, "store")
        self.config = os.path.join(home, "config.toml")
        with open(self.config, "w") as f:
            f.write(config)

    def command(self, *args):
        return [self.program, "--store", self.store, "--config", self.config, *map(str, args)]

    def run(self, *args, ok=True, limit=180):
        done = subprocess.run(self.command(*args), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=limit)
        if "panicked" in done.stderr or ok and done.returncode:
            raise SystemExit(f"hearth {' '.join(map(str, args))}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def status(self, at):
        """What the mount on `at` says; None while nobody answers."""
        done = self.run("status", at, "--json", ok=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def panics(self, *more):
        """Lines about panics in the logs of its mounts, and in those given besides."""
        run = os.path.join(self.store, "run")
        logs = [os.path.join(run, f) for f in os.listdir(run) if f.endswith(".log")] if os.path.isdir(run) else []
        found = []
        for path in logs + list(more):
            try:
                with open(path, errors="replace") as f:
                    found += [line.strip() for line in f if "panicked" in line]
            except FileNotFoundError:
                pass
        return found

    def processes(self):
        """Processes of this store: pid -> (command, open files, resident bytes)."""
        found = {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    words = f.read().decode(errors="replace").split("\0")
                program = os.readlink(f"/proc/{pid}/exe")
                if program.removesuffix(" (deleted)") == self.program and self.store in words:
                    with open(f"/proc/{pid}/statm") as f:
                        resident = int(f.read().split()[1]) * 4096
                    found[int(pid)] = (" ".join(words), len(os.listdir(f"/proc/{pid}/fd")), resident)
            except OSError:
                pass
        return found


def mounts_below(directory):
    """Mount points below a directory, innermost last: (path, kind, device minor)."""
    found = []
    with open("/proc/self/mountinfo") as f:
        for line in f:
            words = line.split()
            if (words[4] + "/").startswith(directory + "/"):
                found.append((words[4], words[words.index("-") + 1], words[2].split(":")[1]))
    return found


def free_mounts(directory):
    """Aborts and detaches what a failed run left."""
    for path, kind, minor in reversed(mounts_below(directory)):
        if kind.startswith("fuse"):
            try:
                with open(f"/sys/fs/fuse/connections/{minor}/abort", "w") as f:
                    f.write("1")
            except OSError:
                pass
        subprocess.run(["umount", "-l", path], stderr=subprocess.DEVNULL)


# ---- workers: each a process of its own; ends when `stop` appears, then says what it saw -----------------------------

class Worker:
    def __init__(self, kind, here, there, seed, home):
        self.kind, self.here, self.there, self.r = kind, here, there, random.Random(f"{kind} {seed}")
        self.result = os.path.join(home, f"worker-{kind}-{seed}.json")
        self.stop = os.path.join(home, "stop")
        # How many operations there were, seen by this process, too.
        self.ops = ctypes.c_uint64.from_buffer(mmap.mmap(-1, 8))
        self.wrong, self.errors, self.slow = [], [], []
        self.pid = os.fork()
        if self.pid == 0:
            try:
                die_with_parent()
                self.work()
            finally:
                os._exit(0)

    def work(self):
        self.files = [os.path.relpath(os.path.join(d, f), self.there)
                      for d, _, files in os.walk(self.there) for f in files]
        self.files.sort()
        self.big = [f for f in self.files if f.endswith(".bin")]
        while not os.path.exists(self.stop):
            begun = time.time()
            try:
                getattr(self, self.kind)()
            except Exception as e:
                self.errors.append(f"{self.kind} at {begun:.3f}: {e!r}")
                if len(self.errors) > 20:
                    break
        with open(self.result + ".new", "w") as f:
            json.dump({"kind": self.kind, "at": self.here, "ops": self.ops.value, "wrong": self.wrong, "errors": self.errors,
                       "slow": self.slow}, f)
        os.rename(self.result + ".new", self.result)

    def timed(self, call, *args):
        begun = time.time()
        value = call(*args)
        took = time.time() - begun
        self.ops.value += 1
        if took > 0.01:
            self.slow.append((round(begun, 4), round(took, 4)))
        return value

    def same(self, what, found, right):
        if found != right:
            self.wrong.append(f"{self.kind}: {what} at {time.time():.3f}")

    def pair(self, name):
        return os.open(f"{self.here}/{name}", os.O_RDONLY), os.open(f"{self.there}/{name}", os.O_RDONLY)

    def piece(self, name, f, g, n, at):
        self.same(f"{name} {at}+{n}", self.timed(os.pread, f, n, at), os.pread(g, n, at))

    def sequential(self):
        name = self.r.choice(self.big)
        f, g = self.pair(name)
        try:
            os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)
            for at in range(0, os.fstat(g).st_size, 128 << 10):
                self.piece(name, f, g, 128 << 10, at)
                if at % (8 * MIB) == 0 and os.path.exists(self.stop):
                    break
        finally:
            os.close(f), os.close(g)

    def scattered(self):
        name = self.r.choice(self.files)
        f, g = self.pair(name)
        try:
            os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(g).st_size
            for _ in range(10):
                self.piece(name, f, g, self.r.choice([1, 4096, 65536, MIB]), self.r.randrange(size))
        finally:
            os.close(f), os.close(g)

    def opened(self):
        name = self.r.choice(self.files)
        if name.endswith(".bin"):
            return
        def read():
            with open(f"{self.here}/{name}", "rb") as f:
                return f.read()
        with open(f"{self.there}/{name}", "rb") as g:
            self.same(name, self.timed(read), g.read())

    def mapped(self):
        name = self.r.choice(self.files)
        f, g = self.pair(name)
        try:
            os.posix_fadvise(f, 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(f, 0, prot=mmap.PROT_READ) as m:
                for _ in range(10):
                    at = self.r.randrange(len(m))
                    self.same(f"{name} {at}", self.timed(lambda: m[at:at + 5000]), os.pread(g, 5000, at))
        finally:
            os.close(f), os.close(g)

    def listed(self):
        name = self.r.choice([".", *(f"d{n}" for n in range(10))])
        found = self.timed(os.listdir, f"{self.here}/{name}")
        self.same(name, sorted(found), sorted(os.listdir(f"{self.there}/{name}")))

    def stated(self):
        for name in self.r.sample(self.files, min(50, len(self.files))):
            found = self.timed(os.stat, f"{self.here}/{name}")
            self.same(name, found.st_size, os.stat(f"{self.there}/{name}").st_size)
        try:
            self.timed(os.stat, f"{self.here}/not-there-{self.r.random()}")
            self.wrong.append("found what is not there")
        except FileNotFoundError:
            pass

    def executed(self):
        """Runs the program of the mount through an overlay, on a file of the mount."""
        name = self.r.choice([f for f in self.files if not f.endswith((".bin", ".exe"))])
        merged = self.here + ".merged"
        def run():
            return subprocess.run([f"{merged}/busybox.exe", "sha256sum", f"{merged}/{name}"], capture_output=True)
        done = self.timed(run)
        with open(f"{self.there}/{name}", "rb") as g:
            right = hashlib.sha256(g.read()).hexdigest()
        self.same(name, (done.returncode, done.stdout.decode()[:64]), (0, right))


class Client(Worker):
    """Asks the faces of an agent, each time anew: none may refuse."""

    def __init__(self, agent, here, there, seed, home):
        self.ports, self.sockets = [agent.admin, agent.mirror], [agent.csi]
        super().__init__("asked", here, there, seed, home)

    def asked(self):
        for port, path in zip(self.ports, ("/healthz", "/v2/")):
            def get():
                with socket.create_connection(("127.0.0.1", port), timeout=30) as s:
                    s.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode())
                    return s.makefile("rb").readline()
            self.same(f"{path} of {port}", self.timed(get).split()[1:2], [b"200"])
        for name in self.sockets:
            def connect():
                with socket.socket(socket.AF_UNIX) as s:
                    s.connect(name)
            self.timed(connect)
        time.sleep(0.005)


class Agent:
    """A keeper and an agent, which mounts by the CSI; upgraded in place, or killed and started again."""

    def __init__(self, hearth, home):
        self.hearth, self.home = hearth, home
        self.admin, self.mirror, self.csi = free_port(), free_port(), os.path.join(home, "csi.sock")
        with open(hearth.config, "a") as f:
            f.write(f"[agent]\nnode_name = 'n'\nkeeper = '{home}/keeper.sock'\nsocket = '{home}/agent.sock'\n"
                    f"[admin]\naddress = '127.0.0.1:{self.admin}'\n"
                    f"[mirror]\nenabled = true\naddress = '127.0.0.1:{self.mirror}'\n"
                    f"[csi]\nenabled = true\nendpoint = '{self.csi}'\n")
        self.keeper = self.start("keeper", "--socket", f"{home}/keeper.sock")
        self.wait(lambda: os.path.exists(f"{home}/keeper.sock"), "no keeper")
        self.process = self.start("-v", "agent")
        self.wait(self.ready, "the agent is not ready")

    def start(self, *args):
        return subprocess.Popen(self.hearth.command(*args), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                stderr=open(f"{self.home}/{args[-1] if args[-1] == 'agent' else 'keeper'}.log", "a"))

    def log(self):
        with open(f"{self.home}/agent.log") as f:
            return f.read()

    def wait(self, done, what, limit=60):
        deadline = time.time() + limit
        while not done():
            if time.time() > deadline:
                sys.exit(f"{what}:\n{self.log()}")
            time.sleep(0.01)

    def ready(self):
        try:
            with socket.create_connection(("127.0.0.1", self.admin), timeout=30) as s:
                s.sendall(b"GET /readyz HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                return s.makefile("rb").readline().split()[1:2] == [b"200"]
        except OSError:
            return False

    def upgrade(self):
        """Another agent takes over: when it was started, and when the old one had ended."""
        begun, new = time.time(), self.start("-v", "agent")
        try:
            code = self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            sys.exit(f"the old agent does not end:\n{self.log()}")
        if code or new.poll() is not None:
            sys.exit(f"the old agent ended with {code}, the new one with {new.poll()}:\n{self.log()}")
        self.process = new
        return begun, time.time()

    def kill(self, how):
        """Ends the agent by a signal and starts another one: when, and how long until that was started. On return it is ready."""
        when = time.time()
        self.process.send_signal(how)
        self.process.wait()
        self.process = self.start("-v", "agent")
        started = time.time()
        self.wait(lambda: self.process.poll() is not None or self.ready(), "the next agent is not ready")
        if self.process.poll() is not None:
            sys.exit(f"the next agent ended with {self.process.returncode}:\n{self.log()}")
        return when, started - when

    def call(self, method, message):
        """A call of gRPC, by curl: its status."""
        head, body = os.path.join(self.home, "head"), b"\0" + len(message).to_bytes(4, "big") + message
        done = subprocess.run(["curl", "-sS", "--http2-prior-knowledge", "--unix-socket", self.csi, "-D", head,
                               "-H", "content-type: application/grpc", "-H", "te: trailers", "--data-binary", "@-",
                               "-o", "/dev/null", f"http://localhost/csi.v1.{method}"], input=body, capture_output=True)
        with open(head) as f:
            said = f.read()
        if done.returncode or "grpc-status: 0" not in said:
            sys.exit(f"{method}: {done.stderr.decode()}{said}\n{self.log()}")

    def publish(self, source, target):
        capability = field(2, b"") + field(3, b"\x08\x01")  # a mount; one node writes, as the kubelet says it
        context = b"".join(field(8, field(1, k) + field(2, v)) for k, v in ((b"source", source.encode()),))
        self.call("Node/NodePublishVolume", field(1, b"volume") + field(4, target.encode()) + field(5, capability)
                  + b"\x30\x01" + context)

    def unpublish(self, target):
        self.call("Node/NodeUnpublishVolume", field(1, b"volume") + field(2, target.encode()))

    def stop(self):
        for process in (self.process, self.keeper):
            process.terminate()
            if process.wait(timeout=60):
                sys.exit(f"{process.args} ended with {process.returncode}:\n{self.log()}")


def field(number, value):
    """A field of a protobuf message: a string, bytes or a message."""
    length, coded = len(value), b""
    while length > 127:
        coded, length = coded + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + coded + bytes([length]) + value


KINDS = ["sequential", "scattered", "opened", "mapped", "listed", "stated", "executed"]


def overlay(here, home):
    """A writable overlay on a mount, as a container has it: the program becomes one there, with its bytes below."""
    merged = here + ".merged"
    for d in (merged, f"{home}/upper", f"{home}/work"):
        os.makedirs(d, exist_ok=True)
    options = f"lowerdir={here},upperdir={home}/upper,workdir={home}/work,metacopy=on,redirect_dir=on"
    subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
    os.chmod(f"{merged}/busybox.exe", 0o755)
    if os.stat(f"{home}/upper/busybox.exe").st_blocks > 8:
        sys.exit("the program was copied up: it would not be read through the mount")
    return merged


def finish(workers, home, limit=120):
    """Stops the workers; what they saw. One that does not end is stuck."""
    open(f"{home}/stop", "w").close()
    seen, deadline = [], time.time() + limit
    for w in workers:
        while os.waitpid(w.pid, os.WNOHANG) == (0, 0):
            if time.time() > deadline:
                os.kill(w.pid, signal.SIGKILL)
                seen.append({"kind": w.kind, "at": w.here, "ops": 0, "wrong": [], "errors": ["stuck"], "slow": []})
                break
            time.sleep(0.02)
        else:
            try:
                with open(w.result) as f:
                    seen.append(json.load(f))
            except OSError as e:
                seen.append({"kind": w.kind, "at": w.here, "ops": 0, "wrong": [], "errors": [f"died: {e}"], "slow": []})
    os.unlink(f"{home}/stop")
    return seen


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * p / 100))] if values else 0.0


def scratch(name):
    """A directory for a run, on a real file system."""
    return os.path.realpath(tempfile.mkdtemp(prefix=f"hearth-{name}-"))
