//! The ports of the UART.
#![no_main]

use arbitrary::Arbitrary;
use devices::console::Console;
use devices::serial::{Serial, SerialState};
use libfuzzer_sys::fuzz_target;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Arbitrary, Debug)]
enum Action {
    Read(u8),
    Write(u8, u8),
    Print(Vec<u8>),
    Tail(u8),
    Fork,
    Restore { registers: [u8; 9], input: Vec<u8> },
}

fn irq() -> Arc<EventFd> {
    Arc::new(EventFd::new(EFD_NONBLOCK).expect("eventfd"))
}

fuzz_target!(|actions: Vec<Action>| {
    let console = Console::new();
    let mut serial = Serial::new(irq(), console.clone());
    for action in actions {
        match action {
            Action::Read(offset) => {
                serial.read(offset);
            }
            Action::Write(offset, value) => serial.write(offset, value),
            Action::Print(bytes) => bytes.iter().for_each(|&byte| serial.write(0, byte)),
            Action::Tail(lines) => {
                let tail = console.tail(lines.into());
                assert!(tail.iter().all(|line| !line.contains(char::is_control)));
            }
            Action::Fork => {
                let state = serial.save();
                serial = Serial::restore(irq(), console.clone(), &state).expect("a good state");
                assert_eq!(serial.save(), state);
            }
            Action::Restore { registers, input } => {
                let [a, b, c, d, e, f, g, h, i] = registers;
                let state = SerialState {
                    baud_divisor_low: a,
                    baud_divisor_high: b,
                    interrupt_enable: c,
                    interrupt_identification: d,
                    line_control: e,
                    line_status: f,
                    modem_control: g,
                    modem_status: h,
                    scratch: i,
                    in_buffer: input,
                };
                if let Ok(restored) = Serial::restore(irq(), console.clone(), &state) {
                    serial = restored;
                }
            }
        }
    }
});
