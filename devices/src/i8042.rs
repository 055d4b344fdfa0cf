//! As much of the i8042 keyboard controller as Linux needs to reset the machine
//! with `reboot=k` (`native_machine_emergency_restart` in
//! arch/x86/kernel/reboot.c): it waits until the controller's input buffer is
//! empty, then pulses the reset line. The controller has no state.

/// Data port.
pub const DATA_PORT: u16 = 0x60;
/// Status when read, command when written.
pub const COMMAND_PORT: u16 = 0x64;

/// Command "pulse output line 0", which is the CPU's reset.
const CMD_PULSE_RESET: u8 = 0xfe;

/// Whether a write of `data` to `port` resets the machine.
pub fn is_reset(port: u16, data: u8) -> bool {
    port == COMMAND_PORT && data == CMD_PULSE_RESET
}

/// What a read of `port` gives. Status 0 says "input buffer empty, no output":
/// `kb_wait` returns at its first look, and a probe for a keyboard finds none.
/// `None` if the port is not the controller's.
pub fn read(port: u16) -> Option<u8> {
    matches!(port, DATA_PORT | COMMAND_PORT).then_some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pulse_command_on_the_command_port_resets() {
        assert!(is_reset(0x64, 0xfe));
        assert!(!is_reset(0x60, 0xfe));
        assert!(!is_reset(0x64, 0xd1));
    }

    #[test]
    fn kb_wait_ends_at_once() {
        assert_eq!(read(0x64).map(|status| status & 0x02), Some(0));
        assert_eq!(read(0x61), None);
    }
}
