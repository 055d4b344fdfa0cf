//! Entry points for fuzzing.

/// What a guest's bytes on the control connection go through.
pub fn agent_events(bytes: &[u8]) {
    let allowance = std::sync::atomic::AtomicU32::new(8);
    let mut from = bytes;
    let mut events = 0;
    crate::agent::read_events(&mut from, &allowance, |_| {
        events += 1;
        true
    });
    assert!(events <= 8, "an agent may say no more than it was asked");
}
