//! Programs that people run, forked in the middle of it.

use super::{SETUP_PATIENCE, Workload};
use std::time::{Duration, Instant};

/// The container and its forks.
const FAMILY: [&str; 3] = ["it", "fork-1", "fork-2"];

impl Workload {
    /// A command in one of the family; what it prints.
    fn in_one(&self, name: &str, command: &[&str]) -> String {
        self.does(&[&["exec", name], command].concat())
    }

    /// Asks one of the family until the answer is this one.
    fn until(&self, name: &str, command: &[&str], is_it: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + SETUP_PATIENCE;
        loop {
            let ran = self.ran(&[&["exec", name], command].concat());
            if ran.status == 0 && is_it(&ran.out()) {
                return ran.out();
            }
            assert!(
                Instant::now() < deadline,
                "{name}: {command:?}: {ran}: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn forks(&self) {
        self.does(&["fork", "-n", "2", "--name", "fork", "it"]);
    }

    /// Each ends, with this status, and has said this; the rest of a fork's own words.
    fn all_end(&self, status: &str) -> Vec<String> {
        let end = |name: &&str| {
            let deadline = Instant::now() + SETUP_PATIENCE;
            while is_running(&self.does(&["ps", "-a", "--json"]), name) {
                assert!(Instant::now() < deadline, "{name} does not end");
                std::thread::sleep(Duration::from_secs(2));
            }
            assert_eq!(self.does(&["wait", name]), status, "{name}");
            self.ran(&["logs", name]).out()
        };
        FAMILY.iter().map(end).collect()
    }

    fn ends_forks(&self) {
        self.does(&["rm", "-f", "fork-1", "fork-2"]);
    }
}

/// In docker's list.
fn is_running(list: &str, name: &str) -> bool {
    let list: serde_json::Value = serde_json::from_str(list).expect("JSON");
    let mut all = list.as_array().into_iter().flatten();
    all.any(|one| one["Name"] == format!("/{name}") && one["State"]["Status"] == "running")
}

#[test]
fn gcc_in_the_middle_of_a_program() {
    // Functions for the compiler to think about.
    const SCRIPT: &str = r#"cd /tmp
        i=0; while test $i -lt 80; do i=$((i + 1))
            echo "unsigned f$i(unsigned n) { unsigned s = $i;
                for (unsigned i = 0; i < n; i++) for (unsigned j = 0; j < i; j++)
                    s = s * 31 + (i ^ j) % $i; return s; }"
        done > program.c
        echo 'int main(void) { return f1(3) + f80(7) & 0; }' >> program.c
        echo compiling; cc -O2 -w program.c -o program && ./program && echo ran"#;
    let gcc = Workload::new("gcc");
    gcc.starts(&["--entrypoint", ""], &["sh", "-c", SCRIPT]);
    let is_there = |text: &str| !text.is_empty();
    gcc.until(
        "it",
        &["sh", "-c", "cat /proc/[0-9]*/comm | grep cc1 || true"],
        is_there,
    );
    gcc.forks();
    let said = gcc.all_end("0\n");
    assert_eq!(said, ["compiling\nran\n", "ran\n", "ran\n"]);
    gcc.ends_forks();
}

#[test]
fn fio_in_the_middle_of_what_it_verifies() {
    // Past the guest's page cache, on the container's disk; one that finds another block
    // than it has written ends at once, with an error.
    let job = [
        "fio",
        "--name=it",
        "--filename=/file",
        "--size=8m",
        "--bs=4k",
        "--rw=randwrite",
        "--loops=3",
        "--direct=1",
        "--fsync=64",
        "--ioengine=psync",
        "--thread",
        "--verify=crc32c",
        "--verify_backlog=256",
        "--verify_fatal=1",
    ];
    let fio = Workload::new("fio");
    fio.starts(&[], &job);
    let blocks = |text: &str| text.trim().parse::<u64>().is_ok_and(|blocks| blocks > 4000);
    fio.until("it", &["stat", "-c", "%b", "/file"], blocks);
    fio.forks();
    for said in fio.all_end("0\n") {
        assert!(said.contains("err= 0"), "{said}");
    }
    fio.ends_forks();
}

#[test]
fn python_in_a_loop() {
    const SCRIPT: &str = r#"
import hashlib, threading, time
def sleeps(naps):
    for i in range(100):
        time.sleep(0.1)
        naps.append(i)
naps = [[] for _ in range(3)]
threads = [threading.Thread(target=sleeps, args=(one,)) for one in naps]
[thread.start() for thread in threads]
digest, rounds = b"", 0
while any(thread.is_alive() for thread in threads) or rounds < 3000:
    digest, rounds = hashlib.sha256(digest).digest(), rounds + 1
print(all(one == list(range(100)) for one in naps), flush=True)
again = b""
for _ in range(rounds):
    again = hashlib.sha256(again).digest()
print(again == digest)
"#;
    let python = Workload::new("python3");
    python.starts(&[], &["python3", "-c", SCRIPT]);
    python.until(
        "it",
        &["grep", "-c", "Threads:\t4", "/proc/1/status"],
        |n| n == "1\n",
    );
    python.forks();
    let said = python.all_end("0\n");
    assert_eq!(said, ["True\nTrue\n"; 3]);
    python.ends_forks();
}

/// A client counts, and notes what it was told, for as long as it runs.
#[test]
fn redis_under_load() {
    const COUNT: &str = "while n=$(redis-cli incr n); do case $n in *[!0-9]*) ;; *) echo $n > /tmp/told ;; esac; done";
    let redis = Workload::new("redis");
    // Its image's volume is covered, and its files are on the container's disk.
    let options = [
        "--appendonly",
        "yes",
        "--appendfsync",
        "always",
        "--dir",
        "/tmp",
    ];
    redis.starts(&["--tmpfs", "/data"], &options);
    redis.answers(&["redis-cli", "ping"], "PONG\n");
    redis.does(&["exec", "-d", "it", "sh", "-c", COUNT]);
    redis.does(&[
        "exec",
        "-d",
        "it",
        "redis-benchmark",
        "-q",
        "-l",
        "-c",
        "4",
        "-t",
        "set,lpush",
    ]);
    let number = |text: &str| text.trim().parse::<u64>().ok();
    redis.until("it", &["cat", "/tmp/told"], |text| number(text) > Some(20));
    redis.forks();
    for name in FAMILY {
        let told = redis.in_one(name, &["cat", "/tmp/told"]);
        let now = redis.until(name, &["redis-cli", "get", "n"], |text| {
            number(text).is_some()
        });
        assert!(number(&now) >= number(&told), "{name}: {now} after {told}");
        // What is in its file is what it has.
        redis.does(&["stop", "-t", "120", name]);
        redis.does(&["start", name]);
        let after = redis.until(name, &["redis-cli", "get", "n"], |text| {
            number(text).is_some()
        });
        assert!(
            number(&after) >= number(&now),
            "{name}: {after} after {now}"
        );
    }
    redis.ends_forks();
}

#[test]
fn postgres_in_a_transaction() {
    let sql = |text| ["psql", "-U", "postgres", "-qtA", "-c", text];
    let postgres = Workload::new("postgres");
    // As above.
    let volume = "/var/lib/postgresql/data";
    let options = [
        "--tmpfs",
        volume,
        "-e",
        "PGDATA=/pgdata",
        "--entrypoint",
        "sh",
    ];
    let begin = "mkdir /pgdata; exec docker-entrypoint.sh postgres";
    postgres.starts(&options, &["-c", begin]);
    postgres.answers(&sql("select 1"), "1\n");
    postgres.execs(&sql(
        "create table t as select n from generate_series(1, 10000) n",
    ));
    postgres.execs(&sql("create index on t (n)"));
    postgres.execs(&sql("create table log (n int)"));
    // One commits again and again, one is in the middle of a long one.
    let commits = "i=0; while i=$((i + 1)); do
        psql -U postgres -qc \"insert into log values ($i)\" && echo $i > /tmp/told; done";
    postgres.does(&["exec", "-d", "it", "sh", "-c", commits]);
    let long = "begin; update t set n = n + 10000; select pg_sleep(100000); commit";
    postgres.does(&["exec", "-d", "it", "psql", "-U", "postgres", "-qc", long]);
    let sleeping = "select count(*) from pg_stat_activity where query like 'begin%' \
        and wait_event = 'PgSleep'";
    postgres.answers(&sql(sleeping), "1\n");
    let number = |text: &str| text.trim().parse::<u64>().ok();
    postgres.until("it", &["cat", "/tmp/told"], |text| number(text) > Some(2));
    postgres.forks();
    for name in FAMILY {
        let told = postgres.in_one(name, &["cat", "/tmp/told"]);
        // Nobody sees what has not been committed.
        let count = postgres.until(name, &sql("select count(*), sum(n) from t"), |_| true);
        assert_eq!(count, "10000|50005000\n", "{name}");
        let kept = postgres.in_one(name, &sql("select count(*) from log"));
        assert!(number(&kept) >= number(&told), "{name}: {kept} of {told}");
        let lines = "select count(*) = max(n) and count(*) = count(distinct n) from log";
        assert_eq!(postgres.in_one(name, &sql(lines)), "t\n", "{name}");
    }
    for name in FAMILY {
        // It ends in order, and begins again with all that it had.
        postgres.does(&["stop", "-t", "120", name]);
        postgres.does(&["start", name]);
        let check = "create extension if not exists amcheck;
            select count(*), sum(n) from t;
            select bt_index_check('t_n_idx', true);
            select count(*) from verify_heapam('t');";
        let all = postgres.until(name, &sql(check), |_| true);
        assert_eq!(all, "10000|50005000\n\n0\n", "{name}");
    }
    postgres.ends_forks();
}
