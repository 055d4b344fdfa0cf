//! Programs that people run, from images of Debian packages: each starts, works,
//! stops by its image's signal, and finds what it wrote when it is started again.

mod live;
mod served;
mod throughput;
mod warm;

use crate::support::{Call, PATIENCE, Ran, own_root, variable};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How long a server may take to stop before it is killed, in seconds.
const STOP_TIMEOUT: &str = "120";

/// How long a server may take to make its files and begin, on an emulated host.
const SETUP_PATIENCE: Duration = Duration::from_secs(600);

/// One image in a state directory of its own, and one container of it. The directory
/// goes when the test ends: all images together are more than the test host holds.
struct Workload {
    root: TempDir,
    image: String,
}

impl Workload {
    /// Loads the image `debian-NAME:bookworm`.
    fn new(name: &str) -> Self {
        let root = own_root();
        let file = variable(&format!("VM_RUN_TEST_{}", name.to_uppercase()));
        let file = file.to_str().expect("a plain path");
        let image = format!("debian-{name}:bookworm");
        let workload = Self { root, image };
        workload.does(&["image", "load", "-i", file]);
        workload
    }

    fn root(&self) -> &Path {
        self.root.path()
    }

    /// Any command.
    fn ran(&self, words: &[&str]) -> Ran {
        Call::vm_run_in(self.root(), words).end()
    }

    /// One that works; what it prints.
    fn does(&self, words: &[&str]) -> String {
        let ran = self.ran(words);
        assert_eq!(ran.status, 0, "{words:?}: {ran}");
        ran.out()
    }

    /// The container: the image, after these options and before this command.
    fn starts(&self, options: &[&str], command: &[&str]) {
        let named = ["-d", "--name", "it"];
        let words = [&named, options, &[self.image.as_str()], command].concat();
        let ran = Call::run_to_keep(self.root(), &words).end();
        assert_eq!(ran.status, 0, "{words:?}: {ran}");
    }

    /// A command in the container.
    fn exec(&self, command: &[&str]) -> Ran {
        self.ran(&[&["exec", "it"], command].concat())
    }

    /// One that works.
    fn execs(&self, command: &[&str]) -> String {
        let ran = self.exec(command);
        assert_eq!(ran.status, 0, "{command:?}: {ran}: {}", self.log());
        ran.out()
    }

    /// Asks until the answer is this one.
    fn answers(&self, command: &[&str], answer: &str) {
        let deadline = Instant::now() + SETUP_PATIENCE;
        loop {
            let ran = self.exec(command);
            if ran.status == 0 && ran.out() == answer {
                return;
            }
            let is_late = Instant::now() >= deadline;
            assert!(!is_late, "{command:?}: {ran}: {}", self.log());
            // Each question takes the server's processor, and on an emulated host much of it.
            std::thread::sleep(Duration::from_secs(2));
        }
    }

    /// Asks it to stop, and takes no other status than this for its end.
    fn stops_with(&self, status: &str) {
        self.does(&["stop", "-t", STOP_TIMEOUT, "it"]);
        assert_eq!(self.does(&["wait", "it"]), status, "{}", self.log());
    }

    /// The last that the container said.
    fn log(&self) -> String {
        let log = self.ran(&["logs", "--tail", "40", "it"]);
        format!("it said {:?} and {:?}", log.out(), log.err())
    }
}

impl Drop for Workload {
    /// Nothing is to run on when a test has failed.
    fn drop(&mut self) {
        self.ran(&["rm", "-f", "it"]);
    }
}

/// A compiled module of a package, modules of the standard library over libraries in C,
/// processes and threads.
#[test]
fn python_runs_compiled_modules_processes_and_threads() {
    const SCRIPT: &str = r#"
import ctypes, hashlib, multiprocessing, signal, sqlite3, threading
from markupsafe import _speedups, escape
assert escape("<b>") == "&lt;b&gt;" and _speedups.__file__.endswith(".so")
assert ctypes.CDLL("libc.so.6").strlen(b"seven c") == 7
assert hashlib.sha256(b"").hexdigest().startswith("e3b0c442")
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, range(-3, 0)) == [3, 2, 1]
threads = [threading.Thread(target=sum, args=(range(1000),)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
lives = sqlite3.connect("/lives.db")
lives.execute("create table if not exists life (n integer primary key)")
lives.execute("insert into life default values")
lives.commit()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("lives", *lives.execute("select count(*) from life").fetchone(), flush=True)
signal.sigwait([signal.SIGTERM])
raise SystemExit(7)
"#;
    let python = Workload::new("python3");
    python.starts(&[], &["python3", "-c", SCRIPT]);
    says(&python, "lives 1\n");
    python.stops_with("7\n");
    python.does(&["start", "it"]);
    says(&python, "lives 1\nlives 2\n");
    python.stops_with("7\n");
}

#[test]
fn node_serves_http_over_loopback() {
    const SERVER: &str = r#"
const fs = require("fs"), http = require("http"), crypto = require("crypto");
fs.appendFileSync("/lives", "life\n");
const server = http.createServer((request, response) => {
    const hash = crypto.createHash("sha256").update(request.url).digest("hex");
    response.end(hash + " " + fs.readFileSync("/lives"));
});
server.listen(3000, "127.0.0.1");
process.on("SIGTERM", () => server.close(() => process.exit(5)));
"#;
    // The digest of "/", by coreutils and not by what is tested.
    const ASK: &str = r#"
exec 3<>/dev/tcp/127.0.0.1/3000
printf 'GET / HTTP/1.0\r\n\r\n' >&3
answer=$(cat <&3)
digest=$(printf / | sha256sum | cut -d ' ' -f 1)
case $answer in *"$digest life"*) echo "${answer##*"$digest "}" ;; *) exit 1 ;; esac
"#;
    let node = Workload::new("node");
    node.starts(&[], &["-e", SERVER]);
    node.answers(&["bash", "-c", ASK], "life\n");
    node.stops_with("5\n");
    node.does(&["start", "it"]);
    node.answers(&["bash", "-c", ASK], "life\nlife\n");
    node.stops_with("5\n");
}

#[test]
fn redis_keeps_its_keys() {
    let redis = Workload::new("redis");
    redis.starts(&[], &["--appendonly", "yes"]);
    redis.answers(&["redis-cli", "ping"], "PONG\n");
    assert_eq!(redis.execs(&["redis-cli", "set", "key", "kept"]), "OK\n");
    assert_eq!(redis.execs(&["redis-cli", "incr", "count"]), "1\n");
    // The entrypoint has given up root.
    assert_eq!(redis.execs(&["stat", "-c", "%U", "/proc/1"]), "redis\n");
    redis.stops_with("0\n");
    redis.does(&["start", "it"]);
    redis.answers(&["redis-cli", "get", "key"], "kept\n");
    assert_eq!(redis.execs(&["redis-cli", "incr", "count"]), "2\n");
    redis.stops_with("0\n");
}

#[test]
fn nginx_serves_a_file_and_logs_it() {
    const ASK: &str = r#"
exec 3<>/dev/tcp/127.0.0.1/80
printf 'GET /%s HTTP/1.0\r\n\r\n' "$1" >&3
cat <&3 | tail -n 1
"#;
    let nginx = Workload::new("nginx");
    nginx.starts(&[], &[]);
    nginx.answers(&["bash", "-c", ASK, "ask"], "served by nginx\n");
    nginx.execs(&["sh", "-c", "echo written later > /var/www/html/new"]);
    nginx.stops_with("0\n");
    nginx.does(&["start", "it"]);
    nginx.answers(&["bash", "-c", ASK, "ask", "new"], "written later\n");
    nginx.stops_with("0\n");
    let log = nginx.does(&["logs", "it"]);
    for line in ["\"GET / HTTP/1.0\" 200", "\"GET /new HTTP/1.0\" 200"] {
        assert!(log.contains(line), "{log}");
    }
}

#[test]
fn postgres_makes_a_cluster_and_keeps_its_rows() {
    let postgres = Workload::new("postgres");
    let count = "select count(*), sum(n) from t";
    let sql = |text| ["psql", "-U", "postgres", "-qtA", "-c", text];
    postgres.starts(&[], &[]);
    postgres.answers(&sql("select 1"), "1\n");
    postgres.execs(&sql(
        "create table t as select n from generate_series(1, 1000) n",
    ));
    postgres.execs(&sql("create index on t (n)"));
    let undone = "begin; delete from t; rollback";
    postgres.execs(&sql(undone));
    assert_eq!(postgres.execs(&sql(count)), "1000|500500\n");
    postgres.stops_with("0\n");
    postgres.does(&["start", "it"]);
    postgres.answers(&sql(count), "1000|500500\n");
    postgres.stops_with("0\n");
    let log = postgres.does(&["logs", "it"]) + &postgres.ran(&["logs", "it"]).err();
    assert_eq!(log.matches("fast shutdown request").count(), 2, "{log}");
    // What was stopped well has nothing to recover.
    assert!(!log.contains("not properly shut down"), "{log}");
}

#[test]
fn sqlite_keeps_a_database_in_the_image_s_directory() {
    const SQL: &str = "pragma journal_mode = wal;
        create table if not exists life (n integer primary key);
        insert into life default values; select count(*) from life;";
    let sqlite = Workload::new("sqlite");
    sqlite.starts(&[], &["sqlite3", "db", SQL]);
    assert_eq!(sqlite.does(&["wait", "it"]), "0\n");
    assert_eq!(sqlite.does(&["start", "-a", "it"]), "wal\n2\n");
    let wrong = [sqlite.image.as_str(), "sqlite3", "db", "select"];
    assert_eq!(Call::run_in(sqlite.root(), &wrong).end().status, 1);
}

#[test]
fn gcc_compiles_a_program_that_runs() {
    const PROGRAM: &str = r#"
#include <math.h>
#include <pthread.h>
#include <stdio.h>
static void *root(void *number) {
    *(double *)number = sqrt(*(double *)number);
    return NULL;
}
int main(void) {
    double number = 1764;
    pthread_t thread;
    if (pthread_create(&thread, NULL, root, &number) || pthread_join(thread, NULL))
        return 1;
    printf("%g\n", number);
    return 42;
}
"#;
    let script = "cat > program.c && cc -O2 -Wall -Werror program.c -lm -o program && ./program";
    let gcc = Workload::new("gcc");
    let words = ["-i", "-w", "/tmp", &gcc.image, "sh", "-c", script];
    let ran = Call::run_in(gcc.root(), &words).end_with(PROGRAM.as_bytes());
    assert_eq!((ran.status, ran.out()), (42, "42\n".into()), "{ran}");
}

#[test]
fn git_commits_and_clones() {
    const SCRIPT: &str = r#"
set -e
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git init -q -b main one
echo content > one/file
git -C one add file
git -C one commit -q -m 'The first'
git clone -q one two
git -C two fsck --strict
git -C two log --format=%s
cat two/file
"#;
    let git = Workload::new("git");
    // The image's entrypoint is git, and its directory takes the clone.
    let told = Call::run_in(git.root(), &[&git.image, "--version"]).end();
    assert!(told.out().starts_with("git version 2."), "{told}");
    git.starts(&["--entrypoint", "sh"], &["-c", SCRIPT]);
    assert_eq!(git.does(&["wait", "it"]), "0\n", "{}", git.log());
    assert_eq!(git.does(&["logs", "it"]), "The first\ncontent\n");
}

/// Waits until the container's log is this.
fn says(workload: &Workload, text: &str) {
    let deadline = Instant::now() + PATIENCE;
    while workload.does(&["logs", "it"]) != text {
        assert!(Instant::now() < deadline, "{}", workload.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}
