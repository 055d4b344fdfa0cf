//! A tree of forks, against a model of it: whatever is forked, written, frozen, brought back
//! or killed, each container's memory, disk and identity are what its history says.

use crate::networks::{does, inspect, starts, until};
use crate::support::own_root;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// How many steps, unless `VM_RUN_TEST_FORKS` says otherwise.
const STEPS: u64 = 8;
/// How many containers live at the same time.
const ALIVE_MAX: usize = 8;
/// How deep the tree is to be, in forks from the first.
const DEPTH: u32 = 10;

/// What a container has in its memory and on its disk, and how deep it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    memory: u64,
    disk: u64,
    depth: u32,
}

struct World<'a> {
    root: &'a Path,
    dice: u64,
    alive: BTreeMap<String, Node>,
    templates: BTreeMap<String, Node>,
    made: u32,
    deepest: u32,
    generations: BTreeSet<String>,
}

impl World<'_> {
    /// xorshift64.
    fn roll(&mut self, sides: usize) -> usize {
        self.dice ^= self.dice << 13;
        self.dice ^= self.dice >> 7;
        self.dice ^= self.dice << 17;
        (self.dice % sides as u64) as usize
    }

    fn any<'k>(&mut self, from: &'k BTreeMap<String, Node>) -> (&'k String, Node) {
        let at = self.roll(from.len());
        let (name, node) = from.iter().nth(at).expect("there is one");
        (name, *node)
    }

    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}-{}", self.made)
    }

    /// A new container has a generation that none had before.
    fn is_new(&mut self, name: &str) {
        let found = inspect(self.root, &["inspect", name]);
        let generation = found["VmRun"]["Identity"]["Generation"].to_string();
        assert!(self.generations.insert(generation), "{name}: {found}");
    }

    fn check(&self, name: &str, node: Node) {
        let script = "cat /dev/shm/m /d; hostname; cat /etc/hostname";
        let said = does(self.root, &["exec", name, "sh", "-c", script]);
        let found = inspect(self.root, &["inspect", name]);
        let hostname = found["Config"]["Hostname"].as_str().expect("a name");
        let Node { memory, disk, .. } = node;
        let wanted = format!("{memory}\n{disk}\n{hostname}\n{hostname}");
        assert_eq!(said, wanted, "{name}: {node:?}");
    }

    fn step(&mut self) {
        let alive = self.alive.clone();
        let (name, node) = self.any(&alive);
        match self.roll(8) {
            0..3 if alive.len() < ALIVE_MAX => {
                // The deepest more often than others.
                let deepest = alive.iter().max_by_key(|(_, node)| node.depth);
                let (from, node) = match self.roll(3) {
                    0 => (name, node),
                    _ => deepest.map(|(name, node)| (name, *node)).expect("one"),
                };
                let new = self.name("node");
                does(self.root, &["fork", "--rm", "--name", &new, from]);
                let depth = node.depth + 1;
                self.deepest = self.deepest.max(depth);
                self.alive.insert(new.clone(), Node { depth, ..node });
                self.is_new(&new);
                self.check(&new, node);
            }
            3..5 => {
                let (memory, disk) = (self.roll(1 << 30) as u64, self.roll(1 << 30) as u64);
                let script = format!("echo {memory} > /dev/shm/m; echo {disk} > /d; sync");
                does(self.root, &["exec", name, "sh", "-c", &script]);
                self.alive.insert(
                    name.clone(),
                    Node {
                        memory,
                        disk,
                        ..node
                    },
                );
            }
            5 if self.templates.len() < 4 => {
                let template = self.name("then");
                does(self.root, &["freeze", name, "--as", &template]);
                self.templates.insert(template, node);
            }
            6 if !self.templates.is_empty() => {
                let templates = self.templates.clone();
                let (template, then) = self.any(&templates);
                does(self.root, &["rewind", name, template]);
                let Node { memory, disk, .. } = then;
                self.alive.insert(
                    name.clone(),
                    Node {
                        memory,
                        disk,
                        ..node
                    },
                );
                self.is_new(name);
            }
            _ if alive.len() > 2 => {
                does(self.root, &["rm", "-f", name]);
                self.alive.remove(name);
            }
            _ => {}
        }
        // It, or what has nothing to do with it.
        let alive = self.alive.clone();
        let (name, node) = self.any(&alive);
        self.check(name, node);
    }
}

/// What is in memory and in no file, in KiB (proc_meminfo(5)).
fn shared_memory() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("reads");
    let line = text.lines().find_map(|line| line.strip_prefix("Shmem:"));
    let line = line.expect("is told").trim_end_matches("kB");
    line.trim().parse().expect("a number")
}

fn workers() -> usize {
    let all = fs::read_dir("/proc").expect("lists").flatten();
    let is_worker = |comm: String| comm.starts_with("vm-run-worker");
    all.filter(|one| fs::read_to_string(one.path().join("comm")).is_ok_and(is_worker))
        .count()
}

#[test]
fn a_tree_is_what_its_history_says() {
    let steps = std::env::var("VM_RUN_TEST_FORKS").ok();
    let steps = steps.and_then(|n| n.parse().ok()).unwrap_or(STEPS);
    let own = own_root();
    let root = own.path();
    let begun = (shared_memory(), workers());
    let script = "echo 0 > /dev/shm/m; echo 0 > /d; exec sleep 1000000";
    starts(
        root,
        &["--rm", "--name", "first", "busybox", "sh", "-c", script],
    );
    let first = Node {
        memory: 0,
        disk: 0,
        depth: 0,
    };
    let mut world = World {
        root,
        // There is one of each kind among the first few steps.
        dice: 0x60af_40ca_8f4c_0aa8,
        alive: BTreeMap::from([("first".to_owned(), first)]),
        templates: BTreeMap::new(),
        made: 0,
        deepest: 0,
        generations: BTreeSet::new(),
    };
    until("it has not begun", || {
        does(root, &["exec", "first", "cat", "/d"]) == "0"
    });
    for _ in 0..steps {
        world.step();
    }
    for (name, node) in &world.alive {
        world.check(name, *node);
    }
    println!("{} made, {} deep", world.made, world.deepest);
    assert!(world.deepest >= 2, "{} deep", world.deepest);
    assert!(
        steps < 200 || world.deepest >= DEPTH,
        "{} deep",
        world.deepest
    );
    for name in world.alive.keys() {
        does(root, &["rm", "-f", name]);
    }
    for name in world.templates.keys() {
        does(root, &["template", "rm", name]);
    }
    // With the last of them all is given back.
    until("something is left", || {
        workers() == begun.1 && shared_memory() <= begun.0 + 1024
    });
    assert_eq!(does(root, &["ps", "-aq"]), "");
}
