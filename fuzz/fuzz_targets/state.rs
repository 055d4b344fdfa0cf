//! States of a stranger: refused, or good enough for a hostile guest to go on
//! with.
#![no_main]

use arbitrary::Arbitrary;
use devices::MmioDevice;
use devices::testing;
use devices::virtio::mmio::{MmioTransport, register};
use devices::virtio::{QueueState, TransportState, Vsock, VsockState};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
struct Queue {
    order: u8,
    ready: bool,
    /// In units of 16 bytes, so that most are in memory.
    addresses: [u16; 3],
    /// Added to one of them, now and then.
    wild: Option<(u8, u64)>,
    next_avail: u16,
    in_flight: u16,
}

#[derive(Arbitrary, Debug)]
struct Input {
    selects: [u32; 3],
    features: u64,
    /// Index of a legal status, or one that need not be.
    status: Result<u8, u32>,
    interrupt_status: u8,
    generation: u32,
    pending: u32,
    queues: [Queue; 3],
    queue_count: u8,
    /// Instead of the defaults.
    vsock: Option<(u64, u32)>,
    lost_connections: bool,
    memory: Vec<u8>,
    writes: Vec<(u8, u32)>,
}

/// What a driver goes through, and a device that broke on it.
const STATUS: [u32; 6] = [0, 1, 3, 0b1011, 0b1111, 0b100_1111];
const VERSION_1: u64 = 1 << 32;

fn queue(queue: &Queue) -> QueueState {
    let mut addresses = queue.addresses.map(|address| 16 * u64::from(address));
    if let Some((which, offset)) = queue.wild {
        let address = &mut addresses[usize::from(which % 3)];
        *address = address.wrapping_add(offset);
    }
    let [desc_table, avail_ring, used_ring] = addresses;
    QueueState {
        size: 1u16.checked_shl((queue.order % 17).into()).unwrap_or(0),
        ready: queue.ready,
        desc_table,
        avail_ring,
        used_ring,
        next_avail: queue.next_avail,
        next_used: queue.next_avail.wrapping_sub(queue.in_flight),
    }
}

fuzz_target!(|input: Input| {
    let mut vsock = VsockState {
        lost_connections: input.lost_connections,
        ..VsockState::default()
    };
    if let Some((guest_cid, next_port)) = input.vsock {
        vsock.guest_cid = guest_cid;
        vsock.next_port = next_port;
    }
    let Ok(device) = Vsock::restore(&vsock) else {
        return;
    };
    let memory = testing::memory();
    memory
        .write_slice(&input.memory, GuestAddress(0))
        .expect("memory");
    let state = TransportState {
        device_features_sel: input.selects[0],
        driver_features_sel: input.selects[1],
        driver_features: input.features & (0b111 << 28 | 1) | VERSION_1,
        queue_sel: input.selects[2],
        status: match input.status {
            Ok(index) => STATUS[usize::from(index) % STATUS.len()],
            Err(any) => any,
        },
        interrupt_status: (input.interrupt_status % 8).into(),
        config_generation: input.generation,
        pending_queues: input.pending,
        queues: input.queues[..usize::from(input.queue_count % 4)]
            .iter()
            .map(queue)
            .collect(),
    };
    let irq = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    let Ok(transport) = MmioTransport::restore(device, memory.clone(), Arc::new(irq), &state)
    else {
        return;
    };
    let saved = transport.save();
    drop(transport);
    let device = Vsock::restore(&vsock).expect("it was good before");
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
