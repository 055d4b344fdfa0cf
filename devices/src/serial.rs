//! The 16550A at 0x3f8, for early messages of the guest. Output goes to a
//! [`Console`]; there is no input.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState as Registers};

use crate::{Console, Interrupt};

/// First port of COM1.
pub const PORT_BASE: u16 = 0x3f8;
/// Number of ports.
pub const PORT_COUNT: u16 = 8;
/// ISA interrupt of COM1.
pub const IRQ: u32 = 4;

/// Why a serial port could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// The state holds more input than the receive buffer takes.
    #[error("serial state holds {0} bytes of input, more than the receive buffer takes")]
    InputTooLong(usize),
    /// The interrupt that was pending could not be raised again.
    #[error("serial interrupt")]
    Interrupt(#[source] io::Error),
}

/// The registers of the port, as a 16550A names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub baud_divisor_low: u8,
    /// Divisor latch, high byte.
    pub baud_divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Received bytes that the guest has not read (in loopback mode, its own).
    pub in_buffer: Vec<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        Registers::default().into()
    }
}

impl From<Registers> for SerialState {
    fn from(r: Registers) -> Self {
        Self {
            baud_divisor_low: r.baud_divisor_low,
            baud_divisor_high: r.baud_divisor_high,
            interrupt_enable: r.interrupt_enable,
            interrupt_identification: r.interrupt_identification,
            line_control: r.line_control,
            line_status: r.line_status,
            modem_control: r.modem_control,
            modem_status: r.modem_status,
            scratch: r.scratch,
            in_buffer: r.in_buffer,
        }
    }
}

impl From<&SerialState> for Registers {
    fn from(s: &SerialState) -> Self {
        Self {
            baud_divisor_low: s.baud_divisor_low,
            baud_divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.in_buffer.clone(),
        }
    }
}

struct IrqLine(Arc<dyn Interrupt>);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.raise()
    }
}

struct ConsoleWriter(Console);

impl io::Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The serial port.
pub struct Serial {
    uart: vm_superio::Serial<IrqLine, NoEvents, ConsoleWriter>,
}

impl Serial {
    /// A port as it is after power-on. `irq` is raised for each interrupt.
    pub fn new(irq: Arc<dyn Interrupt>, console: Console) -> Self {
        Self {
            uart: vm_superio::Serial::new(IrqLine(irq), ConsoleWriter(console)),
        }
    }

    /// A port in `state`. An interrupt that was pending is raised again: the
    /// driver may sleep on a transmission that was under way at the save.
    pub fn restore(
        irq: Arc<dyn Interrupt>,
        console: Console,
        state: &SerialState,
    ) -> Result<Self, SerialError> {
        let uart = vm_superio::Serial::from_state(
            &state.into(),
            IrqLine(irq),
            NoEvents,
            ConsoleWriter(console),
        )
        .map_err(|error| match error {
            vm_superio::serial::Error::Trigger(e) => SerialError::Interrupt(e),
            vm_superio::serial::Error::IOError(e) => SerialError::Interrupt(e),
            vm_superio::serial::Error::FullFifo => SerialError::InputTooLong(state.in_buffer.len()),
        })?;
        Ok(Self { uart })
    }

    /// The registers now.
    pub fn save(&self) -> SerialState {
        self.uart.state().into()
    }

    /// The guest reads the port `PORT_BASE + offset`.
    pub fn read(&mut self, offset: u8) -> u8 {
        self.uart.read(offset)
    }

    /// The guest writes `value` to the port `PORT_BASE + offset`.
    pub fn write(&mut self, offset: u8, value: u8) {
        // The console takes everything, so this is a full loopback buffer or a
        // lost interrupt: the guest's own doing or of no consequence to others.
        if let Err(error) = self.uart.write(offset, value) {
            log::debug!("serial port: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EventFd;

    fn irq() -> Arc<EventFd> {
        Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap())
    }

    #[test]
    fn output_reaches_the_console() {
        let console = Console::new();
        let mut serial = Serial::new(irq(), console.clone());
        for &byte in b"panic: no init\n" {
            serial.write(0, byte);
        }
        assert_eq!(console.tail(1), ["panic: no init"]);
    }

    #[test]
    fn state_survives_save_and_restore() {
        let mut serial = Serial::new(irq(), Console::new());
        assert_eq!(serial.save(), SerialState::default());
        serial.write(7, 0x5a);
        serial.write(4, 0x10); // loopback
        serial.write(0, b'x');
        let state = serial.save();
        assert_ne!(state, SerialState::default());
        let mut restored = Serial::restore(irq(), Console::new(), &state).unwrap();
        assert_eq!(restored.save(), state);
        assert_eq!(restored.read(0), b'x');
        assert_eq!(restored.read(7), 0x5a);
    }

    #[test]
    fn a_transmission_at_the_save_gets_its_interrupt_after_the_restore() {
        let mut serial = Serial::new(irq(), Console::new());
        serial.write(1, 0x02); // interrupt when the transmitter is empty
        serial.write(0, b'x');
        let line = irq();
        let state = serial.save();
        Serial::restore(line.clone(), Console::new(), &state).unwrap();
        assert!(line.read().is_ok());
    }

    #[test]
    fn too_much_input_is_refused() {
        let state = SerialState {
            in_buffer: vec![0; 4096],
            ..SerialState::default()
        };
        assert!(matches!(
            Serial::restore(irq(), Console::new(), &state),
            Err(SerialError::InputTooLong(4096))
        ));
    }
}
