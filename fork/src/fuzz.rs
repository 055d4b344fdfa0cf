//! Entry points for fuzzing.

/// What a guest's bytes on the control connection go through.
pub fn agent_events(bytes: &[u8]) {
    let mut incoming = crate::agent::Events::default();
    incoming.allow(8);
    let mut events = 0;
    for part in bytes.chunks(7) {
        incoming.feed(part);
        while let Ok(Some(_)) = incoming.next() {
            events += 1;
        }
    }
    assert!(events <= 8, "an agent may say no more than it was asked");
}

pub use crate::volumes::fuzz::serve as serve_volumes;
