//! The root window, seen by a guest. It needs a KVM, of any sort.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vm_run_abi::{VERSION, doorbell, identity};
use vmm::payload::micro::Program;
use vmm::{
    Birth, Console, Disks, Event, EventSink, Host, Image, Moment, Payload, Vm, VmConfig, VmState,
};

/// Looks into the window before the fork point and behind it, stores to it, and
/// answers with what a child sees, plus what must be zero: what its parent saw, and
/// what the store has changed.
#[rustfmt::skip]
const LOOK: Program = Program {
    msrs: &[],
    everywhere: false,
    data: Vec::new(),
    code: &[
        // The fifth GiB's first 2 MiB, by the next entry of the monitor's own table
        // of directories and a directory in free memory.
        0x48, 0xb8, 0x07, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, // movabs rax, 0x30007
        0x48, 0x89, 0x04, 0x25, 0x20, 0xa0, 0x00, 0x00,             // mov [0xa020], rax
        0x48, 0xb8, 0x87, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, // movabs rax, 4 GiB | 0x87
        0x48, 0x89, 0x04, 0x25, 0x00, 0x00, 0x03, 0x00,             // mov [0x30000], rax
        0x48, 0xb9, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, // movabs rcx, 4 GiB
        0x4c, 0x8b, 0x09,                                           // mov r9, [rcx]
        0xbf, 0x00, 0x00, 0x00, 0xd0,                               // mov edi, doorbell::GPA
        0xbe, 0x08, 0xe0, 0x09, 0x00,                               // mov esi, identity::GPA + 8
                                                                    // parent:
        0xb8, VERSION as u8, 0x00, 0x00, 0x00,                      // mov eax, VERSION
        0x48, 0x89, 0x07,                                           // mov [rdi + FORK_POINT], rax
        0x48, 0x8b, 0x16,                                           // mov rdx, [rsi]
        0x48, 0x85, 0xd2,                                           // test rdx, rdx
        0x74, 0xf0,                                                 // jz parent
        0x4c, 0x8b, 0x11,                                           // mov r10, [rcx]
        0x48, 0x89, 0x11,                                           // mov [rcx], rdx
        0x4c, 0x8b, 0x19,                                           // mov r11, [rcx]
        0x4d, 0x31, 0xd3,                                           // xor r11, r10
        0x4d, 0x01, 0xca,                                           // add r10, r9
        0x4d, 0x01, 0xda,                                           // add r10, r11
        0x4c, 0x89, 0x57, 0x28,                                     // mov [rdi + ANSWER], r10
        0xf3, 0x90,                                                 // done: pause
        0xeb, 0xfc,                                                 // jmp done
    ],
};

// The code above holds these as numbers.
const _: () = assert!(
    doorbell::GPA == 0xd000_0000
        && identity::GPA == 0x9_e000
        && VERSION < 256
        && doorbell::FORK_POINT == 0
        && doorbell::ANSWER == 0x28
);

const GENERATION: u64 = 77;
const MEMORY: u64 = 64 << 20;
/// What such a guest's window holds (layout.rs, `root_window`).
const WINDOW: u64 = 128 << 20;

fn sink() -> (EventSink, mpsc::Receiver<Event>) {
    let (sender, events) = mpsc::channel();
    (Arc::new(move |event| drop(sender.send(event))), events)
}

fn next(events: &mpsc::Receiver<Event>) -> Event {
    let event = events.recv_timeout(Duration::from_secs(60));
    event.expect("the guest says something")
}

fn parent(host: &Host) -> (Image, Arc<VmState>) {
    let (sink, events) = sink();
    let config = VmConfig {
        memory: MEMORY,
        vcpus: 1,
        payload: Payload::Micro(LOOK),
    };
    let vm = Vm::boot(host, &config, Disks::default(), &sink).expect("boots");
    let event = next(&events);
    assert!(matches!(event, Event::ForkPoint { .. }), "{event:?}");
    vm.pause().expect("stops");
    let (image, state) = vm.freeze().expect("freezes");
    (image, Arc::new(state))
}

/// A file that begins with `first`.
fn file(first: u64, len: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(len).expect("sized");
    file.write_all_at(&first.to_le_bytes(), 0).expect("written");
    file
}

#[test]
fn a_child_finds_its_image_in_the_window_and_changes_nothing() {
    let host = Arc::new(Host::open().expect("these tests need /dev/kvm"));
    let (image, state) = parent(&host);
    let fork = |root: Option<&File>, map_root| {
        let (events, told) = sink();
        let birth = Birth {
            volumes: None,
            tap: None,
            disks: Disks {
                root: root.map(|file| file.try_clone().expect("a descriptor")),
                mounted: None,
                writable: None,
            },
            map_root,
            patches: vec![(identity::GPA + 8, GENERATION.to_le_bytes().to_vec())],
            events,
            hold: false,
        };
        let (console, asked) = (Console::new(), Moment::now());
        let vm = vmm::fork(&host, &image, &state, console, asked, birth).expect("forks");
        match next(&told) {
            Event::Answer { value, .. } => (value, vm.root_image().map(|(_, len)| len)),
            other => panic!("{other:?}"),
        }
    };
    let (one, other) = (file(0x1111, 8192), file(0x2222, WINDOW));
    assert_eq!(fork(Some(&one), true), (0x1111, Some(8192)));
    assert_eq!(fork(Some(&other), true), (0x2222, Some(WINDOW)));
    assert_eq!(fork(Some(&one), true), (0x1111, Some(8192)));
    // None, not asked for, longer than the window, and not of whole pages.
    assert_eq!(fork(None, true), (0, None));
    assert_eq!(fork(Some(&one), false), (0, None));
    assert_eq!(fork(Some(&file(0x3333, WINDOW + 4096)), true), (0, None));
    assert_eq!(fork(Some(&file(0x4444, 8191)), true), (0, None));
    let mut first = [0; 8];
    one.read_exact_at(&mut first, 0).expect("reads");
    assert_eq!(u64::from_le_bytes(first), 0x1111);
}
