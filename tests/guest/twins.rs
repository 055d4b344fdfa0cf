//! What a naive clone would give twice: the first random numbers of programs that were
//! drawing when their container was frozen, and the generation that others learn of.

use crate::support::{PATIENCE, boot, field, fork_with, programs_rootfs};
use fork::{ContainerSpec, Disks, ForkSpec, ProcessSpec, Stream, Template, Writable};
use std::collections::BTreeSet;
use std::io::Read;
use std::sync::OnceLock;

/// Of each template.
const CHILDREN: usize = 4;

/// With one vCPU or two; booted once.
fn bare(vcpus: u8) -> &'static Template {
    static ONE: OnceLock<Template> = OnceLock::new();
    static TWO: OnceLock<Template> = OnceLock::new();
    let cell = if vcpus == 1 { &ONE } else { &TWO };
    cell.get_or_init(|| boot(128, vcpus))
}

/// A warm template of these words in the image of programs, and what they have said.
fn template(vcpus: u8, words: &[&str]) -> (Template, String) {
    let disks = Disks {
        root: Some(programs_rootfs()),
        writable: None,
    };
    let mut parent = fork_with(bare(vcpus), "parent", disks);
    let container = ContainerSpec {
        writable: Writable::Memory { limit: 16 << 20 },
        warm: true,
        ..ContainerSpec::default()
    };
    let process = ProcessSpec {
        args: words.iter().map(|&word| word.into()).collect(),
        streams: vec![Stream::Stdout],
        ..ProcessSpec::default()
    };
    let process = parent.start(container, process).expect("starts");
    parent.await_warm(PATIENCE).expect("says that it is warm");
    let template = parent.freeze("programs").expect("freezes");
    let mut said = String::new();
    let mut stdout = process.stdout.expect("was asked for");
    stdout.read_to_string(&mut said).expect("reads");
    (template, said)
}

/// What the container says in a child.
fn child_says(template: &Template, number: usize) -> String {
    let spec = ForkSpec {
        hostname: format!("child-{number}"),
        ..ForkSpec::default()
    };
    let mut child = template.fork(spec).expect("forks");
    let attached = child.attach(&[Stream::Stdout]).expect("attaches");
    let mut stdout = attached.stdout.expect("was asked for");
    stdout.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut said = String::new();
    stdout.read_to_string(&mut said).expect("reads");
    assert_eq!(child.wait().expect("ends").code(), 0, "{said}");
    said
}

/// How many different values all threads of all children drew first, of how many; `None`
/// if the program cannot draw so here.
fn first_draws(how: &str, vcpus: u8) -> Option<(usize, usize)> {
    let threads = vcpus.to_string();
    let (template, said) = template(vcpus, &["/bin/drawing", how, &threads]);
    if said.contains("no vDSO") {
        return None;
    }
    let said: Vec<String> = (0..CHILDREN).map(|i| child_says(&template, i)).collect();
    let values: Vec<&str> = said.iter().flat_map(|said| said.lines()).collect();
    assert!(values.iter().all(|value| value.len() == 32), "{said:?}");
    assert_eq!(values.len(), CHILDREN * usize::from(vcpus), "{said:?}");
    let different: BTreeSet<&str> = values.iter().copied().collect();
    Some((different.len(), values.len()))
}

/// The first value that a system call returns after the fork is the child's own, even if
/// the call was on its way back at the freeze.
#[test]
fn a_call_that_was_frozen_returns_what_is_the_childs_own() {
    for vcpus in [1, 2] {
        // Once in some hundred times a thread is frozen after a call and before its look
        // at the generation: what it has then, it had before.
        let all_differ = |_| {
            let (different, all) = first_draws("call", vcpus).expect("a system call");
            println!("{vcpus} vCPUs: {different} of {all} differ");
            different == all
        };
        assert!((0..2).any(all_differ), "{vcpus} vCPUs");
    }
}

/// And so is the first that is asked for after the fork without a system call.
#[test]
fn the_vdsos_generator_begins_anew_in_a_child() {
    let (different, all) = first_draws("vdso", 2).expect("a vDSO with getrandom");
    assert_eq!(different, all);
}

#[test]
fn a_program_in_c_is_told_of_its_fork() {
    let script = "generation & sleep 2
        g=$(/run/vm-run/warm); sleep 2; echo told=$((0x$g)); kill $!
        echo machine=$(cat /etc/machine-id)";
    let script = format!("PATH=/bin; {script}");
    let (template, said) = template(1, &["/bin/sh", "-c", &script]);
    let parent: u64 = field(&said, "generation").parse().expect("a number");
    let mut all = BTreeSet::from([parent]);
    let mut machines = BTreeSet::new();
    for number in 0..2 {
        let said = child_says(&template, number);
        let generation: u64 = field(&said, "generation").parse().expect("a number");
        // The shell reckons with signs.
        let told: i64 = field(&said, "told").parse().expect("a number");
        assert_eq!(generation, told as u64, "{said}");
        all.insert(generation);
        machines.insert(field(&said, "machine").to_owned());
    }
    assert!(machines.len() == 2 && machines.iter().all(|id| id.len() == 32));
    assert!(all.len() == 3 && !all.contains(&0), "{all:?}");
}
