//! States of a stranger: refused, or good enough for a hostile guest to go on
//! with.
#![no_main]

use arbitrary::Arbitrary;
use devices::MmioDevice;
use devices::testing;
use devices::virtio::mmio::{MmioTransport, register};
use devices::virtio::{QueueState, TransportState, Vsock, VsockState};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
struct Queue {
    order: u8,
    ready: bool,
    addresses: [u32; 3],
    indices: [u16; 2],
}

#[derive(Arbitrary, Debug)]
struct Input {
    selects: [u32; 3],
    features: u64,
    status: u32,
    interrupt_status: u32,
    generation: u32,
    pending: u32,
    queues: Vec<Queue>,
    guest_cid: u64,
    next_port: u32,
    lost_connections: bool,
    memory: Vec<u8>,
    writes: Vec<(u8, u32)>,
}

fuzz_target!(|input: Input| {
    let Ok(device) = Vsock::restore(&VsockState {
        guest_cid: input.guest_cid % 8,
        next_port: input.next_port,
        lost_connections: input.lost_connections,
    }) else {
        return;
    };
    let memory = testing::memory();
    memory
        .write_slice(&input.memory, GuestAddress(0x1000))
        .expect("memory");
    let queues = input.queues.iter().map(|queue| QueueState {
        size: 1u16.checked_shl(queue.order.into()).unwrap_or(0),
        ready: queue.ready,
        desc_table: queue.addresses[0].into(),
        avail_ring: queue.addresses[1].into(),
        used_ring: queue.addresses[2].into(),
        next_avail: queue.indices[0],
        next_used: queue.indices[1],
    });
    let state = TransportState {
        device_features_sel: input.selects[0],
        driver_features_sel: input.selects[1],
        driver_features: input.features & (0b111 << 28 | 1 << 32 | 1),
        queue_sel: input.selects[2],
        status: input.status & 0xcf,
        interrupt_status: input.interrupt_status & 7,
        config_generation: input.generation,
        pending_queues: input.pending,
        queues: queues.collect(),
    };
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let Ok(transport) = MmioTransport::restore(device, memory.clone(), irq, &state) else {
        return;
    };
    let saved = transport.save();
    drop(transport);
    let device = Vsock::restore(&VsockState {
        lost_connections: input.lost_connections,
        ..VsockState::default()
    })
    .expect("a good state");
    let mut guest = testing::FakeGuest::power_on(device, memory, &saved);
    guest.device().kick();
    guest.run();
    for (offset, value) in input.writes {
        let offset = u64::from(offset) * 4;
        guest.device().write(offset, &value.to_le_bytes());
    }
    guest.write(register::QUEUE_NOTIFY, 0);
    guest.run();
});
