//! What an agent may say on the control connection: frames that a guest wrote.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| fork::fuzz::agent_events(bytes));
