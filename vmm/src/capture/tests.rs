use super::*;
use crate::machine::{Disks, Event, EventSink};
use crate::memory::add_all;
use crate::payload::Payload;
use crate::payload::micro::Program;
use crate::prepared::{Birth, Shell};
use crate::vm::VmConfig;
use crate::{Console, Host};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use vm_memory::GuestAddress;
use vm_run_abi::{PAGE_SIZE, VERSION, doorbell, identity};

/// All vCPUs at once, in a child: write to random places of a mebibyte, keep their last
/// number in XMM3 and their count at [`COUNTS`], and at each 64th write read a device's
/// register (which must be right), say a byte, and send an interrupt to all others, who
/// keep it pending.
#[rustfmt::skip]
const STRESS: Program = Program {
    msrs: &[],
    everywhere: true,
    data: Vec::new(),
    code: &[
        0x49, 0x89, 0xff,                               // mov r15, rdi
        0xb9, 0xf0, 0x00, 0xe0, 0xfe,                   // mov ecx, 0xfee000f0
        0xc7, 0x01, 0xff, 0x01, 0x00, 0x00,             // mov dword [rcx], 0x1ff
        0xbf, 0x00, 0x00, 0x00, 0xd0,                   // mov edi, 0xd0000000
        0xbe, 0x08, 0xe0, 0x09, 0x00,                   // mov esi, 0x9e008
        0x4d, 0x85, 0xff,                               // test r15, r15
        0x75, 0x10,                                     // jne wait
        0xb8, VERSION as u8, 0x00, 0x00, 0x00,          // parent: mov eax, VERSION
        0x48, 0x89, 0x07,                               // mov [rdi], rax
        0x48, 0x83, 0x3e, 0x00,                         // cmp [rsi], 0x0
        0x74, 0xf2,                                     // je parent
        0xeb, 0x08,                                     // jmp child
        0xf3, 0x90,                                     // wait: pause
        0x48, 0x83, 0x3e, 0x00,                         // cmp [rsi], 0x0
        0x74, 0xf8,                                     // je wait
        0x4d, 0x8d, 0x87, 0xed, 0x5e, 0x00, 0x00,       // child: lea r8, [r15+0x5eed]
        0xbb, 0x00, 0x00, 0x00, 0x01,                   // mov ebx, 0x1000000
        0x4c, 0x89, 0xc0,                               // again: mov rax, r8
        0x48, 0xc1, 0xe0, 0x0d,                         // shl rax, 0xd
        0x49, 0x31, 0xc0,                               // xor r8, rax
        0x4c, 0x89, 0xc0,                               // mov rax, r8
        0x48, 0xc1, 0xe8, 0x07,                         // shr rax, 0x7
        0x49, 0x31, 0xc0,                               // xor r8, rax
        0x4c, 0x89, 0xc0,                               // mov rax, r8
        0x48, 0xc1, 0xe0, 0x11,                         // shl rax, 0x11
        0x49, 0x31, 0xc0,                               // xor r8, rax
        0x44, 0x89, 0xc0,                               // mov eax, r8d
        0x25, 0xf8, 0xff, 0x0f, 0x00,                   // and eax, 0xffff8
        0x4c, 0x89, 0x04, 0x03,                         // mov [rbx+rax*1], r8
        0x49, 0xff, 0xc1,                               // inc r9
        0x4e, 0x89, 0x0c, 0xfd, 0x00, 0x10, 0x01, 0x00, // mov [r15*8+0x11000], r9
        0x66, 0x49, 0x0f, 0x6e, 0xd8,                   // movq xmm3, r8
        0x41, 0xf6, 0xc1, 0x3f,                         // test r9b, 0x3f
        0x75, 0xc0,                                     // jne again
        0xb9, 0x00, 0x10, 0x00, 0xd0,                   // mov ecx, 0xd0001000
        0x8b, 0x01,                                     // mov eax, dword [rcx]
        0x3d, 0x76, 0x69, 0x72, 0x74,                   // cmp eax, 0x74726976
        0x75, 0x1e,                                     // jne wrong
        0x44, 0x89, 0xc0,                               // mov eax, r8d
        0x48, 0x89, 0x47, 0x18,                         // mov [rdi+0x18], rax
        0xb9, 0x00, 0x03, 0xe0, 0xfe,                   // mov ecx, 0xfee00300
        0x44, 0x89, 0xc8,                               // mov eax, r9d
        0xc1, 0xe8, 0x06,                               // shr eax, 0x6
        0x83, 0xe0, 0x7f,                               // and eax, 0x7f
        0x05, 0x40, 0x00, 0x0c, 0x00,                   // add eax, 0xc0040
        0x89, 0x01,                                     // mov dword [rcx], eax
        0xeb, 0x94,                                     // jmp again
        0x0f, 0x0b,                                     // wrong: ud2
    ],
};

const COUNTS: u64 = 0x1_1000;

// The code above holds these as numbers.
const _: () = assert!(
    doorbell::GPA == 0xd000_0000
        && crate::layout::VIRTIO_MMIO == 0xd000_1000
        && crate::layout::LAPIC == 0xfee0_0000
        && identity::GPA == 0x9_e000
        && VERSION < 256
        && doorbell::MESSAGE == 0x18
);

const MEMORY: u64 = 64 << 20;
const GENERATION: u64 = 77;

fn sink() -> (EventSink, mpsc::Receiver<Event>) {
    let (sender, events) = mpsc::channel();
    (Arc::new(move |event| drop(sender.send(event))), events)
}

fn parent(host: &Host, vcpus: u8) -> (Image, Arc<VmState>) {
    let (sink, events) = sink();
    let config = VmConfig {
        memory: MEMORY,
        vcpus,
        payload: Payload::Micro(STRESS),
    };
    let vm = Vm::boot(host, &config, Disks::default(), &sink).expect("boots");
    let event = events.recv_timeout(Duration::from_secs(60));
    assert!(matches!(event, Ok(Event::ForkPoint { .. })), "{event:?}");
    vm.pause().expect("stops");
    let (image, state) = vm.freeze().expect("freezes");
    (image, Arc::new(state))
}

fn birth(events: EventSink) -> Birth {
    Birth {
        disks: Disks::default(),
        volumes: None,
        tap: None,
        map_root: false,
        patches: vec![(identity::GPA + 8, GENERATION.to_le_bytes().to_vec())],
        events,
        hold: false,
    }
}

/// A child that runs, and what it says: nothing, if all is right.
fn child(host: &Arc<Host>, image: &Image, state: &Arc<VmState>) -> (Vm, mpsc::Receiver<Event>) {
    let (sink, events) = sink();
    let (console, now) = (Console::new(), Moment::now());
    let vm = crate::prepared::fork(host, image, state, console, now, birth(sink)).expect("forks");
    (vm, events)
}

fn count(ram: &Ram, vcpu: usize) -> u64 {
    let mut word = [0; 8];
    ram.read(COUNTS + vcpu as u64 * 8, &mut word).expect("RAM");
    u64::from_le_bytes(word)
}

/// All pages that a memory has of its own, copied, and all that were ever given back: what
/// it is, told by nobody's log.
fn copy_all(ram: &Ram, pagemap: &File) -> Vec<(u64, Vec<u8>)> {
    let mut own = ram.own_pages(pagemap).expect("the page map");
    add_all(&ram.blanks().lock(), &mut own);
    let read = |run: crate::Run| {
        let mut bytes = vec![0; (run.count * PAGE_SIZE) as usize];
        ram.read(run.bytes().start, &mut bytes).expect("RAM");
        (run.bytes().start, bytes)
    };
    own.runs().map(read).collect()
}

/// Waits until all vCPUs write.
fn await_writes(ram: &Ram, vcpus: u8) {
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let begun: Vec<u64> = (0..vcpus).map(|vcpu| count(ram, vcpu.into())).collect();
    while (0..vcpus).any(|vcpu| count(ram, vcpu.into()) == begun[usize::from(vcpu)]) {
        assert!(
            std::time::Instant::now() < deadline,
            "a vCPU does not write"
        );
        std::thread::yield_now();
    }
}

/// What a child would restore is what was saved.
fn assert_restored(shell: Shell, captured: &Captured, image: &Image) {
    let state = Arc::new(captured.state.clone());
    let prepared = shell.load(image, &state).expect("loaded");
    let (restored, saved) = (prepared.first_state(), &state.vcpus[0]);
    assert_eq!(restored.regs, saved.regs);
    assert_eq!(restored.sregs, saved.sregs);
    assert_eq!(restored.xcrs, saved.xcrs);
    assert_eq!(restored.lapic.regs, saved.lapic.regs);
    assert_eq!(restored.events, saved.events);
}

/// How many forks; `cargo xtask soak` asks for a hundred thousand.
fn forks() -> u32 {
    let asked = std::env::var("VM_RUN_TEST_CAPTURES").ok();
    asked.map_or(300, |n| {
        n.parse().expect("VM_RUN_TEST_CAPTURES is a number")
    })
}

/// Sets it when it is dropped.
struct AtTheEnd<'a>(&'a AtomicBool);

impl Drop for AtTheEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// As a balloon's driver does, which never looks whether the memory is free: the mebibyte
/// that is being written, and what is beside it.
fn give_back(source: &Vm, until: &AtomicBool) {
    let parts = source.parts().expect("it runs");
    let reclaimer = parts.kvm.ram.reclaimer();
    for turn in 0_u64.. {
        if until.load(Ordering::Relaxed) {
            return;
        }
        let at_work = lock(&parts.devices.balloon);
        reclaimer.reclaim(GuestAddress(16 << 20), 2 << 20);
        reclaimer.reclaim(GuestAddress((16 + turn % 16 * 2) << 20), 2 << 20);
        drop(at_work);
        std::thread::sleep(Duration::from_micros(turn * 97 % 1500));
    }
}

/// Of each instant, three pictures: by the logs; by a copy of everything that was written,
/// made while the source was stopped; and what a child maps.
fn is_its_source(vcpus: u8) {
    let host = Arc::new(Host::open().expect("KVM"));
    let (image, state) = parent(&host, vcpus);
    let (source, events) = child(&host, &image, &state);
    fork_again_and_again(&host, &source, vcpus, image);
    assert_eq!(events.try_recv().ok(), None, "the source goes on");
}

fn fork_again_and_again(host: &Arc<Host>, source: &Vm, vcpus: u8, mut image: Image) {
    let ram = &source.parts().expect("it runs").kvm.ram;
    let (mut rounds, mut stopped) = (0, 0);
    for fork in 0..forks() {
        await_writes(ram, vcpus);
        let mut oracle = Vec::new();
        let watch = |ram: &Ram| oracle = copy_all(ram, &host.pagemap);
        let capture = source.begin_capture().expect("begun");
        // A child maps what there is while the source still writes it.
        let so_far = capture.so_far(&image);
        let mut mapped = Ram::private(&so_far).expect("mapped");
        let shell = (fork % 32 == 0).then(|| {
            let mut shell = Shell::new(host, &so_far, vcpus).expect("made");
            shell.lay(&so_far).expect("mapped");
            shell
        });
        let captured = source
            .finish_watched(capture, CaptureSpec::default(), watch)
            .expect("captured");
        image = captured.image(&image).with_room().expect("merged");
        rounds += captured.cost.rounds;
        stopped += captured.cost.copied_stopped;
        mapped.lay_over(&image).expect("mapped");
        let mut seen = Vec::new();
        for (at, bytes) in &oracle {
            seen.resize(bytes.len(), 0);
            mapped.read(*at, &mut seen).expect("RAM");
            assert!(seen == *bytes, "fork {fork}: the pages from {at:#x} differ");
        }
        for (vcpu, state) in captured.state.vcpus.iter().enumerate() {
            // One store may be done whose count is not.
            let behind = state.regs.r9 - count(&mapped, vcpu);
            assert!(
                behind <= 1,
                "fork {fork}: vCPU {vcpu} is {behind} ahead of its memory"
            );
        }
        if let Some(shell) = shell {
            assert_restored(shell, &captured, &image);
        }
        if fork % 100 == 0 {
            let state = Arc::new(captured.state);
            let (grandchild, news) = child(host, &image, &state);
            await_writes(&grandchild.parts().expect("it runs").kvm.ram, vcpus);
            assert_eq!(news.try_recv().ok(), None);
        }
    }
    println!("{rounds} rounds, {stopped} pages copied while it was stopped");
}

#[test]
fn with_two_vcpus_a_picture_is_its_source_byte_by_byte() {
    is_its_source(2);
}

#[test]
fn with_four_vcpus_a_picture_is_its_source_byte_by_byte() {
    is_its_source(4);
}

#[test]
fn what_was_given_back_is_zeroes_in_a_picture_or_what_was_written_since() {
    const VCPUS: u8 = 2;
    let host = Arc::new(Host::open().expect("KVM"));
    let (image, state) = parent(&host, VCPUS);
    let (source, events) = child(&host, &image, &state);
    let until = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Also if this fails.
        let _at_the_end = AtTheEnd(&until);
        scope.spawn(|| give_back(&source, &until));
        fork_again_and_again(&host, &source, VCPUS, image);
    });
    assert_eq!(events.try_recv().ok(), None, "the source goes on");
}
