//! SIGKILL at random moments: what is on disk stays right, and nothing is left.

#[path = "../registry/server.rs"]
#[expect(dead_code, reason = "the tests of registries need more of it")]
mod server;

use crate::support::{Call, PATIENCE, own_root, variable};
use rustix::process::{Pid, Signal, kill_process};
use server::Server;
use std::path::Path;
use std::time::{Duration, Instant};

/// How many moments; `cargo xtask soak` asks for more.
fn moments() -> u32 {
    let asked = std::env::var("VM_RUN_TEST_KILLS").ok();
    asked.map_or(8, |n| n.parse().expect("VM_RUN_TEST_KILLS is a number"))
}

/// A small generator (xorshift64): a failure is told with its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

#[test]
fn nothing_is_lost_or_left_whoever_is_killed_whenever() {
    let seed = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(1, |since| since.as_nanos() as u64 | 1);
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let own = own_root();
    let root = own.path();
    let archive = variable("VM_RUN_TEST_BUSYBOX");
    let archive = archive.to_str().expect("text");
    let registry = Server::start();
    let remote = push_noise(root, &registry);
    let begun = Instant::now();
    let once = Call::run_in(root, &["busybox", "true"]).end();
    assert_eq!(once.status, 0, "{once}");
    // As long as the longest of them takes.
    let span = begun.elapsed().as_millis() as u64 + 100;
    for moment in 0..moments() {
        let script = "echo begun; echo > /x; sleep 2; echo ending";
        let call = match dice.roll(6) {
            0 => Call::run_in(root, &["busybox", "sh", "-c", script]),
            1 => Call::run_to_keep(root, &["-d", "busybox", "sh", "-c", script]),
            2 => Call::run_to_keep(root, &["-d", "--restart", "always", "busybox", "true"]),
            3 => Call::vm_run_in(root, &["image", "load", "-i", archive]),
            4 => {
                // Nothing of it is to be there. It may not have come last time.
                drop(Call::vm_run_in(root, &["image", "rm", &remote]).end());
                Call::vm_run_in(root, &["image", "pull", &remote])
            }
            _ => {
                let words = ["-d", "--name", "goes", "busybox", "sleep", "1000"];
                let begun = Call::run_to_keep(root, &words).end();
                assert_eq!(begun.status, 0, "moment {moment}: {begun}");
                Call::vm_run_in(root, &["rm", "-f", "goes"])
            }
        };
        let running = call.start();
        std::thread::sleep(Duration::from_millis(dice.roll(span)));
        match dice.roll(2) {
            0 => running.signal(Signal::KILL),
            _ => kill_one_of(root, &mut dice),
        }
        // By whatever is left of it.
        if dice.roll(2) == 0 {
            kill_one_of(root, &mut dice);
        }
        drop(running.end());
        for id in does(root, &["ps", "-aq"]).lines() {
            let removed = Call::vm_run_in(root, &["rm", "-f", id]).end();
            // One that was to be removed at its end may have gone by itself.
            let gone = removed.err().contains("no such container");
            assert!(removed.status == 0 || gone, "moment {moment}: {removed}");
        }
        assert_eq!(does(root, &["ps", "-aq"]), "", "moment {moment}");
        if moment % 4 == 0 {
            let ran = Call::run_in(root, &["busybox", "echo", "well"]).end();
            assert_eq!(
                (ran.status, ran.out()),
                (0, "well\n".into()),
                "{moment}: {ran}"
            );
        }
    }
    // A last command sweeps up what the killed have left.
    let ran = Call::run_in(root, &["busybox", "echo", "well"]).end();
    assert_eq!((ran.status, ran.out()), (0, "well\n".into()), "{ran}");
    does(root, &["image", "load", "-i", archive]);
    does(root, &["image", "pull", &remote]);
    let read = Call::run_in(root, &[&remote, "-"]).refused(127);
    assert!(read.contains('-'), "{read}");
    let deadline = Instant::now() + PATIENCE;
    while !processes(root).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(processes(root), []);
    let left = |dir: &str| std::fs::read_dir(root.join(dir)).map_or(0, Iterator::count);
    assert_eq!((left("containers"), left("images/tmp")), (0, 0));
}

/// Some megabytes that do not compress, in a registry and nowhere else.
fn push_noise(root: &Path, registry: &Server) -> String {
    let name = format!("{}/noise:1", registry.address);
    let script =
        "mkdir tree && head -c 8388608 /dev/urandom > tree/noise && tar -cf noise.tar -C tree .";
    let made = std::process::Command::new("sh")
        .args(["-c", script])
        .current_dir(root)
        .status();
    assert!(made.expect("sh").success());
    let tar = root.join("noise.tar");
    does(
        root,
        &["image", "import", tar.to_str().expect("text"), &name],
    );
    does(root, &["image", "push", &name]);
    does(root, &["image", "rm", &name]);
    name
}

fn does(root: &Path, words: &[&str]) -> String {
    let ran = Call::vm_run_in(root, words).end();
    assert_eq!(ran.status, 0, "{words:?}: {ran}");
    ran.out()
}

/// Kills a supervisor, a spawner or a worker.
fn kill_one_of(root: &Path, dice: &mut Dice) {
    let mut all = processes(root);
    all.extend(all.clone().into_iter().flat_map(children));
    if !all.is_empty() {
        let one = all[dice.roll(all.len() as u64) as usize];
        // It may have ended by itself.
        kill_process(one, Signal::KILL).ok();
    }
}

/// The processes that name this directory on their command line: vm-run and
/// supervisors.
fn processes(root: &Path) -> Vec<Pid> {
    let root = root.to_str().expect("text");
    pids()
        .into_iter()
        .filter(|pid| {
            let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
            let line = std::fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(root)
        })
        .collect()
}

/// Its children, and theirs: spawners and workers.
fn children(of: Pid) -> Vec<Pid> {
    let parent = |pid: &Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        let stat = stat.ok()?;
        let after = stat.rsplit_once(')')?.1;
        after.split_whitespace().nth(1)?.parse::<i32>().ok()
    };
    let direct: Vec<Pid> = pids()
        .into_iter()
        .filter(|pid| parent(pid) == Some(of.as_raw_nonzero().get()))
        .collect();
    let mut all = direct.clone();
    all.extend(direct.into_iter().flat_map(children));
    all
}

fn pids() -> Vec<Pid> {
    let all = std::fs::read_dir("/proc").expect("lists").flatten();
    all.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}
