use super::*;
use crate::testing::{self, Buffer, FakeGuest, flag};
use crate::virtio::{Rng, Vsock, VsockState};

fn rng() -> FakeGuest<Rng> {
    FakeGuest::boot(Rng::default())
}

fn restore(state: &TransportState) -> Result<MmioTransport<Rng>, RestoreError> {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    MmioTransport::restore(Rng::default(), testing::memory(), Arc::new(irq), state)
}

#[test]
fn identifies_itself() {
    let guest = FakeGuest::power_on(
        Rng::default(),
        testing::memory(),
        &TransportState::default(),
    );
    assert_eq!(guest.read(register::MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(guest.read(register::VERSION), 2);
    assert_eq!(guest.read(register::DEVICE_ID), 4);
    // A shared memory region of length -1 is none.
    assert_eq!(guest.read(register::SHM_LEN_LOW), u32::MAX);
    guest.write(register::QUEUE_SEL, 7);
    assert_eq!(guest.read(register::QUEUE_NUM_MAX), 0);
}

#[test]
fn only_whole_aligned_registers_are_read_and_written() {
    let guest = rng();
    for (offset, len) in [(0u64, 1usize), (0, 2), (0, 8), (2, 4), (0xff_fffc, 4)] {
        let mut data = vec![0; len];
        guest.device().read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} {len}");
    }
    guest.device().write(register::STATUS, &[0]);
    guest.device().write(register::STATUS, &[0; 8]);
    assert_ne!(guest.read(register::STATUS), 0);
}

#[test]
fn features_the_device_lacks_are_refused() {
    let mut guest = FakeGuest::power_on(
        Rng::default(),
        testing::memory(),
        &TransportState::default(),
    );
    assert_eq!(
        guest.offered(),
        feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC
    );
    // No VERSION_1: a legacy driver.
    assert!(!guest.set_up(feature::EVENT_IDX));
    guest.write(register::STATUS, 0);
    guest.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    guest.write(register::DRIVER_FEATURES_SEL, 1);
    guest.write(register::DRIVER_FEATURES, 0b11);
    guest.write(register::STATUS, 0xf);
    assert_eq!(guest.read(register::STATUS), 0b11);
}

#[test]
fn status_follows_the_order_of_initialisation() {
    let guest = FakeGuest::power_on(
        Rng::default(),
        testing::memory(),
        &TransportState::default(),
    );
    guest.write(register::STATUS, status::DRIVER_OK);
    assert_eq!(guest.read(register::STATUS), 0);
    guest.write(register::STATUS, status::NEEDS_RESET | 0xffff_ff00);
    assert_eq!(guest.read(register::STATUS), 0);
    guest.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    // Nothing but a reset clears a bit.
    guest.write(register::STATUS, status::FAILED);
    assert_eq!(guest.read(register::STATUS), 0x83);
    guest.write(register::STATUS, 0);
    assert_eq!(guest.read(register::STATUS), 0);
}

#[test]
fn features_are_settled_once() {
    let guest = rng();
    guest.write(register::DRIVER_FEATURES_SEL, 0);
    guest.write(register::DRIVER_FEATURES, 0);
    assert_ne!(
        guest.device().save().driver_features & feature::EVENT_IDX,
        0
    );
}

#[test]
fn a_working_queue_cannot_be_moved() {
    let guest = rng();
    let before = guest.device().save();
    guest.write(register::QUEUE_SEL, 0);
    for offset in (register::QUEUE_DESC_LOW..=register::QUEUE_DEVICE_HIGH).step_by(4) {
        guest.write(offset, 0xdead_0000);
    }
    guest.write(register::QUEUE_NUM, 2);
    assert_eq!(guest.device().save().queues, before.queues);
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let mut guest = rng();
    guest.request(0, &[Buffer::In(8)]);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 1);
    guest.write(register::INTERRUPT_ACK, 1);
    assert_eq!(guest.read(register::INTERRUPT_STATUS), 0);
}

#[test]
fn event_idx_saves_interrupts() {
    let mut guest = rng();
    for _ in 0..5 {
        guest.submit(0, &[Buffer::In(8)]);
    }
    guest.run();
    assert_eq!(guest.interrupts(), 1);
    // The driver has not looked at the used ring: it wants no more of them.
    guest.submit(0, &[Buffer::In(8)]);
    guest.run();
    assert_eq!(guest.interrupts(), 0);
    assert_eq!(std::iter::from_fn(|| guest.used(0)).count(), 6);
}

#[test]
fn works_without_event_idx() {
    let mut guest = FakeGuest::boot_with(Rng::default(), !feature::EVENT_IDX);
    for _ in 0..3 {
        assert_eq!(guest.request(0, &[Buffer::In(8)]).len, 8);
        assert_eq!(guest.interrupts(), 1);
    }
}

#[test]
fn a_chain_that_nobody_notifies_of_after_the_fork_is_found_by_the_kick() {
    let mut guest = rng();
    guest.request(0, &[Buffer::In(8)]);
    // Available and notified, and frozen before the loop came to it; then the
    // driver believes that the device knows.
    guest.submit(0, &[Buffer::In(8)]);
    let mut frozen = guest.freeze();
    frozen.transport.pending_queues = 0;
    let mut guest = FakeGuest::thaw(Rng::default(), &frozen);
    guest.run();
    assert_eq!(guest.used(0).map(|used| used.len), Some(8));
}

#[test]
fn an_interrupt_not_acknowledged_is_repeated_by_the_kick() {
    let mut guest = rng();
    guest.request(0, &[Buffer::In(8)]);
    let guest = FakeGuest::thaw(Rng::default(), &guest.freeze());
    assert_eq!(guest.interrupts(), 1);
    guest.write(register::INTERRUPT_ACK, 3);
    let guest = FakeGuest::thaw(Rng::default(), &guest.freeze());
    assert_eq!(guest.interrupts(), 0);
}

#[test]
fn a_restored_queue_at_rest_writes_nothing_to_memory() {
    use vm_memory::Bytes;
    let mut guest = rng();
    guest.request(0, &[Buffer::In(8)]);
    let rings = |guest: &FakeGuest<Rng>| {
        let mut bytes = vec![0; 0x1_0000];
        guest
            .memory()
            .read_slice(&mut bytes, vm_memory::GuestAddress(0x1_0000))
            .unwrap();
        bytes
    };
    let before = rings(&guest);
    let mut guest = FakeGuest::thaw(Rng::default(), &guest.freeze());
    guest.run();
    assert_eq!(rings(&guest), before);
}

#[test]
fn notifications_before_driver_ok_wait_for_it() {
    // A driver that fills its queue before DRIVER_OK.
    let mut frozen = rng().freeze();
    frozen.transport.status &= !status::DRIVER_OK;
    let mut guest = FakeGuest::thaw(Rng::default(), &frozen);
    guest.submit(0, &[Buffer::In(8)]);
    guest.run();
    assert!(guest.used(0).is_none());
    guest.write(register::STATUS, 0xf);
    guest.run();
    assert!(guest.used(0).is_some());
}

#[test]
fn a_broken_ring_stops_the_device_until_its_reset() {
    let mut guest = rng();
    guest.write_descriptor(0, 0, (u64::MAX - 4, 64), flag::WRITE, 0);
    guest.make_available(0, 0);
    guest.notify(0);
    guest.run();
    assert!(guest.needs_reset());
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(
        guest.read(register::INTERRUPT_STATUS),
        interrupt::CONFIG_CHANGE
    );
    // Dead: nothing is processed, no queue comes back without a reset.
    guest.write(register::QUEUE_READY, 1);
    guest.write(register::QUEUE_NOTIFY, 0);
    guest.run();
    assert_eq!(guest.interrupts(), 0);
    // The state of a dead device is restored as well.
    let mut guest = FakeGuest::thaw(Rng::default(), &guest.freeze());
    guest.run();
    assert!(guest.needs_reset());
    assert!(guest.set_up(u64::MAX));
    assert_eq!(guest.request(0, &[Buffer::In(8)]).len, 8);
}

#[test]
fn an_available_index_too_far_ahead_stops_the_device() {
    use vm_memory::{Bytes, GuestAddress};
    let mut guest = rng();
    guest
        .memory()
        .write_obj(65u16, GuestAddress(0x1_4002))
        .unwrap();
    guest.write(register::QUEUE_NOTIFY, 0);
    guest.run();
    assert!(guest.needs_reset());
}

#[test]
fn queues_that_cannot_be_are_refused() {
    // (QUEUE_NUM, descriptor table, driver ring, device ring)
    let cases: [(u32, u64, u64, u64); 9] = [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (128, 0x1000, 0x2000, 0x3000),
        (0x1_0040, 0x1000, 0x2000, 0x3000),
        (64, 0x1008, 0x2000, 0x3000),
        (64, 0x1000, 0x2001, 0x3000),
        (64, 0x1000, 0x2000, 0x3002),
        (64, !0xf, 0x2000, 0x3000),
        (64, 0x1000, 0x2000, testing::MEMORY_SIZE as u64 - 8),
    ];
    for (size, desc, driver, device) in cases {
        let guest = FakeGuest::power_on(
            Rng::default(),
            testing::memory(),
            &TransportState {
                status: 0b1011,
                driver_features: feature::VERSION_1,
                ..TransportState::default()
            },
        );
        guest.write(register::QUEUE_NUM, size);
        for (low, address) in [
            (register::QUEUE_DESC_LOW, desc),
            (register::QUEUE_DRIVER_LOW, driver),
            (register::QUEUE_DEVICE_LOW, device),
        ] {
            guest.write(low, address as u32);
            guest.write(low + 4, (address >> 32) as u32);
        }
        guest.write(register::QUEUE_READY, 1);
        assert_eq!(guest.read(register::QUEUE_READY), 0, "{size} {desc:#x}");
        assert!(guest.needs_reset());
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let good = rng().freeze().transport;
    assert!(restore(&good).is_ok());
    let with = |change: fn(&mut TransportState)| {
        let mut state = good.clone();
        change(&mut state);
        restore(&state).err()
    };
    assert!(matches!(
        with(|s| s.queues.push(s.queues[0].clone())),
        Some(RestoreError::QueueCount {
            expected: 1,
            found: 2
        })
    ));
    assert!(matches!(
        with(|s| s.queues[0].size = 48),
        Some(RestoreError::Queue(QueueError::Setup(0)))
    ));
    assert!(matches!(
        with(|s| s.queues[0].size = 128),
        Some(RestoreError::Queue(QueueError::Setup(0)))
    ));
    assert!(matches!(
        with(|s| s.queues[0].used_ring = 1 << 40),
        Some(RestoreError::Queue(QueueError::Setup(0)))
    ));
    assert!(matches!(
        with(|s| s.queues[0].next_avail = 65),
        Some(RestoreError::QueueIndices(0))
    ));
    assert!(matches!(
        with(|s| s.status = 0b0011),
        Some(RestoreError::QueueTooEarly(0))
    ));
    assert!(matches!(
        with(|s| s.driver_features |= 1 << 40),
        Some(RestoreError::Features { .. })
    ));
    assert!(matches!(
        with(|s| s.driver_features = 0),
        Some(RestoreError::Features { .. })
    ));
    assert!(matches!(
        with(|s| s.status = 0b1100),
        Some(RestoreError::Status(0b1100))
    ));
    assert!(matches!(
        with(|s| s.status |= 16),
        Some(RestoreError::Status(_))
    ));
    assert!(matches!(
        with(|s| s.interrupt_status = 4),
        Some(RestoreError::InterruptStatus(4))
    ));
}

#[test]
fn notifications_of_queues_that_are_not_there_are_ignored() {
    let mut guest = rng();
    for queue in [1, 31, 32, u32::MAX] {
        guest.write(register::QUEUE_NOTIFY, queue);
    }
    guest.run();
    assert!(!guest.needs_reset());
    assert_eq!(guest.device().save().pending_queues, 0);
}

#[test]
fn making_a_device_is_cheap() {
    // Five devices to a fork: the budget is 30 µs each on a quiet machine. The
    // best of many, so that a busy one does not fail this.
    let memory = testing::memory();
    let state = FakeGuest::boot(Vsock::restore(&VsockState::default()).unwrap())
        .freeze()
        .transport;
    let best = (0..200)
        .map(|_| {
            let irq = EventFd::new(EFD_NONBLOCK).unwrap();
            let start = std::time::Instant::now();
            let device = Vsock::restore(&VsockState::default()).unwrap();
            let transport =
                MmioTransport::restore(device, memory.clone(), Arc::new(irq), &state).unwrap();
            let took = start.elapsed();
            drop(transport);
            took
        })
        .min()
        .unwrap();
    println!("vsock with its transport: {best:?}");
    assert!(best < std::time::Duration::from_micros(200), "{best:?}");
}
