use super::*;
use crate::GuestMemory;
use crate::testing::{self, flag};
use std::io::Read;
use std::os::fd::AsFd;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const SIZE: u16 = 8;

fn descriptor(memory: &GuestMemory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut raw = address.to_le_bytes().to_vec();
    raw.extend(len.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw.extend(next.to_le_bytes());
    memory.write_slice(&raw, GuestAddress(at)).unwrap();
}

/// Address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// Parses the chain whose first descriptors are those given, in order.
fn parse<'m>(memory: &'m DeviceMemory, descriptors: &[Raw]) -> Result<Chain<'m>, ChainError> {
    for (index, &(address, len, flags, next)) in descriptors.iter().enumerate() {
        let at = TABLE + 16 * index as u64;
        descriptor(&memory.ram, at, address, len, flags, next);
    }
    let ram = &memory.ram;
    ram.write_obj([0u16, 1, 0], GuestAddress(AVAIL)).unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_ready(true);
    let chain = queue.iter(ram).unwrap().next().unwrap();
    Chain::parse(memory, SIZE, chain, |_, _| {})
}

#[test]
fn a_chain_of_both_directions() {
    let memory = DeviceMemory::from(testing::memory());
    memory
        .ram
        .write_slice(b"hello", GuestAddress(0x8000))
        .unwrap();
    let mut chain = parse(
        &memory,
        &[
            (0x8000, 3, flag::NEXT, 1),
            (0x8003, 2, flag::NEXT, 2),
            (0x9000, 0, flag::NEXT | flag::WRITE, 3),
            (0x9000, 4, flag::WRITE, 0),
        ],
    )
    .unwrap();
    let mut text = [0; 5];
    chain.readable.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    assert_eq!(
        chain.readable.read_exact(&mut [0]),
        Err(ChainError::TooShort)
    );
    assert_eq!(chain.writable.len(), 4);
    assert_eq!(chain.writable.write_all(&[0; 5]), Err(ChainError::TooShort));
    chain.writable.write_all(&[1, 2, 3, 4]).unwrap();
    assert!(chain.writable.is_empty());
    let written: [u8; 4] = memory.ram.read_obj(GuestAddress(0x9000)).unwrap();
    assert_eq!(written, [1, 2, 3, 4]);
}

#[test]
fn broken_chains() {
    let memory = DeviceMemory::from(testing::memory());
    let end = testing::MEMORY_SIZE as u64;
    let cases: &[(&[Raw], ChainError)] = &[
        // A loop.
        (&[(0x8000, 1, flag::NEXT, 0)], ChainError::TooLong),
        // An index outside the table.
        (&[(0x8000, 1, flag::NEXT, SIZE)], ChainError::Endless),
        // Outside memory; across its end; around the end of the address space.
        (&[(end, 1, 0, 0)], ChainError::Address),
        (&[(end - 1, 2, 0, 0)], ChainError::Address),
        (&[(u64::MAX, 2, flag::WRITE, 0)], ChainError::Address),
        (&[(0x8000, u32::MAX, flag::WRITE, 0)], ChainError::Address),
        // Readable after writable.
        (
            &[(0x8000, 1, flag::NEXT | flag::WRITE, 1), (0x8000, 1, 0, 0)],
            ChainError::Order,
        ),
        // Indirect tables: outside memory, of no whole number of entries, empty.
        (&[(end, 16, flag::INDIRECT, 0)], ChainError::Endless),
        (&[(0x8000, 17, flag::INDIRECT, 0)], ChainError::Endless),
        (&[(0x8000, 0, flag::INDIRECT, 0)], ChainError::Endless),
    ];
    for (descriptors, expected) in cases {
        assert_eq!(
            parse(&memory, descriptors).err(),
            Some(*expected),
            "{descriptors:x?}"
        );
    }
}

#[test]
fn indirect_tables_are_no_longer_than_the_queue_and_not_nested() {
    let memory = DeviceMemory::from(testing::memory());
    let table = 0x1_0000;
    for entries in [SIZE, SIZE + 1] {
        for index in 0..entries {
            let last = index + 1 == entries;
            let flags = if last { 0 } else { flag::NEXT };
            let at = table + 16 * u64::from(index);
            descriptor(&memory.ram, at, 0x8000, 2, flags, index + 1);
        }
        let chain = parse(
            &memory,
            &[(table, 16 * u32::from(entries), flag::INDIRECT, 0)],
        );
        match entries {
            SIZE => assert_eq!(chain.unwrap().readable.len(), 16),
            _ => assert_eq!(chain.err(), Some(ChainError::TooLong)),
        }
    }
    descriptor(&memory.ram, table, table, 16, flag::INDIRECT, 0);
    let nested = parse(&memory, &[(table, 16, flag::INDIRECT, 0)]);
    assert_eq!(nested.err(), Some(ChainError::Endless));
}

#[test]
fn a_head_outside_the_table() {
    let memory = DeviceMemory::from(testing::memory());
    memory
        .ram
        .write_obj([0u16, 1, SIZE], GuestAddress(AVAIL))
        .unwrap();
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_desc_table_address(Some(TABLE as u32), Some(0));
    queue.set_avail_ring_address(Some(AVAIL as u32), Some(0));
    queue.set_ready(true);
    let chain = queue.iter(&memory.ram).unwrap().next().unwrap();
    assert_eq!(
        Chain::parse(&memory, SIZE, chain, |_, _| {}).err(),
        Some(ChainError::Endless)
    );
}

#[test]
fn buffers_are_cut_and_consumed_anywhere() {
    let memory = DeviceMemory::from(testing::memory());
    let whole: Vec<u8> = (0..9).collect();
    memory
        .ram
        .write_slice(&whole, GuestAddress(0x8000))
        .unwrap();
    let shape = [
        (0x8000, 2, flag::NEXT, 1),
        (0x8002, 3, flag::NEXT, 2),
        (0x8005, 4, 0, 0),
    ];
    for at in 0..=10 {
        for skip in 0..=4 {
            let mut front = parse(&memory, &shape).unwrap().readable;
            front.advance(skip);
            let mut back = front.split_off(at);
            let cut = (skip + at).min(9);
            for (buffers, expected) in [(&mut front, &whole[skip..cut]), (&mut back, &whole[cut..])]
            {
                assert_eq!(buffers.len(), expected.len());
                let sum: usize = buffers.slices().iter().map(|slice| slice.len()).sum();
                assert_eq!(sum, expected.len());
                let mut bytes = vec![0; expected.len()];
                buffers.read_exact(&mut bytes).unwrap();
                assert_eq!(bytes, expected, "skip {skip}, cut at {at}");
            }
        }
    }
}

#[test]
fn read_only_memory_is_for_system_calls_and_to_be_read() {
    const ROM: u64 = 1 << 32;
    let rom = GuestMemory::from_ranges(&[(GuestAddress(ROM), 0x1000)]).unwrap();
    rom.write_slice(b"mapped", GuestAddress(ROM)).unwrap();
    let memory = DeviceMemory {
        ram: testing::memory(),
        rom: Some(rom),
    };
    memory
        .ram
        .write_slice(b"head", GuestAddress(0x8000))
        .unwrap();
    let shape = [(0x8000, 4, flag::NEXT, 1), (ROM, 6, 0, 0)];
    let mut readable = parse(&memory, &shape).unwrap().readable;
    let mut head = [0; 4];
    readable.read_exact(&mut head).unwrap();
    assert_eq!(&head, b"head");
    // The kernel reads it, and we do not.
    assert_eq!(readable.read_exact(&mut [0]), Err(ChainError::Address));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let sent = crate::virtio::iov::send(ours.as_fd(), readable.slices()).unwrap();
    let mut text = [0; 6];
    (&theirs).read_exact(&mut text).unwrap();
    assert_eq!((sent, &text), (6, b"mapped"));
    // What is left of it after a cut is still that.
    let mut front = parse(&memory, &shape).unwrap().readable;
    let mut back = front.split_off(5);
    assert_eq!(front.read_exact(&mut [0; 5]), Err(ChainError::Address));
    assert_eq!(back.read_exact(&mut [0]), Err(ChainError::Address));
    for broken in [
        (ROM, 1, flag::WRITE, 0),
        (ROM + 0xfff, 2, 0, 0),
        (ROM - 1, 2, 0, 0),
    ] {
        assert_eq!(parse(&memory, &[broken]).err(), Some(ChainError::Address));
    }
}
